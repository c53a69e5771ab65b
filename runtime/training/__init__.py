"""What every training loop stands on: batches, steps, metrics, resumable state."""
