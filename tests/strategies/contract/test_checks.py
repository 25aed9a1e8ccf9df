"""The contract, held by every member of the union; a new one is tested by being added there."""

from dataclasses import dataclass, replace
from typing import ClassVar, get_args

import pytest
import torch

from experiments.cli.contract import cases, engine_stored, engine_sum
from strategies import Strategies
from strategies.averaging.fedavg import FedAvg
from strategies.contract.case import FULL, LORA, Case, DoesNotApply
from strategies.contract.checks import CHECKS, lacks
from strategies.core.base import Rule
from strategies.core.errors import StrategyError
from strategies.core.lora_algebra import products, put, svd
from strategies.core.protocol import GLOBAL
from strategies.lora.hetlora import HetLora
from strategies.robust.rules import CenteredClipping

MEMBERS = [kind() for kind in get_args(Strategies)]
CASES = [case for member in MEMBERS for case in cases(member)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.strategy.kind}-{'lora' if case.layout is LORA else 'full'}"
)
def test_contract(case: Case, check) -> None:
    try:
        check(case)
    except DoesNotApply as reason:
        pytest.skip(str(reason))


def test_kinds_are_distinct() -> None:
    kinds = [member.kind for member in MEMBERS]
    assert len(set(kinds)) == len(kinds) >= 2


def test_checks_are_distinct_and_say_what_they_hold() -> None:
    assert len({check.__name__ for check in CHECKS}) == len(CHECKS)
    assert all(check.__doc__ and check.__doc__.strip().endswith(".") for check in CHECKS)


def test_what_a_class_lacks_is_named() -> None:
    class Nothing:
        def apply(self, state, aggregate): ...

    assert not any(lacks(kind) for kind in get_args(Strategies))
    missing = lacks(Nothing)
    assert {"reads", "paper", "freezes", "bounded_weights", "broadcast", "finish"} <= set(missing)
    assert "apply" not in missing

    class NoApply(Rule):
        pass

    assert lacks(NoApply) == ["apply"]

    class Old(FedAvg):
        remembers = True

    assert lacks(Old) == ["keeps_state (it defines the old remembers)"]


@dataclass(frozen=True)
class Drifts(FedAvg):
    """Moves without being told to."""

    def apply(self, state, aggregate):
        return replace(super().apply(state, aggregate), params=state.params + 1)


@dataclass(frozen=True)
class Stands(FedAvg):
    """Learns nothing."""

    def apply(self, state, aggregate):
        return replace(state, round=state.round + 1)


@dataclass(frozen=True)
class First(FedAvg):
    """Takes the first update that it sees, and does not say so."""

    def apply(self, state, aggregate):
        step = aggregate.total if aggregate.each is None else aggregate.each[0].delta
        return replace(state, round=state.round + 1, params=state.params + step)


@dataclass(frozen=True)
class InPlace(FedAvg):
    """Writes into the state."""

    def apply(self, state, aggregate):
        state.params.add_(aggregate.total / aggregate.weight)
        return replace(state, round=state.round + 1)


@dataclass(frozen=True)
class Whole(FedAvg):
    """Needs the whole vector, and does not say so."""

    def apply(self, state, aggregate):
        step = aggregate.total / torch.linalg.vector_norm(aggregate.total).clamp(min=1e-9)
        return replace(state, round=state.round + 1, params=state.params + step)


@dataclass(frozen=True)
class Writes(FedAvg):
    """Pulls the parameters along in place of the gradient."""

    def correct(self, grad_KP, params_KP, broadcast, client_state, model="global"):
        params_KP.mul_(0.5)


@dataclass(frozen=True)
class Forgets(FedAvg):
    """Keeps something for nothing."""

    keeps_state: ClassVar[bool] = True

    def finish(self, update, broadcast, client_state, ends=None):
        return update, {"last": update.delta}


@dataclass(frozen=True)
class Doubles(FedAvg):
    """Has a moment in another precision."""

    def init(self, params, layout):
        return replace(super().init(params, layout), moments={"m": params.double()})


@dataclass(frozen=True)
class Counts(FedAvg):
    """Sends a number and takes it for a change."""

    extras_are_changes: ClassVar[bool] = True

    def finish(self, update, broadcast, client_state, ends=None):
        return replace(update, extras={"steps": torch.tensor([update.metrics["steps"]])}), client_state

    def beside(self, layout):
        return {"steps": 1}


@dataclass(frozen=True)
class Cuts(HetLora):
    """Pads with zeros and takes itself for harmless."""

    keeps_higher_ranks: ClassVar[bool] = True


@dataclass(frozen=True)
class Centers(CenteredClipping):
    """Sends its distance from the last step, and does not say so."""

    rests_at_zero: ClassVar[bool] = True


class Vague(FedAvg):
    """Does not say why it needs SGD."""

    needs_optimizer = True


def test_a_need_of_an_optimizer_that_is_no_reason_is_refused() -> None:
    with pytest.raises(StrategyError, match=r"'Vague' does not say what it needs: write .*NeedsSgd\(\"counts on"):
        Vague()


@dataclass(frozen=True)
class Stays(FedAvg):
    """Forgets to count."""

    def apply(self, state, aggregate):
        return replace(super().apply(state, aggregate), round=state.round)


@dataclass(frozen=True)
class Leaks(FedAvg):
    """Sends what it calls frozen."""

    def sent_masks(self, round_, layout):
        return {"delta": torch.zeros(layout.size, dtype=torch.bool)}


@dataclass(frozen=True)
class Creeps(FedAvg):
    """Trains what it calls frozen."""

    def trained_mask(self, broadcast, client_state, model="global"):
        return torch.zeros(broadcast.layout.size, dtype=torch.bool)


class Melts(FedAvg):
    """Is not frozen."""

    __setattr__ = object.__setattr__


@dataclass(frozen=True)
class Heavy(FedAvg):
    """Weighs clients by what they have learned, and does not say that this has no bound."""

    def finish(self, update, broadcast, client_state, ends=None):
        return replace(update, weight=float(update.delta.norm())), client_state


@dataclass(frozen=True)
class Alike(FedAvg):
    """Takes the weights of rows for equal ones."""

    weighs_alike: ClassVar[bool] = True

    def finish(self, update, broadcast, client_state, ends=None):
        return update, client_state


@dataclass(frozen=True)
class Merges(FedAvg):
    """Changes the base, and does not say so."""

    needs_lora: ClassVar[bool] = True

    def apply(self, state, aggregate):
        moved = super().apply(state, aggregate)
        return replace(moved, merged_delta=torch.zeros_like(products(state.params, state.layout)))


@dataclass(frozen=True)
class Turns(FedAvg):
    """Gives the adapters other factors, and does not say so."""

    needs_lora: ClassVar[bool] = True

    def apply(self, state, aggregate):
        moved = super().apply(state, aggregate)
        params = moved.params.clone()
        for pair in state.layout.lora_pairs(params):
            u_OR, s_R, v_RI = svd(pair)
            put(pair, u_OR * s_R, v_RI)
        return replace(moved, params=params)


@dataclass(frozen=True)
class Alternates(FedAvg):
    """Freezes another coordinate in each round, and does not say so."""

    def sent_masks(self, round_, layout):
        return {"delta": torch.arange(layout.size) != round_}


@dataclass(frozen=True)
class SendsProducts(FedAvg):
    """Sends products, and does not say so."""

    needs_lora: ClassVar[bool] = True

    def beside(self, layout):
        return {"product": sum(outputs * inputs for outputs, inputs in layout.product_shapes)}


@dataclass(frozen=True)
class Silent(FedAvg):
    """Sends nothing, and does not say so."""

    def finish(self, update, broadcast, client_state, ends=None):
        return replace(update, delta=torch.zeros_like(update.delta)), client_state | {"kept": update.delta}


@dataclass(frozen=True)
class Corrects(FedAvg):
    """Corrects gradients, and denies it."""

    def correct(self, grad_KP, params_KP, broadcast, client_state, model=GLOBAL):
        grad_KP.mul_(2)


Corrects.corrects = False


@dataclass(frozen=True)
class Prunes(HetLora):
    """Leaves out rows by a client's data, and denies it."""

    picks_coordinates: ClassVar[bool] = False


@pytest.mark.parametrize(
    ("broken", "check", "sentence"),
    [
        (Drifts, "no_change_leaves_the_model_alone", "although no client changed it"),
        (Stands, "a_change_moves_the_model_or_what_clients_keep", "the model is as before"),
        (First, "it_reads_no_more_than_it_says", 'reads is "sum", but'),
        (InPlace, "the_server_side_leaves_its_inputs_unmodified", "apply writes into the state"),
        (Whole, "shards_are_worked_on_as_the_whole", "elementwise is True, but"),
        (Writes, "the_client_side_writes_nothing_but_its_gradient", "correct writes into the parameters"),
        (Forgets, "client_state_is_kept_where_the_class_says_so_and_is_used", "changes nothing that they do"),
        (Doubles, "what_travels_is_flat_contiguous_and_float32", "'0.moments.m' is torch.float64"),
        (Counts, "extras_that_are_changes_are_zero_without_training", "have not trained send steps"),
        (Centers, "an_untrained_client_rests_at_zero_where_the_class_says_so", "have not trained send a change"),
        (Cuts, "an_untrained_client_of_a_lower_rank_sends_zeros", "an untrained client of rank 1 sends delta"),
        (Leaks, "what_is_frozen_is_neither_sent_nor_trained", "coordinates of 'delta' that sent_masks calls frozen"),
        (Creeps, "what_is_frozen_is_neither_sent_nor_trained", "leaves gradients where trained_mask says"),
        (Stays, "rounds_count_up_by_one", "apply must add one to round"),
        (Heavy, "weights_are_as_the_class_says", "bounded_weights is True, but"),
        (Melts, "it_travels_and_says_what_it_is", "frozen=True"),
        (Alike, "weights_are_as_the_class_says", "weighs_alike is True, but finish makes the weight 0.5"),
        (
            Merges,
            "what_happens_is_what_the_class_says",
            "merges_into_base is False, but there is a merged delta",
        ),
        (Turns, "the_basis_stays_where_the_class_says_so", "keeps_basis is True, but a change of"),
        (Alternates, "the_basis_stays_where_the_class_says_so", "keeps_basis is True, but rounds differ"),
        (SendsProducts, "products_are_sent_where_the_class_says_so", "send products in product, but"),
        (
            Silent,
            "what_happens_is_what_the_class_says",
            "sends_update is True, but clients send zeros",
        ),
        (Corrects, "gradients_are_corrected_only_where_the_class_says_so", "corrects is False, but"),
        (Prunes, "coordinates_are_picked_only_where_the_class_says_so", "picks_coordinates is False, but"),
    ],
)
def test_a_broken_promise_is_detected_and_named(broken, check, sentence) -> None:
    case = Case(broken(), LORA if broken.needs_lora else FULL, engine_sum, engine_stored)
    with pytest.raises(AssertionError, match=sentence):
        next(held for held in CHECKS if held.__name__ == check)(case)
