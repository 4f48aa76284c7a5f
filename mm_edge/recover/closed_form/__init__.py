"""Recovery without training (E9 in docs/method.md)."""
