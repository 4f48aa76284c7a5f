"""Recovery by gradient steps."""
