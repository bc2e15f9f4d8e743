"""Measured comparisons: `make bench`."""
