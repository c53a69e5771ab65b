"""What leaves this repository: a run as the files of others, verified by those who read them."""
