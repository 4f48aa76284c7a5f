"""How like the dense network, and how good."""
