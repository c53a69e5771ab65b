"""Base, text, model and optimizer put together: what the commands share."""
