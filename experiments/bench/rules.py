"""What `fedpost bench strategies` compares: each rule with its keys, and why it needs keys that the others lack.

Unless a rule's reason says otherwise, all have the demo's AdamW with its learning rate of 0.003, and clients with equal
weights. Nothing else is tuned. Rules whose theory assumes SGD have SGD, and are to be compared with FedAvg on SGD.
"""

from dataclasses import dataclass

SGD = 'train.optimizer={kind="sgd", lr=0.5}'  # in five rounds 0.3 is slower, 1 wavers, 3 diverges
DEFAULTS = "its defaults"
ADAM = "lr is about what a coordinate moves in a round; four local steps at 0.003 move one by up to 0.012"
NO_LIARS = "its defaults, and nobody lies"
PERSONAL = "what counts is its personal loss"


@dataclass(frozen=True)
class Rule:
    """A rule of the comparison: its name in it, its changes to the recipe, and why those; `main`: with all seeds."""

    name: str
    changes: tuple[str, ...]
    why: str = DEFAULTS
    main: bool = False


def _plain(kind: str, *changes: str, why: str = DEFAULTS, main: bool = False) -> Rule:
    """A rule that has the name of its kind of strategy, with the demo's other keys."""
    return Rule(kind, (f"strategy.kind={kind}", *changes), why, main)


RULES = (
    Rule("fedavg", (), "FedIT, the baseline, with the demo's optimizer", main=True),
    *(_plain(kind, main=True) for kind in ("ffa", "rolora", "fedex", "flexlora", "fedsvd")),
    _plain("fedadam", "strategy.lr=5e-3", why=ADAM, main=True),
    _plain("scaffold", SGD, why="c_k is a mean gradient for plain SGD alone", main=True),
    Rule("fedavg_sgd", (SGD,), "what SCAFFOLD, FedNova, q-FedAvg and Fed-SB must be compared with"),
    _plain("fednova", SGD, why="tau_k is known for SGD alone"),
    _plain("qfedavg", SGD, why="1 / lr stands for the loss's curvature, which holds for SGD alone"),
    _plain("fedsb", SGD, why="adaptive optimizers leave the span of its basis"),
    _plain("fedprox"),
    _plain("fedavgm", "strategy.lr=0.3", why="momentum 0.9 adds up to ten changes, of which 0.3 leaves three"),
    _plain("fedadagrad", "strategy.lr=5e-3", why="as FedAdam"),
    _plain("fedyogi", "strategy.lr=5e-3", why="as FedAdam"),
    _plain("diloco", 'train.state="keep"', why="its clients keep their optimizer's state"),
    *map(_plain, ("feddyn", "centred_clipping", "flora")),
    Rule("hetlora", ("strategy=hetlora",), "its weights, by norm; one rank for all"),
    *(_plain(kind, why=NO_LIARS) for kind in ("median", "trimmed_mean", "krum", "multi_krum", "bulyan", "rfa")),
    Rule("local", ("strategy=local",), PERSONAL),
    _plain("fedsa", why=PERSONAL),
    _plain("feddpa", why=f"{PERSONAL}; two adapters of half the rank"),
    _plain("ditto", why=PERSONAL),
)
