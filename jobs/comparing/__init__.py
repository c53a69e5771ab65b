"""Full fine-tuning against LoRA, measured and shown."""
