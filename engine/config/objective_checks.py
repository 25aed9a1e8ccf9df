"""Which objectives go with which other sections of the recipe."""

from collections.abc import Iterator

from engine.config.sections import Sections
from strategies.core.base import named

Refusals = Iterator[tuple[object, str]]  # conditions that must not hold, and the sentence for each


def refuse_objective(recipe: Sections) -> Refusals:
    """Yields what the objective does not go together with."""
    objective, peft, key = recipe.train.objective, recipe.model.peft, "train.objective.reference"
    what = f'train.objective.kind = "{objective.kind}"'
    yield (
        recipe.privacy.dp.kind == "example" and objective.couples_rows,
        f'{what} does not work with privacy.dp.kind = "example", which clips each row\'s own gradient: '
        f"{objective.couples_rows}",
    )
    yield (
        objective.sampling is not None and recipe.clients.zero is not None,
        f"{what} samples completions, and the ranks of a gang would gather the model's shards for each token: "
        f"leave clients.zero out, and if the model does not fit, hold its base in fewer bits (model.quantize)",
    )
    yield (
        objective.judges_samples and recipe.strategy.loss_before,
        f"{what} has no loss to compare clients by before they train, as {named(recipe.strategy)} does: take "
        f'strategy = "fedavg"',
    )
    mixed = any(share.r != peft.lora_rank for share in peft.ranks)
    yield (
        objective.reference == "start" and mixed,
        f'{key} = "start" is one vector, and model.peft.ranks gives clients others: set {key} = "base", or "round"',
    )
    yield (
        objective.reference == "base" and peft.peft_class is None and recipe.model.start is not None,
        f'{key} = "base" needs a second model beside the one that model.peft = "none" trains from model.start: set '
        f'{key} = "start"',
    )
