"""Adapters as things to work with: opened, inspected, checked, merged, combined, taken to PEFT and back."""
