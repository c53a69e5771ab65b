"""Curves and texts of a run for TensorBoard and Weights & Biases, beside metrics.jsonl."""
