"""What a recipe takes, told from a configuration: counted as the model counts, and less where more ranks share."""

import pytest
from transformers import AutoModelForCausalLM

from engine.settings import Zero
from experiments.config import load_recipe, to_toml
from experiments.plan import GIB, rank_need, show_plan, sizes, slot_need, smallest


@pytest.fixture(scope="module")
def tuned(small_recipe):
    return small_recipe("model.peft=none")


def test_parameters_are_those_of_the_model(small_recipe, tuned, tiny_base):
    whole = AutoModelForCausalLM.from_pretrained(tiny_base)
    found = sizes(tuned.model, 48)
    assert found.parameters == found.trained == whole.num_parameters() and found.itemsize == 4
    assert found.largest == max(parameter.numel() for parameter in whole.parameters())
    adapted = sizes(small_recipe().model, 48)
    assert adapted.parameters - adapted.trained == whole.num_parameters()


def test_activations_grow_with_the_length_and_not_with_what_is_trained(tuned):
    short, long = sizes(tuned.model, 32), sizes(tuned.model, 64)
    assert 1.9 < long.activations / short.activations < 4.1
    assert long.logits == 2 * short.logits


def test_each_stage_and_each_rank_takes_off(tuned):
    found = sizes(tuned.model, 48)
    totals = [rank_need(found, tuned, Zero(stage=stage, ranks=4), 0.0).total for stage in (1, 2)]
    assert totals[1] < totals[0]
    optimizer = [rank_need(found, tuned, Zero(stage=1, ranks=ranks), 0.0).optimizer for ranks in (1, 2, 4)]
    assert optimizer == [8 * found.trained / ranks for ranks in (1, 2, 4)]  # AdamW has two vectors of float32
    assert slot_need(found, tuned, 0.0).optimizer == 8 * found.trained


def test_the_smallest_gang_is_no_larger_than_it_must_be(tuned):
    found = sizes(tuned.model, 48)
    assert smallest(found, tuned, 100 * GIB, 0.0) == Zero(stage=1, ranks=1)
    assert smallest(found, tuned, 1000.0, 0.0) is None
    one = rank_need(found, tuned, Zero(stage=1, ranks=1), 0.0).total
    chosen = smallest(found, tuned, one, 0.0)  # a tenth is kept spare
    assert (chosen is not None and chosen.ranks > 1) or chosen.stage > 1


def test_the_command_says_whether_it_fits(command, small_recipe, tmp_path, capsys):
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(small_recipe()))
    tight = command("plan", path, "--device-gib", "0.1", COLUMNS="120")
    assert tight.returncode == 1 and "it does not fit" in tight.stdout and tight.stderr == ""
    assert "stage 3, 2 ranks" in tight.stdout and "no gang of up to 1,024 ranks fits" in tight.stdout
    assert show_plan(load_recipe(path), 64.0, 1)
    said = capsys.readouterr().out
    assert "it fits" in said and "smallest gang" in said
