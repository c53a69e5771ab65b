"""The variants of LoRA, a file each, and the registry of their names."""
