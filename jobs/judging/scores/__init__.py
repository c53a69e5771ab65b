"""What rules say of one answer, each from 0 to 1 unless it says otherwise, and how sure a figure is."""
