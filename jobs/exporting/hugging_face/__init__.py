"""Folders that transformers and PEFT read, and a model and tokenizer as they have them."""
