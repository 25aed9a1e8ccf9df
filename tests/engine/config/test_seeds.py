"""What goes with full tuning by scalars."""

from dataclasses import replace

import pytest

from engine.config.access import Access
from engine.config.privacy import Privacy
from engine.config.seeds import Seeds
from engine.config.train import AdamW, Sgd
from engine.messages.errors import RunError
from engine.objectives.dpo import Dpo
from strategies.averaging.fedavg import FedAvg
from strategies.zeroth_order.fedkseed import FedKSeed


@pytest.fixture
def scalars(federation):
    """A federation of the rule and the kind."""

    def made(rule=None, model=None, train=None, **sections):
        model = replace(federation.model, peft=Seeds(candidates=8), **(model or {}))
        train = replace(federation.train, **({"optimizer": Sgd(lr=1e-3)} | (train or {})))
        return replace(federation, strategy=rule or FedKSeed(), model=model, train=train, **sections)

    return made


SECURE = Privacy(secagg=replace(Privacy().secagg, mode="ideal"), rows_cap=8)


def test_the_pair_goes_together_and_with_secure_sums(scalars):
    assert scalars().model.peft.candidates == 8
    assert scalars(privacy=SECURE).privacy.secure


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rule": FedAvg()}, "has no gradient that the strategy 'fedavg' could average: take strategy = 'fedkseed'"),
        ({"train": {"optimizer": AdamW()}}, "moves along one direction at a time: set train.optimizer"),
        ({"train": {"optimizer": Sgd(lr=1.0, momentum=0.9)}}, "momentum = 0 }"),
        ({"train": {"optimizer": Sgd(lr=1.0, weight_decay=0.1)}}, "set train.optimizer.weight_decay = 0"),
        ({"train": {"state": "keep"}}, 'set train.state = "reset"'),
        ({"train": {"objective": Dpo()}}, "needs another model, samples, or a head"),
        ({"model": {"compile": True}}, "leave model.compile out"),
        ({"model": {"access": Access(level="api_gradients")}}, 'needs "weights" of the base'),
        ({"rule": FedKSeed(draw="own"), "privacy": SECURE}, 'set strategy.draw = "shared"'),
    ],
)
def test_what_does_not_go_is_refused_with_the_way_out(scalars, changes, what):
    with pytest.raises(RunError) as refused:
        scalars(**changes)
    assert what in str(refused.value)
