"""What is told of an objective's terms: a client's metrics, their sums over clients, and the means of those."""

import math
from collections.abc import Mapping

from engine.objectives.base import Objective


def terms_of(objective: Objective) -> dict[str, float]:
    """Returns all terms, those of the loss first, and the largest magnitude of a unit of each."""
    return {**objective.losses, **objective.figures}


def term_metrics(objective: Objective) -> dict[str, tuple[str, str]]:
    """Returns which metrics hold each term's mean and number of units: `loss` and `learned` those of an only term."""
    terms = [*terms_of(objective)]
    return {t: (f"term.{t}", f"units.{t}") for t in terms} if len(terms) > 1 else {terms[0]: ("loss", "learned")}


def shown_names(objective: Objective) -> list[str]:
    """Returns the figures that are shown beside the loss, as far as the options let them be measured."""
    return [name for name in objective.shown if name in objective.heldout_terms]


def shown_units(objective: Objective) -> dict[str, str]:
    """Returns the units of the evaluation's `loss`, and of the figures that are shown beside it."""
    terms = {"loss": objective.heldout, **{name: name for name in shown_names(objective)}}
    return {name: objective.units.get(term, "") for name, term in terms.items()}


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
