"""Levels, terms, and which rule goes with which level."""

from dataclasses import replace
from typing import get_args

import pytest

from engine.config.access import Access, Jitter, Lower, Price, Remove, ReplaceBase, Reprice
from engine.config.adapters import Lora
from engine.config.prefixes import Prefix, Projected, Prompt, PromptWords
from engine.config.privacy import ExampleDp, Privacy
from engine.config.sections import Clients, Evaluate
from engine.messages.errors import RunError
from engine.objectives.dpo import Dpo
from strategies.averaging.fedavg import FedAvg
from strategies.black_box.cma_search import CmaSearch
from strategies.black_box.fedbpt import FedBpt
from strategies.black_box.words import Words
from strategies.core.access import BOXES, GRANTS, LEVELS, Capability, is_home, lowest
from strategies.lora.hetlora import HetLora
from strategies.transforms.chain import Clip

PRICE = Price(input=0.15, output=0.6)
PAIRS = {
    "words": (Words(), PromptWords()),
    "words by texts": (Words(score="match"), PromptWords()),
    "cma": (CmaSearch(), Projected()),
    "fedbpt": (FedBpt(), Projected()),
    "prompt": (FedAvg(), Prompt()),
    "prefix": (FedAvg(), Prefix()),
    "lora": (FedAvg(), Lora()),
}
RUNS = {  # at which levels each pair runs, by hand
    "words": {"api_logprobs", "api_embeddings", "api_gradients"},
    "words by texts": {"api_text", "api_logprobs", "api_embeddings", "api_gradients"},
    "cma": {"api_embeddings", "api_gradients"},
    "fedbpt": {"api_embeddings", "api_gradients"},
    "prompt": {"api_gradients"},
    "prefix": {"api_gradients"},
    "lora": set(),
}


@pytest.fixture
def at(federation):
    """A federation of a pair at a level."""

    def made(name, level="weights", access=None, **sections):
        rule, peft = PAIRS[name]
        model = replace(federation.model, peft=peft, access=access or Access(level=level))
        return replace(federation, model=model, strategy=rule, **sections)

    return made


def test_levels_are_sets_and_no_ladder():
    assert tuple(GRANTS) == LEVELS == tuple(BOXES)
    assert not GRANTS["emulator"] & GRANTS["api_gradients"]  # an emulator does not generate what the base would
    assert {capability for granted in GRANTS.values() for capability in granted} == set(get_args(Capability))
    assert [level for level in LEVELS if is_home(level)] == ["weights", "weights_data"]
    assert lowest({"score"}) == "api_logprobs" and lowest({"generate", "inject"}) == "api_embeddings"
    assert lowest({"weights"}) == "weights" and lowest(set()) == "api_text"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", PAIRS)
def test_each_pair_is_refused_or_runs_at_each_level(at, name, level):
    if level in RUNS[name] or is_home(level):
        assert at(name, level).model.access.level == level
        return
    with pytest.raises(RunError, match=f'model.access.level = "{level}" does not grant: set it to "'):
        at(name, level)


def test_a_refusal_names_what_works(at):
    with pytest.raises(RunError) as refused:
        at("lora", "api_logprobs")
    assert str(refused.value) == (
        "the strategy 'fedavg' with model.peft = 'lora' needs \"weights\" of the base, which model.access.level = "
        "\"api_logprobs\" does not grant: set it to \"weights\", or take strategy = 'words' with model.peft = 'words'"
    )


def test_rules_and_kinds_that_do_not_belong_together_are_refused(federation, at):
    with pytest.raises(RunError, match=r"'words' tunes model\.peft = 'words', not 'lora'"):
        replace(federation, strategy=Words())
    with pytest.raises(
        RunError, match="has no gradient that the strategy 'fedavg' could average: take strategy = 'cma' or 'fedbpt'"
    ):
        replace(at("prompt"), model=replace(federation.model, peft=Projected()))
    with pytest.raises(RunError, match="is searched from the seed's own first prompt"):
        replace(at("words"), model=replace(at("words").model, start="runs/earlier"))


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"clients": Clients(lanes=2)}, "clients.lanes above 1|does not work with several lanes"),
        ({"evaluate": Evaluate(finetune=1)}, "evaluate.finetune"),
        ({"evaluate": Evaluate(overlap=True)}, "evaluate.overlap"),
        ({"privacy": Privacy(dp=ExampleDp(clip=1.0, noise_multiplier=1.0))}, "privacy.dp"),
    ],
)
def test_what_needs_the_base_at_home_is_refused_below(at, sections, what):
    with pytest.raises(RunError, match=what):
        at("prompt", "api_gradients", **sections)


def test_what_a_search_cannot_do_is_refused(at, federation):
    with pytest.raises(RunError, match="no change that transforms could work on"):
        at("cma", transforms=(Clip(1.0),))
    with pytest.raises(RunError, match="compares candidates by one loss on the same rows"):
        at("words", train=replace(federation.train, objective=Dpo()))
    with pytest.raises(RunError, match="for which there is no noise here"):
        at("words", privacy=Privacy(dp=ExampleDp(clip=1.0, noise_multiplier=1.0)))
    with pytest.raises(RunError, match="secure aggregation gives the server one sum"):
        at("fedbpt", privacy=Privacy(secagg=replace(Privacy().secagg, mode="ideal")))


def test_a_rule_of_adapters_does_not_work_on_prompts(federation):
    with pytest.raises(RunError, match=r'works on adapters, but model\.peft is "prompt"'):
        replace(federation, strategy=HetLora(), model=replace(federation.model, peft=Prompt()))


def test_terms_by_round():
    events = (
        Reprice(round=2, price=Price(input=1.0, output=1.0)),
        Lower(round=3, to="api_text"),
        ReplaceBase(round=3, to="other"),
        Jitter(round=4, nats=0.1),
        Remove(round=6),
    )
    access = Access(level="api_logprobs", price=PRICE, events=events)
    terms = [access.in_round(round_) for round_ in range(1, 8)]
    assert [each.level for each in terms] == ["api_logprobs"] * 2 + ["api_text"] * 5
    assert [each.base for each in terms] == [None, None, *["other"] * 5]
    assert [each.nats for each in terms] == [0, 0, 0, 0.1, 0.1, 0.1, 0.1]
    assert [each.removed for each in terms] == [None] * 5 + [6, 6]
    assert [each.price.input for each in terms] == [0.15] + [1.0] * 6
    assert PRICE.cost(2_000_000, 1_000_000) == pytest.approx(0.9)


def test_the_owner_s_declarations_are_said_before_the_first_round():
    assert Access().notes() == Access(level="emulator").notes() == ()
    (silent,) = Access(level="api_text").notes()
    assert silent.endswith("who does not say how long it keeps them and does not say whether it trains on them")
    (said,) = Access(level="api_text", retain_days=30, trains_on=False).notes()
    assert said.endswith("who keeps them 30 days and does not train on them")


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"price": PRICE}, 'price is a provider\'s, and at the level "weights" clients have the base at home'),
        ({"level": "api_text", "max_cost": 1.0}, "max_cost needs a price"),
        ({"level": "api_text", "events": (Remove(round=0),)}, "round must be at least 1"),
        ({"level": "api_logprobs", "events": (Lower(round=1, to="emulator"),)}, "does not grant less"),
        ({"level": "api_text", "retain_days": -1}, "retain_days must be at least 0"),
    ],
)
def test_terms_that_cannot_be(given, what):
    with pytest.raises(RunError, match=what):
        Access(**given)
