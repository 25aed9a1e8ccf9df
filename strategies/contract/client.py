"""The part of the contract (see contract.py) that a strategy's client half keeps. Legend: P parameters, K clients."""

from dataclasses import replace

import torch

from strategies.contract.case import LORA, METRICS, Case, DoesNotApply, copied, difference, drawn, hold, same
from strategies.core.protocol import GLOBAL, ClientState, Update

CLOSE = 1e-5


def the_client_side_writes_nothing_but_its_gradient(case: Case) -> None:
    """starts, correct, finish and personal leave all that they are given unmodified, but for correct's gradient."""
    strategy, (state, client_states) = case.strategy, case.after(2)
    broadcast, client_state = strategy.broadcast(state), client_states[4]
    starts = strategy.starts(broadcast, client_state)
    given = (broadcast, client_state, starts)
    given_before = copied(given)
    for run in starts:
        params_KP = torch.stack([drawn(case.layout, 1), drawn(case.layout, 2)])
        params_before = params_KP.clone()
        strategy.correct(torch.ones_like(params_KP), params_KP, broadcast, client_state, run)
        same(params_KP, params_before, "correct writes into the parameters; it may change its gradient alone")

    update = Update(4, 0.5, drawn(case.layout, 5), metrics=dict(METRICS))
    ends = {run: drawn(case.layout, 6, len(run)) for run in starts if run != GLOBAL}
    ends_before = copied(ends)
    sent, _ = strategy.finish(update, broadcast, client_state, ends)
    strategy.personal(broadcast, client_state)
    kept = torch.equal(update.delta, drawn(case.layout, 5)) and update.extras == {} and update.metrics == METRICS
    hold(kept, "finish writes into the update that it is given")
    same(ends, ends_before, "finish writes into the ends of the personal trainings")
    same(given, given_before, "the client's half writes into the broadcast, its memory or its starts")
    hold((sent.client, sent.metrics) == (4, METRICS), "finish changes whose update it is, or its metrics")
    found = {name: extra.numel() for name, extra in sent.extras.items()}
    hold(found == strategy.beside(case.layout), f"finish sends {found} beside the delta, beside says other sums")


def what_is_frozen_is_neither_sent_nor_trained(case: Case) -> None:
    """Updates are zero outside of `live`, and gradients are zero outside of `trained` after `correct`."""
    strategy = case.strategy
    for rounds in range(3):
        state, client_states = case.after(rounds)
        live, broadcast = strategy.live(rounds, case.layout), strategy.broadcast(state)
        for update in case.cohort(state, client_states)[0]:
            sent = {"delta": update.delta, **update.extras}
            hold(live.keys() <= sent.keys(), f"live has masks of {sorted(live)}, a client sends {sorted(sent)}")
            for name, mask in live.items():
                fits = mask.dtype == torch.bool and mask.shape == sent[name].shape
                hold(fits, f"live's mask of {name!r} is not one bool for each of its numbers")
                hold(not sent[name][~mask].any(), f"a client changes coordinates of {name!r} that live calls frozen")
        for run in strategy.starts(broadcast, client_states[0]):
            trained = strategy.trained(broadcast, client_states[0], run)
            if trained is None:
                continue
            fits = trained.dtype == torch.bool and trained.shape == (case.layout.size,)
            hold(fits, "trained is not one bool for each coordinate")
            if not strategy.mixed_ranks:  # whose rows beyond a rank have no gradient to begin with
                grad = torch.ones(1, case.layout.size)
                strategy.correct(grad, drawn(case.layout, 1)[None], broadcast, client_states[0], run)
                hold(not grad[:, ~trained].any(), "correct leaves a gradient where trained says that nothing moves")


def a_pack_is_corrected_as_its_clients_one_by_one(case: Case) -> None:
    """correct on the stacked gradients (K, P) and client_states gives the same bits as on each client's own."""
    for rounds in (0, 2):
        state, client_states = case.after(rounds)
        broadcast, (one, other) = case.strategy.broadcast(state), client_states[:2]
        stacked = {name: torch.stack([one[name], other[name]]) for name in one}
        for run in case.strategy.starts(broadcast, one):
            params_KP = torch.stack([drawn(case.layout, 1), drawn(case.layout, 2)])
            grad_KP = torch.stack([drawn(case.layout, 3), drawn(case.layout, 4)])
            alone = [grad_KP[k : k + 1].clone() for k in range(2)]
            for k, grad_1P in enumerate(alone):
                case.strategy.correct(grad_1P, params_KP[k : k + 1], broadcast, (one, other)[k], run)
            case.strategy.correct(grad_KP, params_KP, broadcast, stacked, run)
            same(grad_KP, torch.cat(alone), f"correct on a pack differs from its clients one by one, training {run!r}")


def the_global_training_comes_first(case: Case) -> None:
    """starts names "global" first, and all that it gives are vectors (P,)."""
    state, client_states = case.after(1)
    for client_state in (ClientState(), client_states[0]):
        starts = case.strategy.starts(case.strategy.broadcast(state), client_state)
        hold(next(iter(starts), None) == GLOBAL, f"starts names {list(starts)}: the first must be {GLOBAL!r}")
        for run, start in starts.items():
            hold(start.shape == (case.layout.size,), f"the start of {run!r} is no vector of the layout's size")


def memory_is_kept_by_those_who_say_so_and_is_used(case: Case) -> None:
    """`keeps_state` is honest: without it no client keeps anything, with it what is kept changes what a client does."""
    strategy, (state, client_states) = case.strategy, case.after(2)
    broadcast = strategy.broadcast(state)
    if not strategy.keeps_state:
        hold(not any(client_states), "clients keep a client_state, but remembers is False")
        hold(strategy.personal(broadcast, {}) is None, "there is a personal model, but remembers is False")
        return
    hold(all(client_states), "keeps_state is True, but clients keep nothing")

    def visible(client: int, client_state: ClientState) -> object:
        corrected = torch.ones(1, case.layout.size)
        for run in (starts := strategy.starts(broadcast, client_state)):
            strategy.correct(corrected, drawn(case.layout, 1)[None], broadcast, client_state, run)
        update, _ = case.client(broadcast, client, client_state, drawn(case.layout, 9, client))
        return starts, corrected, update, strategy.personal(broadcast, client_state)

    used = any(
        difference(visible(k, client_state), visible(k, {}))
        for k, client_state in zip(case.clients, client_states, strict=True)
    )
    hold(used, "what clients remember changes nothing that they do")


def a_personal_vector_is_like_the_global_one(case: Case) -> None:
    """personal gives a float32 vector (P,), or None; `personalizes` says whether it ever gives one."""
    state, client_states = case.after(2)
    broadcast = case.strategy.broadcast(state)
    for client_state in (ClientState(), client_states[0]):
        own = case.strategy.personal(broadcast, client_state)
        like = own is None or (own.shape == broadcast.params.shape and own.dtype == torch.float32)
        hold(like, "personal gives something else than a vector like the global one")
    gives = any(case.strategy.personal(broadcast, client_state) is not None for client_state in client_states)
    hold(
        gives == case.strategy.personalizes,
        f"personalizes is {case.strategy.personalizes}, but it gives {'one' if gives else 'none'}",
    )


def weights_stay_within_one_where_the_class_says_so(case: Case) -> None:
    """`bounded_weights` is honest: finish makes a weight from 0 to 1 of one that is at most 1, whatever was trained."""
    if not case.strategy.bounded_weights:
        raise DoesNotApply("bounded_weights is False")
    state, client_states = case.after(2)
    broadcast = case.strategy.broadcast(state)
    for client in range(5):  # their weights are 0.5 to 1, their losses above 1
        update, _ = case.client(broadcast, client, client_states[client], 1e3 * drawn(case.layout, 9, client))
        hold(0 <= update.weight <= 1, f"bounded_weights is True, but finish makes the weight {update.weight:g}")


def the_traffic_is_counted_in_whole_numbers(case: Case) -> None:
    """floats says how many numbers go down and up, as integers of at least 0."""
    for rounds in range(3):
        counts = case.strategy.floats(case.strategy.broadcast(case.after(rounds)[0]))
        whole = all(isinstance(count, int) and count >= 0 for count in counts) and len(counts) == 2
        hold(whole, f"floats gives {counts} after {rounds} rounds, not two whole numbers of at least 0")


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
        wanted, found = LORA.scale * whole.b_OR[:, :1] @ whole.a_RI[:1], LORA.scale_at(1) * cut.b_OR @ cut.a_RI
        hold(torch.allclose(found, wanted, rtol=CLOSE, atol=CLOSE), "alpha / rank is not folded into the product")
    (down, up), (down_2, up_2) = (strategy.floats(replace(broadcast, rank=rank)) for rank in (1, 2))
    fewer = down <= down_2 and up <= up_2 and (down, up) != (down_2, up_2)
    hold(fewer, "floats does not count less traffic for a client of a lower rank")
    still = torch.zeros(LORA.size)
    mixed = [case.client(replace(broadcast, rank=1 + k % 2), k, {}, still)[0] for k in case.clients]
    hold(strategy.apply(state, case.aggregate(mixed)).round == 2, "apply on mixed ranks does not count the round")


def extras_that_are_changes_are_zero_without_training(case: Case) -> None:
    """`extras_are_changes` is honest: a client whose training changed nothing sends zeros beside its delta."""
    if not case.strategy.extras_are_changes:
        raise DoesNotApply("extras_are_changes is False")
    for rounds in (0, 2):
        state, client_states = case.after(rounds)
        updates, _ = case.cohort(state, client_states, scale=0.0)
        moved = sorted({name for update in updates for name, extra in update.extras.items() if extra.any()})
        hold(not moved, f"extras_are_changes is True, but clients that have not trained send {', '.join(moved)}")


def an_untrained_client_of_a_lower_rank_sends_zeros(case: Case) -> None:
    """`keeps_higher_ranks` is honest: also what lies beyond the client's own rank stays as it is."""
    if not case.strategy.keeps_higher_ranks or case.layout is not LORA:
        raise DoesNotApply("keeps_higher_ranks is False" if case.layout is LORA else "there are no adapters")
    for rounds in (0, 2):
        broadcast = replace(case.strategy.broadcast(case.after(rounds)[0]), rank=1)
        update, _ = case.client(broadcast, 0, {}, torch.zeros(LORA.size))
        moved = [name for name, sent in {"delta": update.delta, **update.extras}.items() if sent.any()]
        hold(
            not moved,
            f"keeps_higher_ranks is True, but a client of rank 1 that has not trained sends {', '.join(moved)}",
        )
