"""Text from a model: the loop, the choice of a token, the key-value cache, and rows with adapters of their own."""
