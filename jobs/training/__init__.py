"""One run from its beginning to its end, for every command that trains."""
