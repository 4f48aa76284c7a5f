"""The graph core: which axes of which tensors are one and the same channel, and how to remove some of them."""
