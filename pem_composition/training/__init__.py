"""One trainer, one objective per file; ``classification.run`` is what ``pem train`` calls."""
