"""Who runs a pipeline: the embedded host and the command line."""
