"""The table of settings, and where its values come from."""
