"""A torch model becomes a store: what hooks take from its forward passes."""
