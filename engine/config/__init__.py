"""The engine's sections of a recipe and their checks."""
