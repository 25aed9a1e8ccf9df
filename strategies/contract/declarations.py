"""The part of the contract on what a class declares: the engine checks recipes by it, so it must be true.

Legend: P parameters, K clients.
"""

import pickle
from dataclasses import FrozenInstanceError, replace

import torch

from strategies.contract.case import LORA, Case, DoesNotApply, difference, drawn, hold, same
from strategies.core.lora_algebra import product_size
from strategies.core.protocol import Aggregate, ClientState

CLOSE = 1e-5
TINY = 1e-6


def it_travels_and_says_what_it_is(case: Case) -> None:
    """It is a frozen dataclass that pickles, with a docstring, a paper, and declarations that go together."""
    strategy = case.strategy
    hold(pickle.loads(pickle.dumps(strategy)) == strategy, "it is another one after pickling")
    hold(strategy.reads in ("sum", "passes", "each"), f'reads is {strategy.reads!r}, not "sum", "passes" or "each"')
    hold(bool(strategy.paper and strategy.__doc__), "it has no docstring, or its paper is empty")
    for name in ("mixed_ranks", "merges_into_base", "sends_products"):
        hold(strategy.needs_lora or not getattr(strategy, name), f"{name} is True, which needs_lora must be too")
    try:
        strategy.kind = "other"  # type: ignore[attr-defined]  # the protocol leaves the tag to each member
    except FrozenInstanceError:
        return
    raise AssertionError("its fields can be changed: write @dataclass(frozen=True)")


def it_reads_no_more_than_it_says(case: Case) -> None:
    """`reads` is honest: a rule that says "sum" gives the same from the sum alone as with each update beside it."""
    if case.strategy.reads != "sum":
        raise DoesNotApply(f'reads is "{case.strategy.reads}": it says that the sum is not enough')
    state, client_states = case.after(2)
    updates, _ = case.cohort(state, client_states)
    blind = case.aggregate(updates)
    seeing = replace(blind, each=tuple(updates))
    without, with_each = case.strategy.apply(state, blind), case.strategy.apply(state, seeing)
    same(without, with_each, 'reads is "sum", but the next state depends on the single updates')


def client_state_is_kept_where_the_class_says_so_and_is_used(case: Case) -> None:
    """`keeps_state` is honest: without it no client keeps anything, with it what is kept changes what a client does."""
    strategy, (state, client_states) = case.strategy, case.after(2)
    broadcast = strategy.broadcast(state)
    if not strategy.keeps_state:
        hold(not any(client_states), "clients keep state, but keeps_state is False")
        hold(strategy.personal(broadcast, {}) is None, "there is a personal model, but keeps_state is False")
        return
    hold(all(client_states), "keeps_state is True, but clients keep nothing")

    def visible(client: int, client_state: ClientState) -> object:
        corrected = torch.ones(1, case.layout.size)
        for run in (starts := strategy.starts(broadcast, client_state)):
            strategy.correct(corrected, drawn(case.layout, 1)[None], broadcast, client_state, run)
        update, _ = case.client(broadcast, client, client_state, drawn(case.layout, 9, client))
        return starts, corrected, update, strategy.personal(broadcast, client_state)

    pairs = zip(case.clients, client_states, strict=True)
    used = any(difference(visible(k, client_state), visible(k, {})) for k, client_state in pairs)
    hold(used, "what clients keep changes nothing that they do")


def gradients_are_corrected_only_where_the_class_says_so(case: Case) -> None:
    """`corrects` is honest: without it `correct` leaves every gradient as it is."""
    if case.strategy.corrects:
        raise DoesNotApply("corrects is True: it may change gradients")
    state, client_states = case.after(2)
    broadcast, grad_1P = case.strategy.broadcast(state), drawn(case.layout, 3)[None]
    for run in case.strategy.starts(broadcast, client_states[0]):
        corrected_1P = grad_1P.clone()
        case.strategy.correct(corrected_1P, drawn(case.layout, 1)[None], broadcast, client_states[0], run)
        same(corrected_1P, grad_1P, f"corrects is False, but correct changes the gradient of the training {run!r}")


def something_is_sent_where_the_class_says_so(case: Case) -> None:
    """`sends_update` is honest: whether any update, or any sum beside it, is not zero."""
    state, client_states = case.after(1)
    updates, _ = case.cohort(state, client_states)
    sends = any(bool(sent.any()) for update in updates for sent in (update.delta, *update.extras.values()))
    declared = case.strategy.sends_update
    hold(sends == declared, f"sends_update is {declared}, but clients send {'changes' if sends else 'zeros'}")


def products_are_sent_where_the_class_says_so(case: Case) -> None:
    """`sends_products` is honest: a sum as long as all products is declared, and what is declared is sent."""
    beside, declared = case.strategy.beside(case.layout), case.strategy.sends_products
    if declared:
        hold(bool(beside), "sends_products is True, but clients send nothing beside the update")
    elif case.layout is LORA:
        products = [name for name, length in beside.items() if length == product_size(LORA)]
        hold(not products, f"clients send products in {', '.join(products)}, but sends_products is False")


def the_base_changes_where_the_class_says_so(case: Case) -> None:
    """`merges_into_base` is honest: after rounds of changes there is a merged delta, or none."""
    merges, declared = case.after(2)[0].merged_delta is not None, case.strategy.merges_into_base
    hold(merges == declared, f"merges_into_base is {declared}, but there is {'a' if merges else 'no'} merged delta")


def the_basis_stays_where_the_class_says_so(case: Case) -> None:
    """`keeps_basis` is honest: the same coordinates are live in all rounds, and a tiny change is a tiny move."""
    strategy = case.strategy
    if not strategy.keeps_basis:
        raise DoesNotApply("keeps_basis is False: coordinates may change their meaning")
    live = [strategy.live(round_, case.layout) for round_ in range(3)]
    for later in live[1:]:
        same(later, live[0], "keeps_basis is True, but rounds differ in what is live")
    state = case.start()
    updates, _ = case.cohort(state, case.no_client_states())
    moved = strategy.apply(state, _tiny(case, case.aggregate(updates))).params
    apart = float((moved - state.params).abs().max())
    hold(apart < 0.1, f"keeps_basis is True, but a change of about {TINY:g} moves the vector by {apart:.2g}")


def _tiny(case: Case, aggregate: Aggregate) -> Aggregate:
    """The aggregate of the same changes, multiplied by TINY."""
    each = aggregate.each and tuple(replace(update, delta=TINY * update.delta) for update in aggregate.each)
    extras = aggregate.extras
    if case.strategy.extras_are_changes:
        extras = {name: TINY * extra for name, extra in extras.items()}
    return replace(aggregate, total=TINY * aggregate.total, extras=extras, each=each)


def weights_are_as_the_class_says(case: Case) -> None:
    """`bounded_weights` and `weighs_alike` are honest: weights of at most 1 stay from 0 to 1, or become 1."""
    strategy = case.strategy
    if not strategy.bounded_weights:
        hold(not strategy.weighs_alike, "weighs_alike is True, but bounded_weights is False")
        raise DoesNotApply("bounded_weights is False")
    state, client_states = case.after(2)
    broadcast = strategy.broadcast(state)
    for client in range(5):  # their weights are 0.5 to 1, their losses above 1
        update, _ = case.client(broadcast, client, client_states[client], 1e3 * drawn(case.layout, 9, client))
        hold(0 <= update.weight <= 1, f"bounded_weights is True, but finish makes the weight {update.weight:g}")
        alike = update.weight == 1 or not strategy.weighs_alike
        hold(alike, f"weighs_alike is True, but finish makes the weight {update.weight:g}")


def extras_that_are_changes_are_zero_without_training(case: Case) -> None:
    """`extras_are_changes` is honest: a client whose training changed nothing sends zeros beside its delta."""
    if not case.strategy.extras_are_changes:
        raise DoesNotApply("extras_are_changes is False")
    for rounds in (0, 2):
        state, client_states = case.after(rounds)
        updates, _ = case.cohort(state, client_states, scale=0.0)
        moved = sorted({name for update in updates for name, extra in update.extras.items() if extra.any()})
        hold(not moved, f"extras_are_changes is True, but clients that have not trained send {', '.join(moved)}")


def an_untrained_client_rests_at_zero_where_the_class_says_so(case: Case) -> None:
    """`rests_at_zero` is honest: momentum on the server or state on the client sends nothing by itself."""
    if not case.strategy.rests_at_zero:
        raise DoesNotApply("rests_at_zero is False")
    for rounds in (0, 2):
        updates, _ = case.cohort(*case.after(rounds), scale=0.0)
        moved = any(update.delta.any() for update in updates)
        hold(not moved, "rests_at_zero is True, but clients that have not trained send a change")


def a_client_of_a_lower_rank_trains_and_leaves_only_its_own(case: Case) -> None:
    """`mixed_ranks` is honest: beyond a client's rank A and B are zero, and s_k B_k A_k is the cut global product."""
    strategy = case.strategy
    if not strategy.mixed_ranks or case.layout is not LORA:
        raise DoesNotApply("mixed_ranks is False" if not strategy.mixed_ranks else "there are no adapters")
    state = case.after(1)[0]
    broadcast = replace(strategy.broadcast(state), rank=1)
    (start,) = strategy.starts(broadcast, {}).values()
    for cut, whole in zip(LORA.lora_pairs(start), LORA.lora_pairs(broadcast.params), strict=True):
        empty = not cut.a_RI[1:].any() and not cut.b_OR[:, 1:].any()
        hold(empty, "a client of rank 1 starts with more than the first row of A and column of B")
        expected, product = LORA.scale * whole.b_OR[:, :1] @ whole.a_RI[:1], LORA.scale_at(1) * cut.b_OR @ cut.a_RI
        hold(torch.allclose(product, expected, rtol=CLOSE, atol=CLOSE), "alpha / rank is not folded into the product")
    (down, up), (down_2, up_2) = (strategy.floats(replace(broadcast, rank=rank)) for rank in (1, 2))
    fewer = down <= down_2 and up <= up_2 and (down, up) != (down_2, up_2)
    hold(fewer, "floats does not count less traffic for a client of a lower rank")
    still = torch.zeros(LORA.size)
    mixed = [case.client(replace(broadcast, rank=1 + k % 2), k, {}, still)[0] for k in case.clients]
    hold(strategy.apply(state, case.aggregate(mixed)).round == 2, "apply on mixed ranks does not count the round")


def an_untrained_client_of_a_lower_rank_sends_zeros(case: Case) -> None:
    """`keeps_higher_ranks` is honest: also what lies beyond the client's own rank stays as it is."""
    if not case.strategy.keeps_higher_ranks or case.layout is not LORA:
        raise DoesNotApply("keeps_higher_ranks is False" if case.layout is LORA else "there are no adapters")
    for rounds in (0, 2):
        broadcast = replace(case.strategy.broadcast(case.after(rounds)[0]), rank=1)
        update, _ = case.client(broadcast, 0, {}, torch.zeros(LORA.size))
        moved = ", ".join(name for name, sent in {"delta": update.delta, **update.extras}.items() if sent.any())
        hold(not moved, f"keeps_higher_ranks is True, but an untrained client of rank 1 sends {moved}")
