"""The Hugging Face hub: what is fetched from it, and what is pushed to it."""
