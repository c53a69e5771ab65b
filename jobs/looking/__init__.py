"""What dataset.py prints, draws and writes."""
