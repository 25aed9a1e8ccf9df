"""Which sections of a recipe go together: each may be right by itself and the whole make no sense."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from engine.config.train import AdamW, Sgd, Train
from strategies import Strategies
from strategies.averaging.fednova import FedNova
from strategies.averaging.qfedavg import QFedAvg
from strategies.averaging.scaffold import Scaffold
from strategies.core.cohort import UniformCohort
from strategies.core.layout import Layout
from strategies.core.protocol import Strategy
from strategies.lora.fedex import FedExLora
from strategies.lora.fedsb import FedSb
from strategies.lora.fedsvd import FedSvd
from strategies.lora.flexlora import FlexLora
from strategies.lora.flora import Flora
from strategies.lora.rolora import RoLora
from strategies.personalized.feddpa import FedDpa
from strategies.personalized.local_only import LocalOnly
from strategies.transforms.clip import Clip
from strategies.transforms.projection import Projection

PRODUCTS = FedExLora | Flora | FlexLora
MERGING = FedExLora | Flora
MOVING = FedSb | FedSvd | FlexLora | Flora | RoLora
SOME = Layout(("any",), ((10_007,),))  # of a length that nobody means by itself: what is as long follows the layout

if TYPE_CHECKING:
    from engine.config.federation import Federation


def check_together(federation: Federation) -> None:
    """Raises ValueError for the first two sections that do not go together, with the nearest that works."""
    for check in (_adapters, _cohort, _optimizer, _freezing, _transforms, _packs, _overlap, _gangs):
        check(federation)


def _adapters(federation: Federation) -> None:
    strategy, peft = federation.strategy, federation.model.peft
    if peft.kind == "none" and federation.model.dtype != "float32" and federation.clients.zero is None:
        raise ValueError(
            'model.peft = "none" trains all weights, which needs model.dtype = "float32", or clients.zero, whose ranks '
            "keep float32 copies"
        )
    if strategy.needs_lora and peft.kind != "lora":
        raise ValueError(f'{_named(strategy)} works on adapters, but model.peft is "none": use LoRA, or "fedavg"')
    if isinstance(strategy, FedDpa) and peft.kind == "lora" and peft.r % 2:
        raise ValueError(
            f"{_named(strategy)} makes two adapters of half the rank, but model.peft.r is {peft.r}: "
            f"set it to {peft.r + 1}, and alpha to keep alpha / r"
        )
    if peft.kind == "lora" and peft.ranks and not strategy.mixed_ranks:
        able = " or ".join(repr(other().kind) for other in get_args(Strategies) if other.mixed_ranks)
        raise ValueError(
            f"{_named(strategy)} needs one rank for all clients, but model.peft.ranks mixes them: "
            f"leave it out, or use {able}"
        )


def _cohort(federation: Federation) -> None:
    least, cohort = federation.strategy.smallest_cohort(), federation.cohort
    if least > 1 and not isinstance(cohort, UniformCohort):
        raise ValueError(
            f'{_named(federation.strategy)} needs at least {least} clients in each round: use cohort.kind = "uniform"'
        )
    if isinstance(cohort, UniformCohort) and cohort.size < least:
        raise ValueError(
            f"{_named(federation.strategy)} needs at least {least} clients a round, but cohort.size is "
            f"{cohort.size}: raise it to {least}, or let the strategy tolerate fewer liars"
        )


def _optimizer(federation: Federation) -> None:
    strategy, train = federation.strategy, federation.train
    if isinstance(strategy, Scaffold) and train.optimizer.lr == 0:
        raise ValueError(f"{_named(strategy)} divides by the learning rate: set train.optimizer.lr above 0")
    if isinstance(strategy, Scaffold | FedNova):
        momentum = strategy.momentum if isinstance(strategy, FedNova) else 0.0
        if not isinstance(train.optimizer, Sgd) or train.optimizer.momentum != momentum:
            wanted = f'{{ kind = "sgd", momentum = {momentum:g} }}'
            raise ValueError(
                f"{_named(strategy)} counts on what plain SGD does: set train.optimizer = {wanted} with its lr, "
                f'or use a rule for any optimizer, such as "fedavg"'
            )
    if isinstance(strategy, FedSb) and not isinstance(train.optimizer, Sgd):
        raise ValueError(
            f"{_named(strategy)} trains within the span of its basis, which adaptive optimizers leave: "
            f'set train.optimizer.kind = "sgd", or use "ffa"'
        )
    if isinstance(strategy, MOVING) and train.state == "keep":
        raise ValueError(
            f"{_named(strategy)} gives the vector another meaning from round to round, which an optimizer's kept state "
            f'does not follow: set train.state = "reset"'
        )
    if isinstance(strategy, FedNova) and (train.over_steps.kind != "constant" or train.over_steps.warmup):
        raise ValueError(f"{_named(strategy)} needs one learning rate within a round: leave train.over_steps out")
    if isinstance(strategy, QFedAvg) and strategy.lipschitz is None and not isinstance(train.optimizer, Sgd):
        raise ValueError(
            f"{_named(strategy)} takes 1 / lr for the loss's curvature, which holds for SGD alone: "
            f'set strategy.lipschitz, or train.optimizer.kind = "sgd"'
        )


def _freezing(federation: Federation) -> None:
    frozen = federation.strategy.freezes
    if frozen and _decays(federation.train):
        raise ValueError(
            f"{_named(federation.strategy)} keeps tensors as they are, which weight decay would shrink: "
            f"set train.optimizer.weight_decay = 0"
        )


def _transforms(federation: Federation) -> None:
    strategy, projections = federation.strategy, [t for t in federation.transforms if isinstance(t, Projection)]
    if federation.transforms and isinstance(strategy, LocalOnly):
        raise ValueError(f"{_named(strategy)} sends nothing that could be transformed: leave transforms out")
    if federation.transforms and isinstance(strategy, PRODUCTS):
        raise ValueError(
            f"{_named(strategy)} sends products beside its update, which transforms do not touch: leave transforms out"
        )
    if len(projections) > 1:
        raise ValueError("transforms has several projections: one with the product of their shares does as much")
    ranks = federation.model.peft.kind == "lora" and federation.model.peft.ranks
    if projections and (strategy.freezes or ranks):
        raise ValueError(
            f"{_named(strategy)} keeps tensors as they are, which a projection's noise would move: use topk or int8"
        )


def in_the_way_of_lanes(federation: Federation) -> str | None:
    """What of the recipe does not go with packs, whose clients share every step."""
    clients = federation.clients
    refused = {
        'model.peft.kind = "none"': federation.model.peft.kind != "lora",
        'privacy.dp.kind = "example"': federation.privacy.dp.kind == "example",
        "clients.availability.deadline_s without step_s": clients.availability.by_clock,
        "model.compile": federation.model.compile,
        "clients.zero without from_rows": clients.zero is not None and not clients.zero.from_rows,
    }
    return next((key for key, set_ in refused.items() if set_), None)


def _packs(federation: Federation) -> None:
    lanes, key = federation.clients.lanes, in_the_way_of_lanes(federation)
    if key is not None and lanes not in (1, "auto"):
        raise ValueError(f"{key} does not work with several lanes: set clients.lanes = 1, or leave it out")


def _overlap(federation: Federation) -> None:
    """An evaluation beside a round needs slots that wait for one another, and one model on a base that stays."""
    refused = {
        "privacy.secagg": federation.privacy.secure,
        "clients.zero": federation.clients.zero is not None,
        _named(federation.strategy): federation.strategy.personalizes or isinstance(federation.strategy, MERGING),
    }
    for key, set_ in refused.items():
        if federation.evaluate.overlap and set_:
            raise ValueError(f"evaluate.overlap does not work with {key}: leave it out, so that rounds wait")


def works_in_gangs(strategy: Strategy) -> bool:
    """Whether a client under this rule may be a gang of ZeRO ranks, each with its shard."""
    return strategy.reads == "sum" and strategy.elementwise and not strategy.personalizes


def _gangs(federation: Federation) -> None:
    """What gangs cannot do: ranks see shards of vectors alone."""
    zero = federation.clients.zero
    if zero is None:
        return
    strategy, peft = federation.strategy, federation.model.peft
    if not works_in_gangs(strategy):
        able = [rule().kind for rule in get_args(Strategies) if works_in_gangs(rule())]
        raise ValueError(
            f"{_named(strategy)} needs whole vectors, and ranks of a gang have shards: leave clients.zero out, or use "
            f"one of {', '.join(able)}"
        )
    refused = {
        "transforms of another kind than clip": any(not isinstance(one, Clip) for one in federation.transforms),
        "privacy.secagg beside clients.zero.from_rows": federation.privacy.secure and zero.from_rows > 0,
        f"privacy.dp.kind = {federation.privacy.dp.kind!r}": federation.privacy.dp.kind not in ("none", "central"),
        "model.peft.ranks": peft.kind == "lora" and bool(peft.ranks),
        "model.compile": federation.model.compile,
        'train.state = "keep"': federation.train.state == "keep",
        'train.optimizer.kind = "torch"': federation.train.optimizer.kind == "torch",
        "clients.availability.deadline_s without step_s": federation.clients.availability.by_clock,
        "evaluate.finetune": federation.evaluate.finetune > 0,
    }
    for key, set_ in refused.items():
        if set_:
            raise ValueError(f"{key} does not work with gangs: leave it, or clients.zero, out")
    gpus = federation.clients.num_gpus
    if zero.ranks > 1 and 0 < gpus <= 0.5:
        raise ValueError(
            f"clients.num_gpus = {gpus:g} lets ranks of a gang share a GPU, which NCCL does not: set it to 1, or "
            f"clients.zero.ranks = 1 for a gang on a part of a GPU"
        )
    short = [name for name, length in strategy.beside(SOME).items() if length != SOME.size]
    private = {"privacy.secagg": federation.privacy.secure, "privacy.dp": federation.privacy.dp.kind != "none"}
    for key, set_ in private.items():
        # Every rank has them whole: masks are for shards, and each rank would clip and add noise by itself.
        if set_ and short:
            raise ValueError(
                f"{_named(strategy)} sends {' and '.join(map(repr, short))} beside the update and not as long as it, "
                f"which {key} does not work with in gangs: leave {key}, or clients.zero, out"
            )


def _decays(train: Train) -> bool:
    if isinstance(train.optimizer, AdamW | Sgd):
        return train.optimizer.weight_decay != 0
    return bool(train.optimizer.options.get("weight_decay", 0.0))


def _named(strategy: object) -> str:
    own = type(strategy).__module__.split(".")[0] != "strategies"
    return f"the strategy {type(strategy).__name__ if own else vars(strategy)['kind']!r}"
