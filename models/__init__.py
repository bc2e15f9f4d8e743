"""Encoding operator, coil sensitivities, reconstructions, and the cards of trained networks."""
