"""Client-level privacy and clients that have not trained: the model stays where it was, however many of them come.

Played in-process with a noise multiplier of 0, over every strategy that `check_dp` accepts. Legend: P parameters,
D coordinates after the rotation, O outputs and I inputs of a layer, R rank.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, get_args

import numpy as np
import pytest
import torch

from engine.aggregation.exact_sum import ExactSum, merge
from experiments.cli.contract import engine_stored, engine_sum
from strategies import Strategies
from strategies.averaging.drift import Scaffold
from strategies.averaging.fedavg import FedAvg
from strategies.averaging.reweighting import FedNova, QFedAvg
from strategies.contract.case import FULL, LORA, Case
from strategies.core.base import Rule, named
from strategies.core.cohort import PoissonCohort, UniformCohort
from strategies.core.layout import Layout
from strategies.core.protocol import Aggregate, ServerState, Update
from strategies.core.seeds import rng
from strategies.lora.hetlora import HetLora
from strategies.lora.products import FedExLora, FlexLora, Flora
from strategies.privacy.central import WITHIN, AdaptiveDp, AdaptivePlan, CentralDp, CentralPlan
from strategies.privacy.checks import check_dp
from strategies.privacy.distributed import DistributedDp
from strategies.privacy.integers import signs
from strategies.privacy.noise import Words, seeded_words

ROUNDS, CLIP, POPULATION = 20, 0.05, 9
COHORTS = {  # the expected cohort, and how many clients come, round after round
    "full": (4, [4]),
    "thin": (4, [1, 2]),
    "empty": (4, [0]),
    "thick": (1, [4, 0, 2, 3]),
}


def accepted(dp: CentralDp | DistributedDp, *, mixed_ranks: bool = False) -> list[Rule]:
    """The strategies that go with it, and FlexLoRA's sketches."""
    members: list[Rule] = []
    for strategy in [
        *(kind() for kind in get_args(Strategies)),
        FlexLora(sketch=1),
        HetLora(weighting="uniform", gamma=1.0),
    ]:
        layout = LORA if strategy.needs_lora else FULL
        try:
            check_dp(dp, strategy, strategy.beside(layout), "ideal", mixed_ranks=mixed_ranks)
        except ValueError:
            continue
        if strategy.bounded_weights and (strategy.mixed_ranks or not mixed_ranks):
            members.append(strategy)
    return members


def no_words(count: int) -> np.ndarray:
    raise AssertionError("a noise multiplier of 0 draws nothing")


def private_round(
    case: Case, state: ServerState, plan: CentralPlan, clip: float, clients: int, scale: float, *, mixed: bool = False
) -> tuple[ServerState, float]:
    """The next state and clipping norm; `scale` 0: nobody's training changes anything."""
    broadcast, total = case.strategy.broadcast(state), ExactSum()
    for client in range(clients):
        received = replace(broadcast, lora_rank=1 + client % 2) if mixed else broadcast
        change = scale * torch.from_numpy(rng(1, state.round, client, "initial").normal(size=case.layout.size)).float()
        total.add(plan.encode(case.client(received, client, {}, change)[0], clip))
    if clients:
        aggregate = merge([total.take()])
    else:
        lengths = case.strategy.beside(case.layout) | ({WITHIN: 1} if isinstance(plan, AdaptivePlan) else {})
        extras = {name: torch.zeros(length) for name, length in lengths.items()}
        aggregate = Aggregate(0.0, torch.zeros(case.layout.size), extras, 0)
    aggregate, clip = plan.decode(aggregate, clip, no_words, {})
    return case.strategy.apply(state, aggregate), clip


def case_of(strategy: Rule) -> Case:
    return Case(strategy, LORA if strategy.needs_lora else FULL, engine_sum, engine_stored)


def hold_still(case: Case, before: ServerState, after: ServerState) -> None:
    pairs = zip(case.effective(before), case.effective(after), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


@pytest.mark.parametrize("cohort", COHORTS)
@pytest.mark.parametrize(
    "strategy",
    accepted(CentralDp(noise_multiplier=0, joint=True), mixed_ranks=True),
    ids=lambda s: s.kind,
)
def test_without_training_the_model_stays_under_mixed_ranks(strategy: Rule, cohort: str) -> None:
    expected, sizes = COHORTS[cohort]
    dp = CentralDp(noise_multiplier=0, clip=CLIP, joint=True)
    plan, case = dp.plan(PoissonCohort(size=expected), POPULATION, ROUNDS), case_of(strategy)
    before = state = case.start()
    for round_ in range(ROUNDS):
        state, _ = private_round(case, state, plan, CLIP, sizes[round_ % len(sizes)], 0.0, mixed=True)
    hold_still(case, before, state)


@pytest.mark.parametrize("strategy", accepted(DistributedDp(noise_multiplier=1.0, joint=True)), ids=lambda s: s.kind)
def test_without_training_clients_add_noise_alone_to_the_ring(strategy: Rule) -> None:
    """What a client adds is what one of zeros adds; the sum of zeros leaves the model, for few and for many clients."""
    case = case_of(strategy)
    dp = DistributedDp(noise_multiplier=1.0, clip=CLIP, joint=True, survivors=0.5)
    beside = strategy.beside(case.layout)
    plan = dp.plan(UniformCohort(size=4), POPULATION, ROUNDS, case.layout.size + sum(beside.values()))
    before = state = case.start()
    zeros = {name: torch.zeros(length) for name, length in beside.items()}
    for round_ in range(ROUNDS):
        broadcast, total_D = strategy.broadcast(state), np.zeros(plan.ring.dimension, np.int64)
        flips_D = signs(rng(0, round_, -1, "rotation"), plan.ring.dimension)
        clients = (2, 4)[round_ % 2]
        for client in range(clients):
            update, _ = case.client(broadcast, client, {}, torch.zeros(case.layout.size))
            nothing = Update(client, 1.0, torch.zeros(case.layout.size), zeros)
            sent_D, noise_D = (plan.encode(sent, flips_D, words(client)) for sent in (update, nothing))
            total_D += sent_D - noise_D
        state = strategy.apply(state, plan.decode(total_D, clients, beside, flips_D))
    hold_still(case, before, state)


def words(client: int) -> Words:
    return seeded_words(rng(0, 0, client, "noise"))


def test_the_law_is_held_against_all_that_private_runs_may_take() -> None:
    dp = CentralDp(noise_multiplier=0, joint=True)
    assert {strategy.kind for strategy in accepted(dp)} == {
        *("fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "diloco", "feddyn", "fedkseed"),
        *("ditto", "ffa", "fedsa", "feddpa", "rolora", "flora", "flexlora", "hetlora", "fedex", "fedsvd", "fedsb"),
    }
    assert {strategy.kind for strategy in accepted(dp, mixed_ranks=True)} == {"flora"}


# One layer of 2 x 2, rank 1, scale 2. The server's product: 2 [1, 0]' [1, 0] = [[2, 0], [0, 0]].
SMALL = Layout(("q.lora_A.default.weight", "q.lora_B.default.weight"), ((1, 2), (2, 1)), scale=2.0)
START = torch.tensor([1.0, 0, 1, 0])  # A, B
MOVED = torch.tensor([1.0, 0, 1.5, 0])  # the product is [[3, 0], [0, 0]]: its change is 1


def small_round(strategy: Rule, ends: list[torch.Tensor], clip: float, expected: int = 1) -> ServerState:
    """One round from START with central noise of 0."""
    state = strategy.init(START, SMALL)
    dp = CentralDp(noise_multiplier=0, clip=clip, joint=True)
    check_dp(dp, strategy, strategy.beside(SMALL), "off")
    plan, broadcast, total = dp.plan(PoissonCohort(size=expected), 10, 1), strategy.broadcast(state), ExactSum()
    for client, end in enumerate(ends):
        update, _ = strategy.finish(Update(client, 0.25, end - broadcast.params), broadcast, {})
        total.add(plan.encode(update, clip))
    extras = {name: torch.zeros(length) for name, length in strategy.beside(SMALL).items()}
    aggregate = merge([total.take()]) if ends else Aggregate(0.0, torch.zeros(4), extras, 0)
    return strategy.apply(state, plan.decode(aggregate, clip, no_words, {})[0])


def product_of(state: ServerState) -> torch.Tensor:
    """Residual + scale * B A."""
    (pair,) = SMALL.lora_pairs(state.params)
    product_OI = pair.scale * pair.b_OR @ pair.a_RI
    return product_OI if state.merged_delta is None else product_OI + SMALL.products(state.merged_delta)[0]


HAND = pytest.mark.parametrize(
    "strategy",
    [FlexLora(weighting="uniform"), FedExLora(weighting="uniform"), Flora(weighting="uniform")],
    ids=lambda s: s.kind,
)


@HAND
@pytest.mark.parametrize(("clients", "wanted"), [(0, 2.0), (1, 3.0), (3, 5.0)])
def test_the_sum_of_changes_goes_onto_the_product(strategy: Rule, clients: int, wanted: float) -> None:
    # Each client changes the product by 1, and 1 is expected: 2 + 0, 2 + 1, 2 + 3
    state = small_round(strategy, [MOVED] * clients, clip=10.0)
    torch.testing.assert_close(product_of(state), torch.tensor([[wanted, 0], [0, 0]]), rtol=0, atol=1e-5)


def test_a_clipped_change_of_the_product_is_a_shorter_step() -> None:
    # FlexLoRA and FLoRA send the change 1 alone: clipped to 0.25, and two clients for an expected four give half.
    for strategy in (FlexLora(weighting="uniform"), Flora(weighting="uniform")):
        state = small_round(strategy, [MOVED], clip=0.25)
        torch.testing.assert_close(product_of(state), torch.tensor([[2.25, 0], [0, 0]]), rtol=0, atol=1e-5)
        half = small_round(strategy, [MOVED] * 2, clip=0.25, expected=4)
        torch.testing.assert_close(product_of(half), torch.tensor([[2.125, 0], [0, 0]]), rtol=0, atol=1e-5)
    # FedEx sends the change of B, 0.5, and of the product, 1, with a norm of sqrt(1.25): clipped to half of that.
    state = small_round(FedExLora(weighting="uniform"), [MOVED], clip=1.25**0.5 / 2)
    torch.testing.assert_close(state.params, torch.tensor([1, 0, 1.25, 0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(product_of(state), torch.tensor([[2.5, 0], [0, 0]]), rtol=0, atol=1e-5)


def test_flora_sends_no_ranks_to_be_clipped() -> None:
    # With the rank among what is clipped, a product of norm 0.5 would have come through as 0.5 * 0.1 / 64.
    wide = Layout(SMALL.names, ((64, 2), (2, 64)), scale=1.0)
    strategy = Flora(weighting="uniform")
    state = strategy.init(torch.zeros(256), wide)
    end = torch.zeros(256)
    end[0], end[128] = 1.0, 0.5
    update, _ = strategy.finish(Update(0, 1.0, end), strategy.broadcast(state), {})
    plan = CentralDp(noise_multiplier=0, clip=0.1, joint=True).plan(PoissonCohort(size=1), 10, 1)
    sent = plan.encode(update, 0.1)
    assert set(sent.extras) == {"product"}
    assert float(sent.extras["product"].norm()) == pytest.approx(0.1)


@dataclass(frozen=True)
class Counts(FedAvg):
    """Divides by a number that clients send beside the update, as a user's own rule may."""

    weighting: str = "uniform"  # type: ignore[assignment]

    def beside(self, layout: Layout) -> dict[str, int]:
        return {"rows": 1}


@dataclass(frozen=True)
class Follows(Counts):
    """The same, declared to send changes."""

    extras_are_changes: ClassVar[bool] = True


@pytest.mark.parametrize("kind", [CentralDp, AdaptiveDp, DistributedDp], ids=lambda kind: kind.kind)
def test_what_is_no_change_of_the_model_is_refused_whoever_wrote_the_rule(kind: type[CentralDp]) -> None:
    dp = kind(noise_multiplier=1.0, joint=True)
    for strategy in (FedNova(), QFedAvg(), Scaffold(), Counts()):
        extras = strategy.beside(FULL)
        with pytest.raises(ValueError, match=rf'{named(strategy)} sends {next(iter(extras))} .*"fedprox"'):
            check_dp(dp, strategy, extras, "full")
    check_dp(dp, Follows(), Follows().beside(FULL), "full")


@pytest.mark.parametrize("strategy", [FlexLora(), HetLora(gamma=1.0)], ids=lambda s: s.kind)
def test_rules_whose_low_ranks_shrink_the_others_are_refused_under_mixed_ranks(strategy: Rule) -> None:
    dp = CentralDp(noise_multiplier=1.0, joint=True)
    with pytest.raises(ValueError, match=r'beyond its own rank.*"flora", or leave model\.peft\.ranks out'):
        check_dp(dp, strategy, strategy.beside(LORA), "off", mixed_ranks=True)
    check_dp(dp, strategy, strategy.beside(LORA), "off")
    check_dp(dp, Flora(), Flora().beside(LORA), "off", mixed_ranks=True)


def test_what_goes_beside_the_update_has_the_same_weight() -> None:
    # The product's change is 1, the delta's weight 0.5: both count half.
    strategy = FedExLora()
    broadcast = strategy.broadcast(strategy.init(START, SMALL))
    update, _ = strategy.finish(Update(0, 0.5, MOVED - START), broadcast, {})
    sent = CentralDp(noise_multiplier=0, clip=10.0, joint=True).plan(PoissonCohort(size=1), 10, 1).encode(update, 10.0)
    assert sent.weight == 0.5 and sent.delta.tolist() == [0, 0, 0.5, 0]
    assert sent.extras["product"].tolist() == [0.5, 0, 0, 0]
