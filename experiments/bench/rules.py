"""What `fedpost bench strategies` compares: each rule with its own keys, and why it does not run with the others'.

All rules have the demo's AdamW with its learning rate of 0.003, and clients that count the same, unless said. Nothing
is tuned but what is said.
Rules whose theory counts on plain SGD have SGD, and stand against FedAvg on SGD.
"""

from dataclasses import dataclass

SGD = 'train.optimizer={kind="sgd", lr=0.5}'  # in five rounds 0.3 is slower, 1 wavers, 3 diverges


@dataclass(frozen=True)
class Rule:
    """A rule of the comparison: its name in it, its changes to the recipe, and why those; `main`: with all seeds."""

    name: str
    changes: tuple[str, ...]
    why: str = "its defaults"
    main: bool = False


RULES = (
    Rule("fedavg", (), "FedIT, the baseline, with the demo's optimizer", main=True),
    Rule("ffa", ("strategy.kind=ffa",), main=True),
    Rule("rolora", ("strategy.kind=rolora",), main=True),
    Rule("fedex", ("strategy.kind=fedex",), main=True),
    Rule("flexlora", ("strategy.kind=flexlora",), main=True),
    Rule("fedsvd", ("strategy.kind=fedsvd",), main=True),
    Rule(
        "fedadam",
        ("strategy.kind=fedadam", "strategy.lr=5e-3"),
        "lr is about what a coordinate moves in a round; four local steps at 0.003 move one by up to 0.012",
        main=True,
    ),
    Rule("scaffold", ("strategy.kind=scaffold", SGD), "c_k is a mean gradient for plain SGD alone", main=True),
    Rule("fedavg_sgd", (SGD,), "what SCAFFOLD, FedNova, q-FedAvg and Fed-SB must be compared with"),
    Rule("fednova", ("strategy.kind=fednova", SGD), "tau_k is known for SGD alone"),
    Rule(
        "qfedavg", ("strategy.kind=qfedavg", SGD), "1 / lr stands for the loss's curvature, which holds for SGD alone"
    ),
    Rule("fedsb", ("strategy.kind=fedsb", SGD), "adaptive optimizers leave the span of its basis"),
    Rule("fedprox", ("strategy.kind=fedprox",)),
    Rule(
        "fedavgm",
        ("strategy.kind=fedavgm", "strategy.lr=0.3"),
        "momentum 0.9 adds up to ten changes, of which 0.3 leaves three",
    ),
    Rule(
        "fedadagrad",
        ("strategy.kind=fedadagrad", "strategy.lr=5e-3"),
        "as FedAdam",
    ),
    Rule(
        "fedyogi",
        ("strategy.kind=fedyogi", "strategy.lr=5e-3"),
        "as FedAdam",
    ),
    Rule("diloco", ("strategy.kind=diloco", 'train.state="keep"'), "its clients keep their optimizer's state"),
    Rule("feddyn", ("strategy.kind=feddyn",)),
    Rule("centred_clipping", ("strategy.kind=centred_clipping",)),
    Rule("flora", ("strategy.kind=flora",)),
    Rule("hetlora", ("strategy=hetlora",), "its own weights, by norm; one rank for all"),
    Rule("median", ("strategy.kind=median",), "its defaults, and nobody lies"),
    Rule("trimmed_mean", ("strategy.kind=trimmed_mean",), "its defaults, and nobody lies"),
    Rule("krum", ("strategy.kind=krum",), "its defaults, and nobody lies"),
    Rule("multi_krum", ("strategy.kind=multi_krum",), "its defaults, and nobody lies"),
    Rule("bulyan", ("strategy.kind=bulyan",), "its defaults, and nobody lies"),
    Rule("rfa", ("strategy.kind=rfa",), "its defaults, and nobody lies"),
    Rule("local", ("strategy=local",), "what counts is its personal loss"),
    Rule("fedsa", ("strategy.kind=fedsa",), "what counts is its personal loss"),
    Rule("feddpa", ("strategy.kind=feddpa",), "what counts is its personal loss; two adapters of half the rank"),
    Rule("ditto", ("strategy.kind=ditto",), "what counts is its personal loss"),
)
