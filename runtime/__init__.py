"""What every command stands on: settings, errors, files, devices, steps, run folders, metrics."""
