"""One trainer, one objective per file; ``runs.run`` is what ``pem train`` calls."""
