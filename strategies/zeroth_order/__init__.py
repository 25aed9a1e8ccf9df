"""Rules whose clients estimate gradients from losses alone."""
