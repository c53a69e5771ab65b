"""One training run, from its base and data to what it publishes."""
