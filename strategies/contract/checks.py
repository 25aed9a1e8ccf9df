"""What every strategy promises, a check for each promise: shipped rules and users' own are held to all of them.

A check is a function of a `Case`; its docstring is the promise. It raises AssertionError with a sentence where the
promise is broken, and DoesNotApply where the strategy does not make it. Legend: P parameters, K clients.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from strategies.contract import client, declarations
from strategies.contract.case import SEED, Case, DoesNotApply, copied, difference, drawn, hold, same, tensors
from strategies.core.lora_algebra import product_size
from strategies.core.protocol import NO_LAYOUT, ServerState, Strategy, Vector

Check = Callable[[Case], None]
CLOSE = 1e-5
RENAMED = {"remembers": "keeps_state", "personalises": "personalizes"}


def lacks(kind: type) -> list[str]:
    """The names of the members of `Strategy` that a class does not define, or defines under an old name."""
    members = [*Strategy.__annotations__, *(name for name in vars(Strategy) if not name.startswith("_"))]
    defined = set(dir(kind)) - getattr(kind, "__abstractmethods__", frozenset())
    renamed = [f"{name} (it defines the old {old})" for old, name in RENAMED.items() if old in defined]
    return [name for name in members if name not in defined] + renamed


def _near(case: Case, left: ServerState, right: ServerState, what: str) -> None:
    apart = [float((a - b).abs().max()) for a, b in zip(case.effective(left), case.effective(right), strict=True)]
    hold(max(apart) <= CLOSE, f"{what}: the effective weights are {max(apart):.2g} apart")


def no_change_leaves_the_model_alone(case: Case) -> None:
    """With zero deltas, moments and client states the effective weights W0 + s B A stay as they are."""
    state = case.start()
    updates, _ = case.cohort(state, case.no_client_states(), scale=0.0)
    after = case.strategy.apply(state, case.aggregate(updates))
    if not case.strategy.needs_lora:
        same(after.params, state.params, "apply moves the vector although no client changed it")
    _near(case, after, state, "apply moves the model although no client changed it")


def the_first_state_is_the_model_as_it_was_given(case: Case) -> None:
    """init gives round 0, its layout, and the model that it is given."""
    first = case.start()
    hold(first.round == 0, f"init gives round {first.round}, not 0")
    hold(first.layout == case.layout, "init does not put its layout into the state")
    _near(case, first, ServerState(0, drawn(case.layout, 0), layout=case.layout), "init changes the model")


def a_change_moves_the_model_or_what_clients_keep(case: Case) -> None:
    """A round in which clients learn something leaves a trace."""
    before, (after, client_states) = case.start(), case.after(1)
    moved = difference((after.params, after.merged_delta), (before.params, before.merged_delta)) is not None
    hold(moved or any(client_states), "after a round of changes the model is as before and no client keeps anything")


def the_order_of_clients_is_irrelevant(case: Case) -> None:
    """The same updates in another order give the same bits."""
    state, client_states = case.after(2)
    updates, _ = case.cohort(state, client_states)
    forward, backward = (case.strategy.apply(state, case.aggregate(listed)) for listed in (updates, updates[::-1]))
    same(forward, backward, "the order in which updates come changes the next state")


def rounds_count_up_by_one(case: Case) -> None:
    """apply counts the rounds, and broadcast says which one it is."""
    counted = [case.after(rounds)[0].round for rounds in range(4)]
    hold(counted == [0, 1, 2, 3], f"the rounds are counted {counted}, not [0, 1, 2, 3]: apply must add one to round")
    said = case.strategy.broadcast(case.after(2)[0]).round
    hold(said == 2, f"broadcast says round {said} in round 2")


def what_the_engine_sets_stays_and_the_layout_is_passed_on(case: Case) -> None:
    """apply keeps layout, seed and population; broadcast carries the layout and the seed."""
    state, _ = case.after(2)
    kept = (state.layout, state.seed, state.population) == (case.layout, SEED, case.population)
    hold(kept, "apply loses the state's layout, seed or population: use dataclasses.replace(state, ...)")
    broadcast = case.strategy.broadcast(state)
    hold(
        (broadcast.layout, broadcast.seed) == (case.layout, SEED),
        "broadcast does not pass on the state's layout and seed",
    )


def a_round_is_the_same_when_it_is_run_again(case: Case) -> None:
    """Two runs from the same start end in the same bits, states and client states."""
    same(case.after(2), case.after(2), "a run that is repeated ends elsewhere: draw by strategies.core.seeds alone")


def the_server_side_leaves_its_inputs_unmodified(case: Case) -> None:
    """init, broadcast and apply write into nothing that they are given."""
    params = drawn(case.layout, 0)
    case.strategy.init(params, case.layout)
    same(params, drawn(case.layout, 0), "init writes into the vector that it is given")
    state, client_states = case.after(2)
    before = copied(state)
    updates, _ = case.cohort(state, client_states)
    same(state, before, "broadcast, or a client's half, writes into the state")
    aggregate = case.aggregate(updates)
    aggregate_before = copied(aggregate)
    case.strategy.apply(state, aggregate)
    same(state, before, "apply writes into the state that it is given")
    same(aggregate, aggregate_before, "apply writes into the aggregate")


def what_travels_is_flat_contiguous_and_float32(case: Case) -> None:
    """States, broadcasts, updates and client states are vectors as one put, one sum and one mask need them."""
    state, client_states = case.after(2)
    broadcast = case.strategy.broadcast(state)
    updates, client_states = case.cohort(state, client_states)
    for name, tensor in tensors(
        (state, broadcast, updates, client_states, case.strategy.starts(broadcast, client_states[0]))
    ).items():
        flat = tensor.dtype == torch.float32 and tensor.ndim == 1 and tensor.is_contiguous()
        hold(flat, f"{name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, not one contiguous float32 vector")
    size = (case.layout.size,)
    whole = state.params.shape == broadcast.params.shape == updates[0].delta.shape == size
    hold(whole, f"params and delta must keep the layout's {case.layout.size} elements")
    if state.merged_delta is not None:
        length, expected = state.merged_delta.numel(), product_size(case.layout)
        hold(length == expected, f"the merged delta has {length} elements; the layout's products have {expected}")


def the_state_survives_a_checkpoint(case: Case) -> None:
    """A state that was written to disk and read again is the same, bit by bit."""
    state, _ = case.after(2)
    loaded = case.stored(state)
    hold(loaded.round == state.round, f"round {state.round} comes back from a checkpoint as {loaded.round}")
    same(loaded, copied(state), "the state does not survive a checkpoint")


def shards_are_applied_as_the_whole(case: Case) -> None:
    """`elementwise` is honest: apply on parts of the vectors gives the parts of apply on the whole."""
    if not case.strategy.elementwise:
        raise DoesNotApply("elementwise is False: it needs whole vectors")
    state, client_states = case.after(2)
    aggregate, size = case.aggregate(case.cohort(state, client_states)[0]), case.layout.size

    def shard(part: slice) -> ServerState:
        each = aggregate.each and tuple(
            replace(update, delta=update.delta[part], extras=_part(update.extras, part, size))
            for update in aggregate.each
        )
        shard_state = replace(state, params=state.params[part], moments=_part(state.moments, part, size))
        seen = replace(aggregate, total=aggregate.total[part], extras=_part(aggregate.extras, part, size), each=each)
        return case.strategy.apply(shard_state, seen)

    first, second, whole = shard(slice(0, 4)), shard(slice(4, size)), case.strategy.apply(state, aggregate)
    joined = torch.cat([first.params, second.params])
    same(joined, whole.params, "elementwise is True, but apply on parts of the vector differs from apply on the whole")
    for name, moment in whole.moments.items():
        parts = [first.moments[name], second.moments[name]]
        joined = torch.cat(parts) if moment.numel() == size else parts[0]
        same(joined, moment, f"elementwise is True, but the moment {name!r} of the parts differs from the whole's")


def clients_work_on_shards_as_on_the_whole(case: Case) -> None:
    """`elementwise` is honest on the client too: broadcast, correct and finish on parts give the parts of the whole."""
    if not case.strategy.elementwise:
        raise DoesNotApply("elementwise is False: it needs whole vectors")
    state, client_states = case.after(2)
    size, change, grad = case.layout.size, drawn(case.layout, 5), drawn(case.layout, 6)[None]

    def half(part: slice) -> list[dict[str, Vector]]:
        moments = _part(state.moments, part, size)
        shard_state = replace(state, params=state.params[part], moments=moments, layout=NO_LAYOUT)
        broadcast, client_state = case.strategy.broadcast(shard_state), _part(client_states[0], part, size)
        grads = {run: grad[:, part].clone() for run in case.strategy.starts(broadcast, client_state)}
        for run, grad_KP in grads.items():
            case.strategy.correct(grad_KP, broadcast.params[None] + change[part], broadcast, client_state, run)
        update, after = case.client(broadcast, 0, client_state, change[part])
        return [{run: grad_KP[0] for run, grad_KP in grads.items()}, {"delta": update.delta} | update.extras, after]

    first, second, whole = half(slice(0, 4)), half(slice(4, size)), half(slice(0, size))
    for ours, theirs, both in zip(first, second, whole, strict=True):
        for name, vector in both.items():
            joined = torch.cat([ours[name], theirs[name]]) if vector.numel() == size else ours[name]
            same(joined, vector, f"elementwise is True, but a client that works on parts has another {name!r}")


def _part(named: dict[str, Vector], part: slice, size: int) -> dict[str, Vector]:
    return {name: tensor[part] if tensor.numel() == size else tensor for name, tensor in named.items()}


CHECKS: tuple[Check, ...] = (
    no_change_leaves_the_model_alone,
    the_first_state_is_the_model_as_it_was_given,
    a_change_moves_the_model_or_what_clients_keep,
    the_order_of_clients_is_irrelevant,
    rounds_count_up_by_one,
    what_the_engine_sets_stays_and_the_layout_is_passed_on,
    a_round_is_the_same_when_it_is_run_again,
    the_server_side_leaves_its_inputs_unmodified,
    client.the_client_side_writes_nothing_but_its_gradient,
    client.what_is_frozen_is_neither_sent_nor_trained,
    client.lanes_are_corrected_as_single_clients,
    what_travels_is_flat_contiguous_and_float32,
    client.the_global_training_comes_first,
    client.a_personal_vector_is_like_the_global_one,
    client.the_traffic_is_counted_in_whole_numbers,
    the_state_survives_a_checkpoint,
    shards_are_applied_as_the_whole,
    clients_work_on_shards_as_on_the_whole,
    declarations.it_reads_no_more_than_it_says,
    declarations.client_state_is_kept_where_the_class_says_so_and_is_used,
    declarations.gradients_are_corrected_only_where_the_class_says_so,
    declarations.something_is_sent_where_the_class_says_so,
    declarations.products_are_sent_where_the_class_says_so,
    declarations.the_base_changes_where_the_class_says_so,
    declarations.the_basis_stays_where_the_class_says_so,
    declarations.weights_are_as_the_class_says,
    declarations.a_client_of_a_lower_rank_trains_and_leaves_only_its_own,
    declarations.extras_that_are_changes_are_zero_without_training,
    declarations.an_untrained_client_rests_at_zero_where_the_class_says_so,
    declarations.an_untrained_client_of_a_lower_rank_sends_zeros,
    declarations.it_travels_and_says_what_it_is,
)
