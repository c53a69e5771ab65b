"""A search for good LoRA settings: a study of many runs, and what came of it."""
