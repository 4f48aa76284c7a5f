"""Recovery without training (E9)."""
