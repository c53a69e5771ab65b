"""torch's own layers, with named adapters on them."""
