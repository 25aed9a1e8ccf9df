"""Which rules, kinds of `model.peft` and sections go with which level of access to the base."""

from typing import get_args

from engine.config.objective_checks import Refusals
from engine.config.sections import Sections
from strategies import Strategies
from strategies.core.access import GRANTS, Capability, lowest
from strategies.core.base import named


def needs_of(recipe: Sections) -> frozenset[Capability]:
    """What a recipe's clients use of the base."""
    of_rule = recipe.strategy.access
    return recipe.model.peft.access if of_rule is None else of_rule


def refuse_access(recipe: Sections) -> Refusals:
    """Yields what does not go with the level, and pairs of rule and kind that do not belong together."""
    yield from _pairs(recipe)
    if recipe.strategy.searches:
        yield from _searches(recipe)
    access, needs = recipe.model.access, needs_of(recipe)
    missing = sorted(needs - GRANTS[access.level])
    what = f"{named(recipe.strategy)} with model.peft = {recipe.model.peft.kind!r}"
    yield (
        missing,
        f'{what} needs "{" and ".join(missing)}" of the base, which model.access.level = "{access.level}" does not '
        f'grant: set it to "{lowest(needs)}"{_instead(recipe)}',
    )
    if not access.home:
        yield from _below_weights(recipe)


def _instead(recipe: Sections) -> str:
    """What would work at the level, as the end of a sentence."""
    granted = GRANTS[recipe.model.access.level]
    able = [rule() for rule in get_args(Strategies) if rule().access is not None and rule().access <= granted]
    pairs = [f"{rule.kind!r} with model.peft = {rule.tunes[0]!r}" for rule in able]
    if "input_gradients" in granted:
        pairs.append("'fedavg' with model.peft = 'prompt'")
    return f", or take strategy = {' or '.join(pairs)}" if pairs else ""


def _pairs(recipe: Sections) -> Refusals:
    """A rule that searches a kind of its own, and a kind that has no gradient, belong together."""
    strategy, peft, name = recipe.strategy, recipe.model.peft, named(recipe.strategy)
    yield (
        strategy.tunes and peft.kind not in strategy.tunes,
        f"{name} tunes model.peft = {' or '.join(map(repr, strategy.tunes))}, not {peft.kind!r}: set that, or take "
        f'strategy = "fedavg"',
    )
    able = [rule().kind for rule in get_args(Strategies) if peft.kind in rule.tunes]
    yield (
        not peft.has_gradient and peft.kind not in strategy.tunes,
        f"model.peft = {peft.kind!r} has no gradient that {name} could average: take strategy = "
        f"{' or '.join(map(repr, able))}",
    )
    yield (
        recipe.model.start is not None and not peft.has_gradient,
        f"model.peft = {peft.kind!r} is searched from the seed's own first prompt: leave model.start out",
    )
    objective = recipe.train.objective
    simple = objective.reference == "none" and objective.sampling is None and not objective.needs
    yield (
        peft.plugs_in and (not simple or recipe.model.quantize is not None or recipe.model.compile),
        f"model.peft = {peft.kind!r} trains around an emulator, which goes with one model and plain losses: leave "
        f'model.quantize and model.compile out, and take train.objective = "sft", "orpo" or "cpo"',
    )
    yield (
        peft.plugs_in and (recipe.evaluate.overlap or recipe.evaluate.finetune),
        f"model.peft = {peft.kind!r} is judged by the base's owner: leave evaluate.overlap and evaluate.finetune out",
    )
    yield (
        peft.virtual_tokens and recipe.scores,
        f"model.peft = {peft.kind!r} is a prompt in front of texts, and a reward model is trained with its head: take "
        f'model.peft = "lora"',
    )


def _searches(recipe: Sections) -> Refusals:
    """A search compares sums of one loss on the same rows, and changes no weight."""
    name, objective = named(recipe.strategy), recipe.train.objective
    what = f'train.objective.kind = "{objective.kind}"'
    yield (
        len(objective.losses) > 1 or objective.sampling is not None or objective.reference != "none",
        f'{name} compares candidates by one loss on the same rows, which {what} does not give: take "sft"',
    )
    yield (
        recipe.strategy.judges_by == "match" and objective.kind != "sft",
        f'{name} with score = "match" compares what is written with completions: take train.objective = "sft"',
    )
    yield recipe.transforms, f"{name} sends losses, and no change that transforms could work on: leave transforms out"
    yield recipe.evaluate.finetune, f"{name} trains nothing, and so does not fine-tune: leave evaluate.finetune out"
    yield (
        recipe.privacy.dp.kind != "none",
        f"{name} sends losses, for which there is no noise here: leave privacy.dp out (privacy.secagg hides each "
        f"client's)",
    )


def _below_weights(recipe: Sections) -> Refusals:
    """What needs a base at home."""
    model, objective = recipe.model, recipe.train.objective
    needed = {
        "clients.lanes above 1": recipe.clients.lanes not in (1, "auto"),
        "clients.zero": recipe.clients.zero is not None,
        "model.compile": model.compile,
        "model.quantize": model.quantize is not None,
        f"{named(recipe.strategy)}": recipe.strategy.merges_into_base or recipe.strategy.personalizes,
        'privacy.dp.kind = "example"': recipe.privacy.dp.kind == "example",
        f'train.objective.kind = "{objective.kind}"': objective.reference != "none"
        or objective.sampling is not None
        or bool(objective.models)
        or bool(objective.needs),
        "evaluate.finetune": recipe.evaluate.finetune > 0,
        "evaluate.overlap": recipe.evaluate.overlap,
    }
    for key, is_set in needed.items():
        yield (
            is_set,
            f'{key} needs the base at home, and model.access.level = "{model.access.level}" leaves it with its owner: '
            f'leave it out, or set the level to "weights"',
        )
