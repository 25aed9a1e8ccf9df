"""A run from start to end: the driver and the round loop."""
