"""Records checked against the rules of good instruction data, and mended, split and converted where that is safe."""
