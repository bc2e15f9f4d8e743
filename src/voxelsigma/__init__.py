"""Voxel-wise noise standard deviation for deep-learning MRI reconstructions."""

__version__ = "0.1.0"
