"""What goes with full tuning by scalars."""

from engine.config.objective_checks import Refusals
from engine.config.sections import Sections
from strategies.core.base import named


def refuse_seeds(recipe: Sections) -> Refusals:
    """Yields what does not go with a model that is made again from scalars."""
    if not recipe.model.peft.replays:
        return
    what, objective = f'model.peft = "{recipe.model.peft.kind}"', recipe.train.objective
    optimizer = recipe.train.optimizer
    yield (
        optimizer.kind == "sgd" and optimizer.weight_decay,
        f"{what} makes the model again from amounts of directions, which weight decay is not: set "
        f"train.optimizer.weight_decay = 0",
    )
    yield recipe.train.state == "keep", f'{what} keeps no optimizer\'s state: set train.state = "reset"'
    yield (
        objective.reference != "none" or objective.sampling is not None or objective.needs,
        f'{what} has one copy of the weights, and train.objective.kind = "{objective.kind}" needs another model, '
        f'samples, or a head: take "sft", "orpo" or "cpo"',
    )
    yield recipe.model.compile, f"{what} writes to weights, which model.compile has seen: leave model.compile out"
    yield (
        recipe.strategy.picks_coordinates and recipe.privacy.secure,
        f'{named(recipe.strategy)} with draw = "own" changes directions along which no other client may walk, and '
        f'whose sums tell of one client: set strategy.draw = "shared"',
    )
