"""Examples, objectives and fitting: how the weights of a model card are made."""
