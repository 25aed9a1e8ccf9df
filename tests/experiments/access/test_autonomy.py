"""What an owner of a base can do to clients, read off runs."""

from dataclasses import replace

import pytest

from engine.config.access import Access
from engine.config.ends import Ends
from engine.config.prefixes import Projected, PromptWords
from engine.messages.events import Fault
from engine.records.logs import Logs
from experiments.access.autonomy import lowered, replaced_effect, same_again, with_replaced
from strategies.averaging.fedavg import FedAvg
from strategies.black_box.cma_search import CmaSearch
from strategies.black_box.words import Words


def written(folder, losses, noticed=None):
    """A run folder with a training loss for each round."""
    logs = Logs.under(folder)
    for round_, loss in enumerate(losses, 1):
        logs.metrics.add(round_, "train", None, loss=loss)
        logs.metrics.add_each(round_, "train", ["ada"], [{"loss": loss}])
        if round_ == noticed:
            logs.faults.happened(round_, [Fault("provider", "the provider", "changed")], 0.0)
        logs.flush(round_)
    return folder


def test_two_runs_are_compared_round_by_round(tmp_path):
    first = written(tmp_path / "a", [3.0, 2.0, 1.0])
    assert same_again(first, written(tmp_path / "b", [3.0, 2.0, 9.0]), 2) == "the same bits in 2 rounds"
    assert same_again(first, written(tmp_path / "c", [3.0, 2.5, 1.0]), 3) == "differs from round 2 on"


def test_what_another_base_does(tmp_path):
    folder = written(tmp_path / "a", [3.0, 2.0, 2.8, 1.9], noticed=3)
    assert replaced_effect(folder, 4) == "training loss 2.000 to 2.800, recovered in round 4, noticed in round 3"
    folder = written(tmp_path / "b", [3.0, 2.0, 2.8, 2.7])
    assert replaced_effect(folder, 4) == "training loss 2.000 to 2.800, never recovered, not noticed"


@pytest.fixture
def at(small_recipe):
    def made(level, rule, peft):
        recipe = small_recipe()
        return replace(recipe, strategy=rule, model=replace(recipe.model, peft=peft, access=Access(level=level)))

    return made


def test_which_lower_levels_stop_a_run(at, small_recipe):
    assert lowered(at("api_gradients", CmaSearch(), Projected())) == "stops at api_text, api_logprobs"
    assert lowered(at("api_logprobs", Words(), PromptWords())) == "stops at api_text"
    assert lowered(at("api_logprobs", Words(score="match"), PromptWords())) == "goes on at each lower level"
    assert lowered(small_recipe()) == "nobody can lower it"
    assert lowered(at("emulator", FedAvg(), Ends())) == "there is no lower level"


def test_a_base_is_replaced_in_the_middle(at):
    recipe = with_replaced(at("api_logprobs", Words(), PromptWords()), "other")
    assert [(event.kind, event.round, event.to) for event in recipe.model.access.events] == [("replace", 3, "other")]
