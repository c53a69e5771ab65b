"""LoRA in four short files: what the commands do, without what makes them safe to rely on."""
