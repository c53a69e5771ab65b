"""Low-rank adaptation: layers that carry named adapters, and the adapters themselves."""
