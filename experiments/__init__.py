"""Recipes, the command line, and the same as Python calls: `experiments.run(recipe) -> Run`."""

from experiments.runs.api import Run, run

__all__ = ["Run", "run"]
