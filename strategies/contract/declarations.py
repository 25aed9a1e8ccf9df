"""The part of the contract on what a class declares: the engine checks recipes by it, so it must be true."""

import pickle
from contextlib import suppress
from dataclasses import FrozenInstanceError, replace
from typing import Any

import torch

from strategies.contract.case import LORA, Case, difference, drawn, hold, only_where, same
from strategies.core.protocol import ClientState

TINY = 1e-6


def it_travels_and_says_what_it_is(case: Case) -> None:
    """It is a frozen dataclass that pickles, with a docstring, a paper, and declarations that go together."""
    strategy: Any = case.strategy  # Rule leaves the tag `kind` to its members
    hold(pickle.loads(pickle.dumps(strategy)) == strategy, "it is another one after pickling")
    hold(strategy.reads in ("sum", "passes", "each"), f'reads is {strategy.reads!r}, not "sum", "passes" or "each"')
    hold(bool(strategy.paper and strategy.__doc__), "it has no docstring, or its paper is empty")
    for name in ("mixed_ranks", "merges_into_base", "sends_products"):
        hold(strategy.needs_lora or not getattr(strategy, name), f"{name} is True, which needs_lora must be too")
    with suppress(FrozenInstanceError):
        strategy.kind = "other"
        raise AssertionError("its fields can be changed: write @dataclass(frozen=True)")


def what_happens_is_what_the_class_says(case: Case) -> None:
    """`personalizes`, `sends_update` and `merges_into_base` are honest: what they say happens, and nothing else."""
    strategy, now = case.strategy, case.after(2)
    sent = [sums for update in now.updates for sums in (update.delta, *update.extras.values())]
    models = [strategy.personal(now.broadcast, client_state) for client_state in now.client_states]
    personal, sends = any(vector is not None for vector in models), any(bool(sums.any()) for sums in sent)
    for name, happens, yes, no in (
        ("personalizes", personal, "clients have models of their own", "no client has a model of its own"),
        ("sends_update", sends, "clients send changes", "clients send zeros"),
        ("merges_into_base", now.state.merged_delta is not None, "there is a merged delta", "there is no merged delta"),
    ):
        declared = getattr(strategy, name)
        hold(declared == happens, f"{name} is {declared}, but {yes if happens else no}")


def it_reads_no_more_than_it_says(case: Case) -> None:
    """`reads` is honest: a rule that says "sum" gives the same from the sum alone as with each update beside it."""
    only_where(case.strategy.reads == "sum", f'reads is "{case.strategy.reads}": it says that the sum is not enough')
    now = case.after(2)
    blind, seeing = now.aggregate, replace(now.aggregate, each=tuple(now.updates))
    without, with_each = (case.strategy.apply(now.state, aggregate) for aggregate in (blind, seeing))
    same(without, with_each, 'reads is "sum", but the next state depends on the single updates')


def client_state_is_kept_where_the_class_says_so_and_is_used(case: Case) -> None:
    """`keeps_state` is honest: without it no client keeps anything, with it what is kept changes what a client does."""
    strategy, now = case.strategy, case.after(2)
    broadcast = now.broadcast
    if not strategy.keeps_state:
        hold(not any(now.client_states), "clients keep state, but keeps_state is False")
        hold(strategy.personal(broadcast, {}) is None, "there is a personal model, but keeps_state is False")
        return
    hold(all(now.client_states), "keeps_state is True, but clients keep nothing")

    def visible(client: int, client_state: ClientState) -> object:
        corrected = torch.ones(1, case.layout.size)
        for model in (starts := strategy.starts(broadcast, client_state)):
            strategy.correct(corrected, drawn(case.layout, 1)[None], broadcast, client_state, model)
        update, _ = case.client(broadcast, client, client_state, drawn(case.layout, 9, client))
        return starts, corrected, update, strategy.personal(broadcast, client_state)

    used = any(difference(visible(k, now.client_states[k]), visible(k, {})) for k in case.clients)
    hold(used, "what clients keep changes nothing that they do")


def gradients_are_corrected_only_where_the_class_says_so(case: Case) -> None:
    """`corrects` is honest: without it `correct` leaves every gradient as it is."""
    only_where(not case.strategy.corrects, "corrects is True: it may change gradients")
    now, grad_1P = case.after(2), drawn(case.layout, 3)[None]
    for model in case.strategy.starts(now.broadcast, now.client_states[0]):
        corrected_1P = grad_1P.clone()
        case.strategy.correct(corrected_1P, drawn(case.layout, 1)[None], now.broadcast, now.client_states[0], model)
        same(corrected_1P, grad_1P, f"corrects is False, but correct changes the gradient of the training {model!r}")


def products_are_sent_where_the_class_says_so(case: Case) -> None:
    """`sends_products` is honest: a sum as long as all products is declared, and what is declared is sent."""
    beside, declared = case.strategy.beside(case.layout), case.strategy.sends_products
    if declared:
        hold(bool(beside), "sends_products is True, but clients send nothing beside the update")
    elif case.layout is LORA:
        products = [name for name, length in beside.items() if length == LORA.product_size]
        hold(not products, f"clients send products in {', '.join(products)}, but sends_products is False")


def the_basis_stays_where_the_class_says_so(case: Case) -> None:
    """`keeps_basis` is honest: the same coordinates are sent in all rounds, and a tiny change is a tiny move."""
    strategy = case.strategy
    only_where(strategy.keeps_basis, "keeps_basis is False: coordinates may change their meaning")
    only_where(not strategy.searches, "searches is True: it moves by the order of losses")
    for round_ in (1, 2):
        sent_masks, first = strategy.sent_masks(round_, case.layout), strategy.sent_masks(0, case.layout)
        same(sent_masks, first, "keeps_basis is True, but rounds differ in what is sent")
    now = case.after(0)
    aggregate, factor = now.aggregate, TINY if strategy.extras_are_changes else 1.0
    each = aggregate.each and tuple(replace(update, delta=TINY * update.delta) for update in aggregate.each)
    extras = {name: factor * extra for name, extra in aggregate.extras.items()}
    tiny = replace(aggregate, total=TINY * aggregate.total, extras=extras, each=each)
    apart = float((strategy.apply(now.state, tiny).params - now.state.params).abs().max())
    hold(apart < 0.1, f"keeps_basis is True, but a change of about {TINY:g} moves the vector by {apart:.2g}")


def coordinates_are_picked_only_where_the_class_says_so(case: Case) -> None:
    """`picks_coordinates` is honest: trainings that differ everywhere send other numbers wherever they send any."""
    only_where(not case.strategy.picks_coordinates, "picks_coordinates is True: clients may leave out coordinates")
    only_where(not case.strategy.searches, "searches is True: the order of losses may be the same")
    now = case.after(1)
    changes = [0.01 * drawn(case.layout, 7, k) - now.state.params / 2 for k in range(2)]
    first, second = (case.client(now.broadcast, 0, now.client_states[0], change)[0].delta for change in changes)
    alike = (first == second) & case.strategy.sent_masks(1, case.layout).get("delta", torch.tensor(True))
    hold(not alike.any(), "picks_coordinates is False, but clients whose training differs send the same numbers")


def weights_are_as_the_class_says(case: Case) -> None:
    """`bounded_weights` and `weighs_alike` are honest: weights of at most 1 stay from 0 to 1, or become 1."""
    strategy = case.strategy
    hold(strategy.bounded_weights or not strategy.weighs_alike, "weighs_alike is True, but bounded_weights is False")
    only_where(strategy.bounded_weights, "bounded_weights is False")
    now = case.after(2)
    for client in range(5):  # their weights are 0.5 to 1, their losses above 1
        change = 1e3 * drawn(case.layout, 9, client)
        update, _ = case.client(now.broadcast, client, now.client_states[client], change)
        hold(0 <= update.weight <= 1, f"bounded_weights is True, but finish makes the weight {update.weight:g}")
        alike = update.weight == 1 or not strategy.weighs_alike
        hold(alike, f"weighs_alike is True, but finish makes the weight {update.weight:g}")


def extras_that_are_changes_are_zero_without_training(case: Case) -> None:
    """`extras_are_changes` is honest: a client whose training changed nothing sends zeros beside its delta."""
    only_where(case.strategy.extras_are_changes, "extras_are_changes is False")
    for rounds in (0, 2):
        updates, _ = case.after(rounds).cohort(scale=0.0)
        moved = sorted({name for update in updates for name, extra in update.extras.items() if extra.any()})
        hold(not moved, f"extras_are_changes is True, but clients that have not trained send {', '.join(moved)}")


def an_untrained_client_rests_at_zero_where_the_class_says_so(case: Case) -> None:
    """`rests_at_zero` is honest: momentum on the server or state on the client sends nothing by itself."""
    only_where(case.strategy.rests_at_zero, "rests_at_zero is False")
    for rounds in (0, 2):
        updates, _ = case.after(rounds).cohort(scale=0.0)
        moved = any(update.delta.any() for update in updates)
        hold(not moved, "rests_at_zero is True, but clients that have not trained send a change")


def a_client_of_a_lower_rank_trains_and_leaves_only_its_own(case: Case) -> None:
    """`mixed_ranks` is honest: beyond a client's rank A and B are zero, and s_k B_k A_k is the cut global product."""
    strategy = case.strategy
    only_where(strategy.mixed_ranks, "mixed_ranks is False")
    only_where(case.layout is LORA, "there are no adapters")
    now = case.after(1)
    broadcast = replace(now.broadcast, lora_rank=1)
    (start,) = strategy.starts(broadcast, {}).values()
    for cut, uncut in zip(LORA.lora_pairs(start), LORA.lora_pairs(broadcast.params), strict=True):
        empty = not cut.a_RI[1:].any() and not cut.b_OR[:, 1:].any()
        hold(empty, "a client of rank 1 starts with more than the first row of A and column of B")
        expected, product = LORA.scale * uncut.b_OR[:, :1] @ uncut.a_RI[:1], LORA.scale_at(1) * cut.b_OR @ cut.a_RI
        hold(torch.allclose(product, expected, rtol=1e-5, atol=1e-5), "alpha / rank is not folded into the product")
    (down, up), (down_2, up_2) = (strategy.floats(replace(broadcast, lora_rank=r)) for r in (1, 2))
    fewer = down <= down_2 and up <= up_2 and (down, up) != (down_2, up_2)
    hold(fewer, "floats does not count less traffic for a client of a lower rank")
    still = torch.zeros(LORA.size)
    mixed = [case.client(replace(broadcast, lora_rank=1 + k % 2), k, {}, still)[0] for k in case.clients]
    hold(strategy.apply(now.state, case.aggregate(mixed)).round == 2, "apply on mixed ranks does not count the round")


def an_untrained_client_of_a_lower_rank_sends_zeros(case: Case) -> None:
    """`keeps_higher_ranks` is honest: also what lies beyond the client's own rank stays as it is."""
    only_where(case.layout is LORA, "there are no adapters")
    only_where(case.strategy.keeps_higher_ranks, "keeps_higher_ranks is False")
    for rounds in (0, 2):
        broadcast = replace(case.after(rounds).broadcast, lora_rank=1)
        update, _ = case.client(broadcast, 0, {}, torch.zeros(LORA.size))
        moved = ", ".join(name for name, sent in {"delta": update.delta, **update.extras}.items() if sent.any())
        hold(not moved, f"keeps_higher_ranks is True, but an untrained client of rank 1 sends {moved}")


def a_search_is_honest(case: Case) -> None:
    """A searching rule says what it needs of the base and tunes; it sends what `beside` says, and reads its scores."""
    strategy = case.strategy
    only_where(strategy.searches, "searches is False: clients train")
    hold(strategy.access is not None, "access is None: say what the scores take, such as score or inject")
    hold(bool(strategy.tunes), "tunes is empty: name the kinds of model.peft that it searches")
    now = case.after(1)
    asked = list[int]()

    def score(candidates_CP: torch.Tensor) -> tuple[torch.Tensor, float]:
        asked.append(len(candidates_CP))
        fits = candidates_CP.ndim == 2 and candidates_CP.shape[1] == case.layout.size
        hold(fits and candidates_CP.dtype == torch.float32, "it asks for scores of something else than (C, P) float32")
        return torch.arange(len(candidates_CP), dtype=torch.float64), 1.0

    delta, beside = strategy.search(0, now.broadcast, now.client_states[0], score)
    hold(bool(asked), "search asks for no score")
    lengths = {name: vector.numel() for name, vector in beside.items()}
    hold(lengths == strategy.beside(case.layout), f"search sends {lengths} beside the delta, beside says other sums")
    hold(delta.shape == (case.layout.size,), "the change that search gives is no vector of the layout's size")
