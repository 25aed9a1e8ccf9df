"""The part of the contract on a strategy's server half. Legend: P parameters, K clients."""

from dataclasses import replace

import torch

from strategies.contract.case import SEED, Case, copied, difference, drawn, hold, only_where, same, tensors
from strategies.core.protocol import NO_LAYOUT, ServerState, Vector

CLOSE = 1e-5


def no_change_leaves_the_model_alone(case: Case) -> None:
    """With zero deltas, moments and client states the effective weights W0 + s B A stay as they are."""
    only_where(not case.strategy.searches, "searches is True: candidates may all be as good")
    now = case.after(0)
    after = case.strategy.apply(now.state, case.aggregate(now.cohort(scale=0.0)[0]))
    if not case.strategy.needs_lora:
        same(after.params, now.state.params, "apply moves the vector although no client changed it")
    _near(case, after, now.state, "apply moves the model although no client changed it")


def the_first_state_is_the_model_as_it_was_given(case: Case) -> None:
    """init gives round 0, its layout, and the model that it is given."""
    first = case.start()
    hold(first.round == 0, f"init gives round {first.round}, not 0")
    hold(first.layout == case.layout, "init does not put its layout into the state")
    _near(case, first, ServerState(0, drawn(case.layout, 0), layout=case.layout), "init changes the model")


def _near(case: Case, left: ServerState, right: ServerState, what: str) -> None:
    apart = [float((a - b).abs().max()) for a, b in zip(case.effective(left), case.effective(right), strict=True)]
    hold(max(apart) <= CLOSE, f"{what}: the effective weights are {max(apart):.2g} apart")


def a_change_moves_the_model_or_what_clients_keep(case: Case) -> None:
    """A round in which clients learn something leaves a trace."""
    before, now = case.start(), case.after(1)
    moved = difference((now.state.params, now.state.merged_delta), (before.params, before.merged_delta)) is not None
    trace = moved or any(now.client_states)
    hold(trace, "after a round of changes the model is as before and no client keeps anything")


def the_order_of_clients_is_irrelevant(case: Case) -> None:
    """The same updates in another order give the same bits."""
    now = case.after(2)
    forward, backward = (case.aggregate(listed) for listed in (now.updates, now.updates[::-1]))
    what = "the order in which updates come changes the next state"
    same(case.strategy.apply(now.state, forward), case.strategy.apply(now.state, backward), what)


def rounds_count_up_by_one(case: Case) -> None:
    """apply counts the rounds, and broadcast says which one it is."""
    counted = [case.after(rounds).state.round for rounds in range(4)]
    hold(counted == [0, 1, 2, 3], f"the rounds are counted {counted}, not [0, 1, 2, 3]: apply must add one to round")
    said = case.after(2).broadcast.round
    hold(said == 2, f"broadcast says round {said} in round 2")


def what_the_engine_sets_stays_and_the_layout_is_passed_on(case: Case) -> None:
    """apply keeps layout, seed and population; broadcast carries the layout and the seed."""
    first, now = case.start(), case.after(2)
    kept = (now.state.layout, now.state.seed, now.state.population) == (case.layout, SEED, first.population)
    hold(kept, "apply loses the state's layout, seed or population: use dataclasses.replace(state, ...)")
    passed_on = (now.broadcast.layout, now.broadcast.seed) == (case.layout, SEED)
    hold(passed_on, "broadcast does not pass on the state's layout and seed")


def a_round_is_the_same_when_it_is_run_again(case: Case) -> None:
    """Two runs from the same start end in the same bits, states and client states."""
    first, second = ((now.state, now.client_states) for now in (case.after(2), case.after(2)))
    same(first, second, "a run that is repeated ends elsewhere: draw by strategies.core.seeds alone")


def the_server_side_leaves_its_inputs_unmodified(case: Case) -> None:
    """init, broadcast and apply write into nothing that they are given."""
    params = drawn(case.layout, 0)
    case.strategy.init(params, case.layout)
    same(params, drawn(case.layout, 0), "init writes into the vector that it is given")
    now = case.after(2)
    before, aggregate = copied(now.state), now.aggregate
    same(now.state, before, "broadcast, or a client's half, writes into the state")
    aggregate_before = copied(aggregate)
    case.strategy.apply(now.state, aggregate)
    same(now.state, before, "apply writes into the state that it is given")
    same(aggregate, aggregate_before, "apply writes into the aggregate")


def what_travels_is_flat_contiguous_and_float32(case: Case) -> None:
    """States, broadcasts, updates and client states are vectors as one put, one sum and one mask need them."""
    now = case.after(2)
    state, broadcast, (updates, client_states) = now.state, now.broadcast, now.cohort()
    starts = case.strategy.starts(broadcast, client_states[0])
    for name, tensor in tensors((state, broadcast, updates, client_states, starts)).items():
        flat = tensor.dtype == torch.float32 and tensor.ndim == 1 and tensor.is_contiguous()
        hold(flat, f"{name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, not one contiguous float32 vector")
    fits = state.params.shape == broadcast.params.shape == updates[0].delta.shape == (case.layout.size,)
    hold(fits, f"params and delta must keep the layout's {case.layout.size} elements")
    if state.merged_delta is not None:
        length, expected = state.merged_delta.numel(), case.layout.product_size
        hold(length == expected, f"the merged delta has {length} elements; the layout's products have {expected}")


def the_state_survives_a_checkpoint(case: Case) -> None:
    """A state that was written to disk and read again is the same, bit by bit."""
    state = case.after(2).state
    loaded = case.stored(state)
    hold(loaded.round == state.round, f"round {state.round} comes back from a checkpoint as {loaded.round}")
    same(loaded, copied(state), "the state does not survive a checkpoint")


def shards_are_worked_on_as_the_whole(case: Case) -> None:
    """`elementwise` is honest: broadcast, correct, finish and apply on parts of the vectors give parts of the whole."""
    strategy, now, size = case.strategy, case.after(2), case.layout.size
    only_where(strategy.elementwise, "elementwise is False: it needs whole vectors")
    aggregate, change, grad = now.aggregate, drawn(case.layout, 5), drawn(case.layout, 6)[None]

    def results(place: slice) -> dict[str, torch.Tensor]:
        def cut(named: dict[str, Vector]) -> dict[str, Vector]:
            return {name: vector[place] if vector.numel() == size else vector for name, vector in named.items()}

        moments, client_state = cut(now.state.moments), cut(now.client_states[0])
        state = replace(now.state, params=now.state.params[place], moments=moments, layout=NO_LAYOUT)
        broadcast = strategy.broadcast(state)
        grads = {model: grad[:, place].clone() for model in strategy.starts(broadcast, client_state)}
        for model, grad_KP in grads.items():
            strategy.correct(grad_KP, broadcast.params[None] + change[place], broadcast, client_state, model)
        update, kept = case.client(broadcast, 0, client_state, change[place])
        each = aggregate.each and tuple(replace(x, delta=x.delta[place], extras=cut(x.extras)) for x in aggregate.each)
        seen = replace(aggregate, total=aggregate.total[place], extras=cut(aggregate.extras), each=each)
        after = strategy.apply(state, seen)
        return tensors({"gradient": grads, "update": update, "client state": kept, "next state": after})

    first, second, uncut = results(slice(0, 4)), results(slice(4, size)), results(slice(0, size))
    for name, tensor in uncut.items():
        joined = torch.cat([first[name], second[name]], dim=-1) if tensor.numel() == size else first[name]
        same(joined, tensor, f"elementwise is True, but parts of the vectors give another {name!r} than the whole")
