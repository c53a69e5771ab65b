"""What a finished run tells: its figures, and texts or answers."""
