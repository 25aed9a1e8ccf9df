"""What is summed over clients of an objective's terms, and what metrics make of the sums."""

import math
from collections.abc import Mapping

from engine.objectives.base import Objective, term_metrics, terms_of


def client_figures(objective: Objective, metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns what is summed over clients, from a client's metrics: each term's sum and its units, and the tokens."""
    figures: dict[str, float] = {}
    for name, (mean, units) in term_metrics(objective).items():
        figures |= {f"term.{name}": metrics[mean] * metrics[units], f"units.{name}": metrics[units]}
    return {**figures, "tokens": metrics["tokens"]}


def figure_bounds(objective: Objective, tokens: int) -> dict[str, float]:
    """Returns the largest magnitude of each figure of a client that trains on at most this number of tokens."""
    bounds: dict[str, float] = {}
    for name, bound in terms_of(objective).items():
        bounds |= {f"term.{name}": tokens * bound, f"units.{name}": float(tokens)}
    return {**bounds, "tokens": float(tokens)}


def figure_metrics(objective: Objective, figures: Mapping[str, float]) -> dict[str, float]:
    """Returns the cohort's `loss` and `tokens`, and of several terms each mean; a mean is NaN without units."""
    means = {name: figures[f"term.{name}"] / (figures[f"units.{name}"] or math.nan) for name in terms_of(objective)}
    losses = [means[name] for name in objective.losses if not math.isnan(means[name])]
    each = {f"term.{name}": mean for name, mean in means.items()} if len(means) > 1 else {}
    return {"loss": sum(losses) if losses else math.nan, "tokens": figures["tokens"], **each}
