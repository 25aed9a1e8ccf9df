"""What the reference model says of all rows, computed once where that is cheaper than in each step."""

import numpy as np
import ray

from datasets_partition.store.tokens import Tokens
from engine.config.federation import Federation
from engine.messages.broadcast import share
from engine.messages.row_columns import RowColumn
from engine.messages.shards import ShardedState
from engine.objectives.base import REFERENCE
from engine.rounds.server import Server
from engine.scheduling.worker_kinds import Reference
from engine.training.step_loop import steps_of


def pays(federation: Federation, tokens: Tokens, population: int) -> bool:
    """Whether reference columns take fewer forward passes than the steps do: trained rows against all rows once.

    The recipe's `precompute_ref_log_probs` decides if it is set. Gangs compute live, and so does a reference that
    changes with the rounds.
    """
    objective, train = federation.train.objective, federation.train
    if objective.reference not in ("base", "start") or federation.clients.zero is not None:
        return False
    if objective.precompute_ref_log_probs is not None:
        return objective.precompute_ref_log_probs
    clients = federation.cohort.expected(population) * federation.rounds
    steps = np.mean([steps_of(int(rows), train) for rows in np.unique(tokens.counts("train")[:population])])
    rows = int(tokens.counts("train").sum()) + int(tokens.counts("heldout").sum())
    return bool(clients * steps * train.batch * train.accumulate > rows)


def reference_columns(server: Server, initial: ShardedState, tokens: Tokens) -> Reference:
    """Lets the slots compute the column of all rows, each client by itself, and puts it into the object store."""
    shared, train_N, heldout_N = share(server.model_message(initial)), tokens.counts("train"), tokens.counts("heldout")
    clients = np.arange(len(train_N))
    parts = server.pool.map(
        clients, train_N + heldout_N, lambda actor, chunk: actor.reference_columns.remote(chunk, shared)
    )
    return ray.put(RowColumn.of(REFERENCE, parts, train_N, heldout_N))
