"""Records to learn from: read from files, written by a template, masked, packed and batched; looked at and mended."""
