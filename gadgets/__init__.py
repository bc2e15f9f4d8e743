"""The gadgets, and the items that travel between them."""
