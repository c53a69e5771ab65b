"""What text is generated from: prompts, and the base and adapters that are chosen."""
