"""Reports of runs: one page to read, to print and to send."""
