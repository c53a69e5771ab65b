"""GGUF files: what is in one, and what llama.cpp makes of it."""
