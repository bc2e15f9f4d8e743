"""The mathematics of noise: covariance, probes, linearization, sketch, and the exact references."""
