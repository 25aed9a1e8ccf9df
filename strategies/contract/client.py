"""The part of the contract on a strategy's client half. Legend: P parameters, K clients."""

import torch

from strategies.contract.case import METRICS, Case, copied, drawn, hold, same
from strategies.core.protocol import GLOBAL, ClientState, Update


def the_client_side_writes_nothing_but_its_gradient(case: Case) -> None:
    """starts, correct, finish and personal write into nothing that they are given, except for correct's gradient."""
    strategy, now = case.strategy, case.after(2)
    broadcast, client_state = now.broadcast, now.client_states[4]
    starts = strategy.starts(broadcast, client_state)
    given = (broadcast, client_state, starts)
    given_before = copied(given)
    for model in starts:
        params_KP = torch.stack([drawn(case.layout, 1), drawn(case.layout, 2)])
        params_before = params_KP.clone()
        strategy.correct(torch.ones_like(params_KP), params_KP, broadcast, client_state, model)
        same(params_KP, params_before, "correct writes into the parameters; it may change its gradient alone")

    update = Update(4, 0.5, drawn(case.layout, 5), metrics=dict(METRICS))
    ends = {model: drawn(case.layout, 6, len(model)) for model in starts if model != GLOBAL}
    ends_before = copied(ends)
    sent, _ = strategy.finish(update, broadcast, client_state, ends)
    strategy.personal(broadcast, client_state)
    kept = torch.equal(update.delta, drawn(case.layout, 5)) and update.extras == {} and update.metrics == METRICS
    hold(kept, "finish writes into the update that it is given")
    same(ends, ends_before, "finish writes into the ends of the personal trainings")
    same(given, given_before, "the client's half writes into the broadcast, its state or its starts")
    hold((sent.client, sent.metrics) == (4, METRICS), "finish changes whose update it is, or its metrics")
    lengths = {name: extra.numel() for name, extra in sent.extras.items()}
    whole = strategy.searches or lengths == strategy.beside(case.layout)  # what a search sends is not from finish
    hold(whole, f"finish sends {lengths} beside the delta, beside says other sums")


def what_is_frozen_is_neither_sent_nor_trained(case: Case) -> None:
    """Updates are zero outside of `sent_masks`, and gradients outside of `trained_mask` after `correct`."""
    strategy = case.strategy
    for rounds in range(3):
        now = case.after(rounds)
        masks, broadcast, client_state = strategy.sent_masks(rounds, case.layout), now.broadcast, now.client_states[0]
        for update in now.updates:
            sent = {"delta": update.delta, **update.extras}
            hold(masks.keys() <= sent.keys(), f"sent_masks has masks of {sorted(masks)}, a client sends {sorted(sent)}")
            for name, mask in masks.items():
                fits = mask.dtype == torch.bool and mask.shape == sent[name].shape
                hold(fits, f"sent_masks' mask of {name!r} is not one bool for each of its numbers")
                hold(not sent[name][~mask].any(), f"it changes coordinates of {name!r} that sent_masks calls frozen")
        for model in strategy.starts(broadcast, client_state):
            trained_mask = strategy.trained_mask(broadcast, client_state, model)
            if trained_mask is None:
                continue
            fits = trained_mask.dtype == torch.bool and trained_mask.shape == (case.layout.size,)
            hold(fits, "trained_mask is not one bool for each coordinate")
            if not strategy.mixed_ranks:  # whose rows beyond a rank have no gradient to begin with
                grad = torch.ones(1, case.layout.size)
                strategy.correct(grad, drawn(case.layout, 1)[None], broadcast, client_state, model)
                hold(not grad[:, ~trained_mask].any(), "correct leaves gradients where trained_mask says nothing moves")


def lanes_are_corrected_as_single_clients(case: Case) -> None:
    """correct on the stacked gradients (K, P) and client states gives the same bits as on each client's own."""
    for rounds in (0, 2):
        now = case.after(rounds)
        broadcast, pair = now.broadcast, now.client_states[:2]
        stacked = {name: torch.stack([client_state[name] for client_state in pair]) for name in pair[0]}
        for model in case.strategy.starts(broadcast, pair[0]):
            params_KP, grad_KP = (torch.stack([drawn(case.layout, n), drawn(case.layout, n + 1)]) for n in (1, 3))
            alone = [grad_KP[k : k + 1].clone() for k in range(2)]
            for k, grad_1P in enumerate(alone):
                case.strategy.correct(grad_1P, params_KP[k : k + 1], broadcast, pair[k], model)
            case.strategy.correct(grad_KP, params_KP, broadcast, stacked, model)
            same(grad_KP, torch.cat(alone), f"correct on several clients at once differs from one by one in {model!r}")


def the_global_training_comes_first(case: Case) -> None:
    """starts names "global" first, and all that it gives are vectors (P,)."""
    now = case.after(1)
    for client_state in (ClientState(), now.client_states[0]):
        starts = case.strategy.starts(now.broadcast, client_state)
        hold(next(iter(starts), None) == GLOBAL, f"starts names {list(starts)}: the first must be {GLOBAL!r}")
        for model, start in starts.items():
            hold(start.shape == (case.layout.size,), f"the start of {model!r} is no vector of the layout's size")


def a_personal_vector_is_like_the_global_one(case: Case) -> None:
    """personal gives a float32 vector (P,), or None."""
    now = case.after(2)
    for client_state in (ClientState(), now.client_states[0]):
        vector = case.strategy.personal(now.broadcast, client_state)
        like = vector is None or (vector.shape == now.state.params.shape and vector.dtype == torch.float32)
        hold(like, "personal gives something else than a vector like the global one")


def the_traffic_is_counted_in_whole_numbers(case: Case) -> None:
    """floats says how many numbers go down and up, as integers of at least 0."""
    for rounds in range(3):
        counts = case.strategy.floats(case.after(rounds).broadcast)
        are_counts = all(isinstance(count, int) and count >= 0 for count in counts) and len(counts) == 2
        hold(are_counts, f"floats gives {counts} after {rounds} rounds, not two whole numbers of at least 0")
