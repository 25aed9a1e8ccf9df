"""Which sections of a recipe go together: each may be valid by itself and the whole make no sense."""

from typing import get_args

from engine.config.sections import Sections
from engine.config.train import DECAYS, Sgd, Train
from engine.messages.errors import RunError
from strategies import Strategies
from strategies.core.base import NeedsSgd, Rule, named
from strategies.core.cohort import UniformCohort
from strategies.core.layout import Layout

SOME = Layout(("any",), ((10_007,),))  # an odd length: an extra of this length follows the vector's


def check_together(recipe: Sections) -> None:
    """Raises RunError for the first two sections that do not go together, with the nearest that works."""
    for check in (_adapters, _cohort, _optimizer, _schedules, _transforms, _lanes, _overlap, _gangs):
        check(recipe)


def _adapters(recipe: Sections) -> None:
    strategy, peft = recipe.strategy, recipe.model.peft
    if peft.kind == "none":
        if recipe.model.dtype != "float32" and recipe.clients.zero is None:
            raise RunError(
                'model.peft = "none" trains all weights, which needs model.dtype = "float32", or clients.zero, whose '
                "ranks keep float32 copies"
            )
        if strategy.needs_lora or strategy.merges_into_base or strategy.sends_products:
            raise RunError(f'{named(strategy)} works on adapters, but model.peft is "none": use LoRA, or "fedavg"')
        return
    if rest := peft.r % strategy.rank_parts:
        raise RunError(
            f"{named(strategy)} splits the rank into {strategy.rank_parts} equal parts, but model.peft.r is {peft.r}: "
            f"set it to {peft.r + strategy.rank_parts - rest}, and alpha to keep alpha / r"
        )
    if peft.ranks and not strategy.mixed_ranks:
        able = " or ".join(repr(rule().kind) for rule in get_args(Strategies) if rule.mixed_ranks)
        raise RunError(
            f"{named(strategy)} needs one rank for all clients, but model.peft.ranks mixes them: "
            f"leave it out, or use {able}"
        )


def _cohort(recipe: Sections) -> None:
    least, cohort, name = recipe.strategy.smallest_cohort(), recipe.cohort, named(recipe.strategy)
    if least > 1 and not isinstance(cohort, UniformCohort):
        raise RunError(f'{name} needs at least {least} clients in each round: use cohort.kind = "uniform"')
    if isinstance(cohort, UniformCohort) and cohort.size < least:
        raise RunError(
            f"{name} needs at least {least} clients a round, but cohort.size is {cohort.size}: "
            f"raise it to {least}, or let the strategy tolerate fewer liars"
        )


def _optimizer(recipe: Sections) -> None:
    strategy, train, name = recipe.strategy, recipe.train, named(recipe.strategy)
    if strategy.needs_optimizer is not None:
        _sgd(name, strategy.needs_optimizer, train)
    if not strategy.keeps_basis and train.state == "keep":
        raise RunError(
            f"{name} gives the vector another meaning from round to round, which an optimizer's kept state does not "
            f'follow: set train.state = "reset"'
        )
    if strategy.freezes and (key := _decay(train)):
        raise RunError(f"{name} keeps tensors as they are, which weight decay would shrink: set {key} = 0")


def _sgd(name: str, needs: NeedsSgd, train: Train) -> None:
    optimizer, schedule = train.optimizer, train.over_steps
    if not isinstance(optimizer, Sgd) or needs.momentum not in (None, optimizer.momentum):
        momentum = "" if needs.momentum is None else f", momentum = {needs.momentum:g}"
        raise RunError(
            f'{name} {needs.why}: set train.optimizer = {{ kind = "sgd"{momentum} }} with its lr, or {needs.instead}'
        )
    if needs.momentum and train.state == "keep":
        raise RunError(
            f"{name} counts on a momentum that starts at zero in each round: "
            f'set train.state = "reset", or {needs.instead}'
        )
    if needs.divides and optimizer.lr == 0:
        raise RunError(f"{name} divides by the learning rate: set train.optimizer.lr above 0")
    if needs.constant and (schedule.kind != "constant" or schedule.warmup):
        raise RunError(f"{name} needs one learning rate within a round: leave train.over_steps out")


def _schedules(recipe: Sections) -> None:
    """A warm-up that is longer than what it is part of never reaches the learning rate."""
    train = recipe.train
    parts = [("over_rounds", train.over_rounds, recipe.rounds, "the run", "rounds")]
    if train.steps is not None:  # epochs are of as many steps as a client's rows give
        parts.append(("over_steps", train.over_steps, train.steps, "a round", "steps"))
    for key, schedule, length, what, unit in parts:
        if schedule.warmup > length:
            raise RunError(
                f"train.{key}.warmup is {schedule.warmup}, and {what} has {length} {unit}: set it to {length} or less, "
                f"or the learning rate is never reached"
            )


def _decay(train: Train) -> str | None:
    """The key by which the optimizer shrinks parameters whatever their gradients are; None if there is none."""
    optimizer = train.optimizer
    if optimizer.kind != "torch":
        return "train.optimizer.weight_decay" if optimizer.weight_decay else None
    return next((f"train.optimizer.options.{option}" for option in DECAYS if optimizer.option(option)), None)


def _transforms(recipe: Sections) -> None:
    strategy, name, peft = recipe.strategy, named(recipe.strategy), recipe.model.peft
    if not recipe.transforms:
        return
    if not strategy.sends_update:
        raise RunError(f"{name} sends nothing that could be transformed: leave transforms out")
    if strategy.sends_products:
        raise RunError(f"{name} sends products beside its update, which transforms do not touch: leave transforms out")
    projections = sum(not transform.keeps_zeros for transform in recipe.transforms)
    if projections > 1:
        raise RunError("transforms has several projections: one with the product of their shares does as much")
    if projections and (strategy.freezes or (peft.kind == "lora" and peft.ranks)):
        raise RunError(f"{name} keeps tensors as they are, which a projection's noise would move: use topk or int8")


def excludes_lanes(recipe: Sections) -> str | None:
    """The first key of the recipe that does not work with several lanes, whose clients share every step."""
    clients = recipe.clients
    refused = {
        'model.peft.kind = "none"': recipe.model.peft.kind != "lora",
        'privacy.dp.kind = "example"': recipe.privacy.dp.kind == "example",
        "clients.availability.deadline_s without step_s": clients.availability.by_clock,
        "model.compile": recipe.model.compile,
        "clients.zero without from_rows": clients.zero is not None and not clients.zero.from_rows,
    }
    return next((key for key, is_set in refused.items() if is_set), None)


def _lanes(recipe: Sections) -> None:
    key = excludes_lanes(recipe)
    if key is not None and recipe.clients.lanes not in (1, "auto"):
        raise RunError(f"{key} does not work with several lanes: set clients.lanes = 1, or leave it out")


def _overlap(recipe: Sections) -> None:
    """An evaluation beside a round needs slots that wait for one another, and one model on an unchanging base."""
    strategy = recipe.strategy
    refused = {
        "privacy.secagg": recipe.privacy.secure,
        "clients.zero": recipe.clients.zero is not None,
        named(strategy): strategy.personalizes or strategy.merges_into_base,
    }
    for key, is_set in refused.items():
        if recipe.evaluate.overlap and is_set:
            raise RunError(f"evaluate.overlap does not work with {key}: leave it out, so that rounds wait")


def works_in_gangs(strategy: Rule) -> bool:
    """Whether a client under this rule may be a gang of ZeRO ranks, each with its shard of the vectors."""
    whole = strategy.personalizes or strategy.merges_into_base
    return strategy.reads == "sum" and strategy.elementwise and not whole


def _gangs(recipe: Sections) -> None:
    """Ranks of a gang see only shards of the vectors."""
    zero = recipe.clients.zero
    if zero is None:
        return
    strategy, peft, privacy = recipe.strategy, recipe.model.peft, recipe.privacy
    if not works_in_gangs(strategy):
        able = [rule().kind for rule in get_args(Strategies) if works_in_gangs(rule())]
        raise RunError(
            f"{named(strategy)} needs whole vectors, and ranks of a gang have shards: leave clients.zero out, or use "
            f"one of {', '.join(able)}"
        )
    refused = {
        "transforms of another kind than clip": not all(transform.works_on_shards for transform in recipe.transforms),
        "privacy.secagg beside clients.zero.from_rows": privacy.secure and zero.from_rows > 0,
        f"privacy.dp.kind = {privacy.dp.kind!r}": privacy.dp.kind not in ("none", "central"),
        "model.peft.ranks": peft.kind == "lora" and bool(peft.ranks),
        "model.compile": recipe.model.compile,
        'train.state = "keep"': recipe.train.state == "keep",
        'train.optimizer.kind = "torch"': recipe.train.optimizer.kind == "torch",
        "clients.availability.deadline_s without step_s": recipe.clients.availability.by_clock,
        "evaluate.finetune": recipe.evaluate.finetune > 0,
    }
    for key, is_set in refused.items():
        if is_set:
            raise RunError(f"{key} does not work with gangs: leave it, or clients.zero, out")
    gpus = recipe.clients.num_gpus
    if zero.ranks > 1 and 0 < gpus <= 0.5:
        raise RunError(
            f"clients.num_gpus = {gpus:g} lets ranks of a gang share a GPU, which NCCL does not: set it to 1, or "
            f"clients.zero.ranks = 1 for a gang on a part of a GPU"
        )
    # Every rank has short sums whole: masks are for shards, and each rank would clip and add noise by itself.
    short = [name for name, length in strategy.beside(SOME).items() if length != SOME.size]
    for key, is_set in {"privacy.secagg": privacy.secure, "privacy.dp": privacy.dp.kind != "none"}.items():
        if is_set and short:
            raise RunError(
                f"{named(strategy)} sends {' and '.join(map(repr, short))} beside the update and not as long as it, "
                f"which {key} does not work with in gangs: leave {key}, or clients.zero, out"
            )
