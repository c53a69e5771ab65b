"""Text: corpora, tokenizers, and batches that are a function of the step."""
