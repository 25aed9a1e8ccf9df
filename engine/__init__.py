"""Runs a federation on Ray: driver, slots, local training, evaluation, checkpoints."""
