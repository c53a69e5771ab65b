"""A run's answers judged by rules, beside those of its base: evaluate.py."""
