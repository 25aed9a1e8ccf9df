"""What every objective says of its terms to those who show them."""

from typing import get_args

import pytest

from engine.objectives import Objectives
from engine.objectives.base import Objective
from engine.objectives.dpo import Dpo
from engine.objectives.figures import shown_units, terms_of
from engine.objectives.reinforcement.grpo import Grpo
from engine.objectives.reinforcement.rewards import Balance
from engine.objectives.reinforcement.rloo import Rloo
from engine.objectives.sft import Sft
from tests.engine.objectives.test_all_objectives import OBJECTIVES, named


@pytest.mark.parametrize("objective", OBJECTIVES, ids=named)
def test_each_term_has_a_unit_and_what_is_shown_is_a_figure(objective: Objective) -> None:
    assert terms_of(objective).keys() <= objective.units.keys() and all(objective.units.values())
    assert {*objective.shown, objective.heldout} <= {*objective.heldout_terms}


@pytest.mark.parametrize("objective", [Grpo(rewards=(Balance(),)), Rloo(rewards=(Balance(),))], ids=["grpo", "rloo"])
def test_what_is_measured_of_samples_has_a_unit_too(objective: Objective) -> None:
    assert {*terms_of(objective), *objective.heldout_terms} <= objective.units.keys()
    assert {*objective.shown, objective.heldout} <= {*objective.heldout_terms}


def test_a_report_reads_units_from_the_class_alone() -> None:
    """It knows the kind of a foreign run's objective, and makes none with that run's options."""
    for kind in get_args(Objectives):
        assert kind.units[kind.heldout] and isinstance(kind.shown, tuple), kind


def test_the_units_of_what_is_shown() -> None:
    assert shown_units(Sft()) == {"loss": "nats per token"}
    assert shown_units(Dpo()) == {"loss": "per pair", "accuracy": "share"}
