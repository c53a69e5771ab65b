"""The transformer and how text is sampled from it."""
