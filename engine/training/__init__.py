"""Local training: the step loop, its backends, and evaluation."""
