"""What the engine runs: a recipe without its data section, and checks that its sections go together."""

from dataclasses import dataclass
from itertools import chain
from typing import get_args

from engine.config.access_checks import refuse_access
from engine.config.objective_checks import Refusals, refuse_objective
from engine.config.sections import Sections
from engine.config.seed_checks import refuse_seeds
from engine.config.train import DECAYS
from engine.messages.checks import at_least
from engine.messages.errors import RunError
from strategies import Strategies
from strategies.core.base import Rule, named
from strategies.core.layout import Layout
from strategies.core.protocol import NO_LAYOUT
from strategies.privacy.checks import check_dp
from strategies.secagg.ring import Sum

SOME = Layout(("any",), ((10_007,),))  # an odd length: an extra of this length follows the vector's


@dataclass(frozen=True, kw_only=True)
class Federation(Sections):
    """Sections that are valid by themselves and together; RunError or StrategyError where they are not."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise RunError(f"name becomes a folder's name: not empty, no '/', no leading '.', not {self.name!r}")
        checks = (
            _precision,
            refuse_access,
            refuse_seeds,
            refuse_objective,
            _adapters,
            _quantize,
            _cohort,
            _sgd,
            _optimizer,
            _schedules,
            _transforms,
            _lanes,
            _overlap,
        )
        for is_so, why in chain.from_iterable(check(self) for check in (*checks, _gangs, _privacy, _secagg)):
            if is_so:
                raise RunError(why)
        at_least("", 1, rounds=self.rounds)
        if self.seed < 0:
            raise RunError(f"seed must be at least 0, not {self.seed}")


def works_on_pairs(strategy: Rule) -> bool:
    """Whether the rule works on the matrices A and B of adapters."""
    return strategy.needs_lora or strategy.merges_into_base or strategy.sends_products


def _precision(recipe: Sections) -> Refusals:
    held, computed = recipe.model.dtype, recipe.train.dtype
    why = f'train.dtype is "float32", and model.dtype holds the base in {held}: set model.dtype = "float32" too'
    yield computed == "float32" and held != "float32", why
    yield (
        held == "float16" and computed != "bfloat16",
        'model.dtype = "float16" can hold the base, but gradients vanish in it: set train.dtype = "bfloat16" to '
        'compute in that, or model.dtype = "bfloat16"',
    )
    by_row = recipe.privacy.dp.kind == "example"
    for key, is_set in {"clients.zero": recipe.clients.zero is not None, 'privacy.dp.kind = "example"': by_row}.items():
        yield is_set and computed not in (None, held), f"{key} computes in model.dtype alone: leave train.dtype out"


def _adapters(recipe: Sections) -> Refusals:
    strategy, peft, name = recipe.strategy, recipe.model.peft, named(recipe.strategy)
    yield (
        peft.trains_base and recipe.model.dtype != "float32" and recipe.clients.zero is None,
        f'{peft.trains_base} trains weights of the base, which needs model.dtype = "float32" (train.dtype may be '
        '"bfloat16"), or clients.zero, whose ranks keep float32 copies',
    )
    if peft.lora_rank is None:
        why = f'{name} works on adapters, but model.peft is "{peft.kind}": use LoRA, or "fedavg"'
        yield works_on_pairs(strategy), why
        return
    why = f"{name} needs one rank in all layers, but model.peft.rank_pattern gives some their own: leave it out"
    yield works_on_pairs(strategy) and peft.options().get("rank_pattern"), f'{why}, or use "fedavg"'
    multiple = strategy.lora_rank_multiple
    rest = peft.lora_rank % multiple
    yield (
        rest,
        f"{name} splits the rank into {multiple} equal parts, but model.peft.r is {peft.lora_rank}: set it to "
        f"{peft.lora_rank + multiple - rest}, and alpha to keep alpha / r",
    )
    yield (
        recipe.model.start is not None and strategy.begins_fresh,
        f"{name} makes its bases of what round 0 adds to fresh adapters, and a start would take their place: leave "
        f'model.start out, or take another rule, such as "ffa"',
    )
    if peft.ranks and not strategy.mixed_ranks:
        able = " or ".join(repr(rule().kind) for rule in get_args(Strategies) if rule.mixed_ranks)
        why = f"needs one rank for all clients, but model.peft.ranks mixes them: leave it out, or use {able}"
        yield True, f"{name} {why}"


def _quantize(recipe: Sections) -> Refusals:
    """Weights in few bits are frozen, and nothing can be added to them."""
    quantize, peft, strategy = recipe.model.quantize, recipe.model.peft, recipe.strategy
    if quantize is None:
        return
    yield (
        peft.peft_class is None,
        f'model.peft = "{peft.kind}" trains all weights, which model.quantize holds in few bits: train adapters, such '
        f"as LoRA, or leave model.quantize out",
    )
    yield (
        peft.options().get("bias", "none") != "none",
        "model.peft.bias trains biases, which quantized layers replace by copies: leave it, or model.quantize, out",
    )
    yield (
        strategy.merges_into_base,
        f"{named(strategy)} adds to the base's weights, which model.quantize holds in few bits: leave model.quantize "
        f'out, or take a rule that leaves the base as it is, such as "ffa" or "fedavg"',
    )


def _cohort(recipe: Sections) -> Refusals:
    least, cohort, name = recipe.strategy.smallest_cohort(), recipe.cohort, named(recipe.strategy)
    why = f'{name} needs at least {least} clients in each round: use cohort.kind = "uniform"'
    yield cohort.varies and least > 1, why
    yield (
        cohort.cap is not None and cohort.cap < least,
        f"{name} needs at least {least} clients a round, but cohort.size is {cohort.cap}: raise it to {least}, or let "
        f"the strategy tolerate fewer liars",
    )


def _sgd(recipe: Sections) -> Refusals:
    """What the rule asks of the local optimizer."""
    name, needs, optimizer = named(recipe.strategy), recipe.strategy.needs_optimizer, recipe.train.optimizer
    if needs is None:
        return
    momentum = "" if needs.momentum is None else f", momentum = {needs.momentum:g}"
    yield (
        optimizer.kind != "sgd" or needs.momentum not in (None, optimizer.momentum),
        f'{name} {needs.why}: set train.optimizer = {{ kind = "sgd"{momentum} }} with its lr, or {needs.instead}',
    )
    yield (
        needs.momentum and recipe.train.state == "keep",
        f'{name} counts on a momentum that starts at zero in each round: set train.state = "reset", or {needs.instead}',
    )
    why = f"{name} divides by the learning rate: set train.optimizer.lr above 0"
    yield needs.divides and optimizer.lr == 0, why
    schedule = recipe.train.over_steps
    why = f"{name} needs one learning rate within a round: leave train.over_steps out"
    yield needs.constant and (schedule.kind != "constant" or schedule.warmup), why


def _optimizer(recipe: Sections) -> Refusals:
    strategy, optimizer, name = recipe.strategy, recipe.train.optimizer, named(recipe.strategy)
    yield (
        not strategy.keeps_basis and recipe.train.state == "keep",
        f"{name} gives the vector another meaning from round to round, which an optimizer's kept state does not "
        f'follow: set train.state = "reset"',
    )
    if optimizer.kind == "torch":
        decays = {f"options.{option}": optimizer.option(option) for option in DECAYS}
    else:
        decays = {"weight_decay": optimizer.weight_decay}
    for key, decay in decays.items():
        why = f"{name} keeps tensors as they are, which weight decay would shrink: set train.optimizer.{key} = 0"
        yield strategy.freezes and decay, why


def _schedules(recipe: Sections) -> Refusals:
    """A warm-up that is longer than what it is part of never reaches the learning rate."""
    train = recipe.train
    schedules = [("over_rounds", train.over_rounds, recipe.rounds, "the run", "rounds")]
    if train.steps is not None:  # epochs are of as many steps as a client's rows give
        schedules.append(("over_steps", train.over_steps, train.steps, "a round", "steps"))
    for key, schedule, length, what, unit in schedules:
        yield (
            schedule.warmup > length,
            f"train.{key}.warmup is {schedule.warmup}, and {what} has {length} {unit}: set it to {length} or less, or "
            f"the learning rate is never reached",
        )


def _transforms(recipe: Sections) -> Refusals:
    strategy, name, peft = recipe.strategy, named(recipe.strategy), recipe.model.peft
    if not recipe.transforms:
        return
    yield not strategy.sends_update, f"{name} sends nothing that could be transformed: leave transforms out"
    why = f"{name} sends products beside its update, which transforms do not touch: leave transforms out"
    yield strategy.sends_products, why
    projections = sum(not transform.keeps_zeros for transform in recipe.transforms)
    yield projections > 1, "transforms has several projections: one with the product of their shares does as much"
    why = f"{name} keeps tensors as they are, which a projection's noise would move: use topk or int8"
    yield projections and (strategy.freezes or peft.ranks), why


def excludes_lanes(recipe: Sections) -> str | None:
    """The first key of the recipe that does not work with several lanes, whose clients share every step."""
    clients, peft = recipe.clients, recipe.model.peft
    if peft.outside_lanes is not None:
        return peft.outside_lanes
    quantize = recipe.model.quantize
    if quantize is not None and quantize.outside_lanes is not None:
        return quantize.outside_lanes
    refused = {
        "model.peft.use_dora with model.quantize": quantize is not None and peft.options().get("use_dora", False),
        'privacy.dp.kind = "example"': recipe.privacy.dp.kind == "example",
        "clients.availability.deadline_s without step_s": clients.availability.by_clock,
        "model.compile": recipe.model.compile,
        "clients.zero without from_rows": clients.zero is not None and not clients.zero.from_rows,
    }
    return next((key for key, is_set in refused.items() if is_set), None)


def _lanes(recipe: Sections) -> Refusals:
    key = excludes_lanes(recipe)
    why = f"{key} does not work with several lanes: set clients.lanes = 1, or leave it out"
    yield key is not None and recipe.clients.lanes not in (1, "auto"), why


def _overlap(recipe: Sections) -> Refusals:
    """An evaluation beside a round needs slots that wait for one another, and one model on an unchanging base."""
    strategy = recipe.strategy
    refused = {
        "privacy.secagg": recipe.privacy.secure,
        "clients.zero": recipe.clients.zero is not None,
        named(strategy): strategy.personalizes or strategy.merges_into_base,
    }
    for key, is_set in refused.items():
        why = f"evaluate.overlap does not work with {key}: leave it out, so that rounds wait"
        yield recipe.evaluate.overlap and is_set, why


def works_in_gangs(strategy: Rule) -> bool:
    """Whether a client under this rule may be a gang of ZeRO ranks, each with its shard of the vectors."""
    return strategy.reads == "sum" and strategy.elementwise and not (strategy.personalizes or strategy.merges_into_base)


def _gangs(recipe: Sections) -> Refusals:
    """Ranks of a gang see only shards of the vectors."""
    zero = recipe.clients.zero
    if zero is None:
        return
    strategy, peft, privacy, name = recipe.strategy, recipe.model.peft, recipe.privacy, named(recipe.strategy)
    if not works_in_gangs(strategy):
        able = ", ".join(rule().kind for rule in get_args(Strategies) if works_in_gangs(rule()))
        why = "needs whole vectors, and ranks of a gang have shards: leave clients.zero out, or use one of"
        yield True, f"{name} {why} {able}"
    refused = {
        "transforms of another kind than clip": not all(transform.works_on_shards for transform in recipe.transforms),
        "privacy.secagg beside clients.zero.from_rows": privacy.secure and zero.from_rows > 0,
        f"privacy.dp.kind = {privacy.dp.kind!r}": privacy.dp.kind not in ("none", "central"),
        f"{peft.outside_gangs}": peft.outside_gangs is not None,
        "model.compile": recipe.model.compile,
        "model.quantize": recipe.model.quantize is not None,
        'train.state = "keep"': recipe.train.state == "keep",
        'train.optimizer.kind = "torch"': recipe.train.optimizer.kind == "torch",
        "clients.availability.deadline_s without step_s": recipe.clients.availability.by_clock,
        "evaluate.finetune": recipe.evaluate.finetune > 0,
    }
    for key, is_set in refused.items():
        yield is_set, f"{key} does not work with gangs: leave it, or clients.zero, out"
    gpus = recipe.clients.num_gpus
    yield (
        zero.ranks > 1 and 0 < gpus <= 0.5,
        f"clients.num_gpus = {gpus:g} lets ranks of a gang share a GPU, which NCCL does not: set it to 1, or "
        f"clients.zero.ranks = 1 for a gang on a part of a GPU",
    )
    # Every rank has short sums whole: masks are for shards, and each rank would clip and add noise by itself.
    short = [beside for beside, length in strategy.beside(SOME).items() if length != SOME.size]
    key = "privacy.secagg" if privacy.secure else "privacy.dp"
    yield (
        short and privacy.on,
        f"{name} sends {' and '.join(map(repr, short))} beside the update and not as long as it, which {key} does not "
        f"work with in gangs: leave {key}, or clients.zero, out",
    )


def _privacy(recipe: Sections) -> Refusals:
    """What differential privacy and public weights ask of the rest."""
    privacy, strategy, peft, name = recipe.privacy, recipe.strategy, recipe.model.peft, named(recipe.strategy)
    dp = privacy.dp
    yield (
        dp.kind == "example" and peft.outside_row_gradients,
        f'{peft.outside_row_gradients} does not work with privacy.dp.kind = "example", which needs the gradient of '
        f'each row: use LoRA without it, or privacy.dp.kind = "central"',
    )
    if recipe.evaluate.without_privacy:
        why = "evaluate.without_privacy plays all rounds twice, but"
        yield recipe.keeps_state, f"{why} clients' state belongs to the one run: leave it out"
        yield not privacy.on, f"{why} there is no privacy to do without: leave it out"
    if dp.unit is not None:
        mixed_ranks = any(share.r != peft.lora_rank for share in peft.ranks)
        check_dp(dp, strategy, strategy.beside(NO_LAYOUT), privacy.secagg.mode, mixed_ranks=mixed_ranks)
        yield (
            recipe.clients.min_share > 0 or recipe.clients.on_too_few == "skip",
            "a round that has no result because few clients took part tells how many did, which noise would have "
            "hidden: leave clients.min_share and clients.on_too_few out, or privacy.dp",
        )
    if privacy.secure:
        what = "each update" if strategy.reads == "each" else "several sums of the same updates"
        yield (
            strategy.reads != "sum",
            f"{name} reads {what}, and secure aggregation gives the server one sum a round: take a rule that reads the "
            f'sum ("centered_clipping", or the transform "clip", bound what a liar can do), or set '
            f'privacy.secagg.mode = "off"',
        )
        yield not strategy.sends_update, f"{name} sends nothing that could be summed: leave privacy.secagg out"
    if not privacy.public_weights:
        return
    # Clients multiply their updates by their weights, which must be bounded and tell nothing of other clients.
    yield (
        not strategy.bounded_weights,
        f"{name} weighs clients without a bound (bounded_weights), so that one of them may move a sum by any amount: "
        f'take a rule with bounded weights, such as "fedavg", or "hetlora" with weighting = "uniform"',
    )
    yield (
        privacy.rows_cap is None and not strategy.weighs_alike,
        f"{name} weighs clients by their rows, which needs a public number of rows from which on all clients count the "
        f'same: set privacy.rows_cap, or strategy.weighting = "uniform"',
    )
    # Which coordinates a client sends must follow from public numbers, as a sum's number of clients does.
    shown = "a sum may show what one client alone sends"
    why = shown if privacy.secure else "clients that have not trained shrink what they leave out"
    yield (
        strategy.picks_coordinates,
        f"clients of {name} leave out coordinates by their own data (picks_coordinates), so that {why}: take a rule "
        f'that leaves none out, such as "fedavg", or "hetlora" with gamma = 1',
    )
    picking = next((transform.kind for transform in recipe.transforms if transform.picks_coordinates), None)
    yield (
        privacy.secure and picking,
        f"{picking!r} sends the coordinates that each client picks by its own data, so that {shown}: take "
        f'"projection", whose choice all clients share, or leave privacy.secagg out',
    )


def _secagg(recipe: Sections) -> Refusals:
    """The largest cohort must fit the graph and the ring; without one, the driver checks it by the population."""
    secagg, dp, cohort, peft = recipe.privacy.secagg, recipe.privacy.dp, recipe.cohort, recipe.model.peft
    if not recipe.privacy.secure:
        return
    yield (
        dp.adds_to == "sum" and cohort.varies and dp.claims(cohort) == "poisson",
        "a Poisson cohort that is too small for secure aggregation has no sum, which tells how many came, so that its "
        'sampling hides nothing: set privacy.dp.sampling = "none"',
    )
    name, beside = named(recipe.strategy), recipe.strategy.beside(NO_LAYOUT)
    missing = next((extra for extra in beside if extra not in secagg.bounds), None)
    yield (
        missing and dp.adds_to != "ring",
        f"{name} sends the sum {missing!r} beside the update, and a ring needs to know how large its coordinates may "
        f"be: set privacy.secagg.bounds.{missing}, above which they are clipped",
    )
    unknown = next((extra for extra in secagg.bounds if extra not in beside), None)
    yield unknown, f"privacy.secagg.bounds names {unknown!r}, but {name} sends no such sum: take it out"
    largest = cohort.cap
    if largest is None:
        return
    secagg.parameters(largest)
    secagg.sums((Sum("delta", 1, secagg.bound, "weighted"),), largest)
    yield (
        secagg.min_contributors > largest,
        f"privacy.secagg.min_contributors is {secagg.min_contributors}, more than the {largest} clients of a cohort: "
        f"lower it, or raise cohort.size",
    )
    if not peft.ranks or recipe.strategy.sends_products:
        return
    # Rows of an adapter that only clients of a high rank have are a block of their own in the sum.
    expected = largest * sum(share.share for share in peft.ranks if share.r == peft.lora_rank)
    yield (
        expected < secagg.min_contributors,
        f"of a cohort of {largest}, {expected:g} clients are expected to have rank {peft.lora_rank}, and "
        f"privacy.secagg.min_contributors asks for {secagg.min_contributors} for each coordinate: raise cohort.size or "
        f'the share, or take "flexlora", whose sums hold everybody\'s products',
    )
