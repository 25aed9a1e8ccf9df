"""What an objective has of a whole step before its gradients: the reference model's columns, and means over the step.

Legend: B sequences.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from engine.objectives.base import REFERENCE, Context, Objective, Term
from engine.objectives.token_batch import Batch

# Gives the mean of a term over the step, for each sequence (B,) of each batch.
Averages = Callable[[str, Sequence[Term], Sequence[Batch]], list[torch.Tensor]]
Known = Callable[[str, Batch], torch.Tensor]  # gives a mean that is known before, for each sequence (B,) of a batch


def with_columns(
    objective: Objective,
    network: nn.Module,
    batches: Sequence[Batch],
    context: Context,
    as_reference: Callable[[], AbstractContextManager[None]],
    averages: Averages,
    known: Known | None = None,
) -> list[Batch]:
    """Returns a step's batches, on the network's device, with the columns that `terms` reads.

    Inside `as_reference` the network computes as the reference model. Columns that the rows have already are kept.
    """
    batches = list(batches)
    if objective.reads_reference and any(REFERENCE not in batch.columns for batch in batches):
        with as_reference():
            batches = [batch.plus(objective.reference_columns(network, batch, context)) for batch in batches]
    if known is not None:
        return [batch.plus({name: known(name, batch) for name in objective.means}) for batch in batches]
    if objective.means:
        with judging(network):
            terms = [objective.step_terms(network, batch, context) for batch in batches]
        for name in objective.means:
            means = averages(name, [each[name] for each in terms], batches)
            batches = [batch.plus({name: mean_B}) for batch, mean_B in zip(batches, means, strict=True)]
    return batches


def constant(means: Mapping[str, float], name: str, batch: Batch) -> torch.Tensor:
    """Returns a known mean for each sequence (B,)."""
    return torch.full((len(batch.ids_BT),), means[name], device=batch.ids_BT.device)


@contextmanager
def judging(network: nn.Module) -> Iterator[None]:
    """Computes without gradients and dropout, and leaves the network in the mode that it was in."""
    was_training = network.training
    if was_training:
        network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if was_training:
            network.train()


@contextmanager
def without_adapters(network: nn.Module) -> Iterator[None]:
    """Lets the base compute alone; the adapters keep their gradients, which PEFT's own switch does not promise."""
    switched = [module for module in network.modules() if vars(module).get("_disable_adapters") is False]
    for module in switched:
        vars(module)["_disable_adapters"] = True
    try:
        yield
    finally:
        for module in switched:
            vars(module)["_disable_adapters"] = False
