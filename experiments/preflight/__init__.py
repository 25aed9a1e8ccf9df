"""Checks of a recipe before it runs: `fedpost plan` and `fedpost run --dry`."""
