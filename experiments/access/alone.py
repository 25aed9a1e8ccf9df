"""What clients still have when the base's owner has left: their own score, by a process that has nothing else."""

from pathlib import Path

import numpy as np
import torch

from datasets_partition.store.store import Store
from experiments.config.recipe import Recipe, located


def score_alone(recipe: Recipe, folder: Path, store: Path) -> float | None:
    """Returns the loss on unseen clients by the last checkpoint and the base at home; None where clients have none.

    It equals what the run has measured, to the bit.
    """
    from datasets_partition.store.tokens import Tokens
    from engine.models.base_model import always_the_same_bits, map_base, read_base
    from engine.models.tokenizer import load_tokenizer, padding
    from engine.models.trainable import trainable_of
    from engine.records.checkpoint import load_checkpoint
    from engine.training.local_training import LocalTrainer
    from engine.workers.evaluator import client_loss, pooled
    from engine.workers.token_columns import token_columns
    from strategies.core.seeds import torch_seed

    if not recipe.model.access.home:
        return None
    recipe = located(recipe)
    torch.set_num_threads(recipe.clients.threads)
    always_the_same_bits()
    saved = load_checkpoint(folder / "checkpoints")
    assert saved is not None
    state = saved.state.shards[0]
    packed, buffer = read_base(recipe.model, scores=recipe.scores)
    seed = torch_seed(recipe.seed, 0, -1, "initial")
    trainable = trainable_of(map_base(packed, torch.from_numpy(buffer)), recipe.model, seed)
    tokenizer = load_tokenizer(recipe.model)
    trainer = LocalTrainer(trainable, padding(tokenizer, trainable.network), recipe.train, tokenizer)
    trainer.become(state.params)
    tokens, opened = Tokens.open(token_columns(store, recipe)), Store.open(store)
    unseen = np.arange(opened.num_training, opened.num_clients)
    judged = [int(client) for client in unseen if tokens.counts("heldout")[client]]
    losses = [
        client_loss(trainer, client, tokens.rows(client, "heldout"), recipe.evaluate, recipe.seed) for client in judged
    ]
    mean: float = pooled(losses, recipe.train.objective).metrics("loss", recipe.train.objective)["loss"]
    return mean
