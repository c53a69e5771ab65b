"""Models that were trained elsewhere: their folders, their families, the hub they come from."""
