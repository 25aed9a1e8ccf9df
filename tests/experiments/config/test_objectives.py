"""What a recipe says of its objective, and the sentences about what it should have said."""

import re

import pytest

from engine.messages.errors import RunError
from engine.objectives.dpo import Dpo
from engine.objectives.kto import Kto
from engine.objectives.sft import Sft
from experiments.config.recipe import parse_recipe, to_toml


def test_an_objective_is_a_word_or_a_section(small_recipe):
    assert small_recipe().train.objective == small_recipe("train.objective=sft").train.objective == Sft()
    assert small_recipe("train.objective=dpo").train.objective == Dpo()
    assert small_recipe("train.objective=dpo", "train.objective.beta=0.3").train.objective == Dpo(beta=0.3)
    several = 'train.objective={kind="dpo", loss_type=["ipo", "sft"], loss_weights=[1.0, 0.5]}'
    recipe = small_recipe(several)
    assert recipe.train.objective == Dpo(loss_type=("ipo", "sft"), loss_weights=(1.0, 0.5))
    assert parse_recipe(to_toml(recipe)) == recipe
    assert small_recipe('train.objective={kind="kto", kl="none"}').train.objective == Kto(kl="none")


@pytest.mark.parametrize(
    ("objective", "sentence"),
    [
        ('"dpp"', "'train.objective' has no kind 'dpp'; did you mean 'dpo'? There is 'sft', 'dpo'"),
        ('"KTO"', "'train.objective' has no kind 'KTO'; did you mean 'kto'?"),
        ("{beta=0.1}", "'train.objective' needs a kind: 'sft' or 'dpo' or 'kto'"),
        ("3", "'train.objective' should be a section, not 3"),
        (
            '{kind="dpo", losss="ipo"}',
            "there is no key 'train.objective.losss'; did you mean 'loss_type' or 'loss_weights'? [train.objective]",
        ),
        ('{kind="dpo", loss="ipo"}', "'train.objective.loss'; did you mean 'loss_type'? [train.objective] takes kind"),
        (
            '{kind="dpo", gamma=1.0}',
            "there is no key 'train.objective.gamma'; train.objective.kind = 'simpo' has it. [train.objective] takes",
        ),
        ('{kind="kto", loss_type="kto"}', "train.objective.kind = 'dpo' or 'cpo' or 'grpo' has it"),
        ('{kind="dpo", loss_type="ipoo"}', "'discopop' or 'sft' or a valid array, not 'ipoo'; did you mean 'ipo'?"),
        (
            '{kind="dpo", loss_type=["ipo", "Sigmoid"]}',
            "'train.objective.loss_type' should be 'sigmoid', 'robust', 'hinge', 'ipo', 'sigmoid_norm', 'exo_pair', "
            "'nca_pair', 'bco_pair', 'sppo_hard', 'apo_zero', 'apo_down', 'discopop' or 'sft', not 'Sigmoid'; did you "
            "mean 'sigmoid'?",
        ),
        ('{kind="dpo", loss_type=["ipo", 3, 4]}', "'discopop' or 'sft', not 3"),
        ('{kind="dpo", loss_weights=["a", "b"]}', "'train.objective.loss_weights' should be a valid number, not 'a'"),
        ('{kind="dpo", loss_weights=[nan]}', "train.objective.loss_weights is [nan]: give finite numbers"),
        ('{kind="dpo", loss_type=[]}', "train.objective.loss_type is []: name each loss once"),
        (
            '{kind="dpo", reference="bas"}',
            "should be 'base', 'start', 'round' or 'none', not 'bas'; did you mean 'base'?",
        ),
        ('{kind="dpo", beta="x"}', "'train.objective.beta' should be a valid number, not 'x'"),
        ('{kind="sft", packng=true}', "'train.objective.packng'; did you mean 'packing'? [train.objective] takes kind"),
    ],
)
def test_a_wrong_objective_is_one_sentence_that_names_the_nearest(small_recipe, objective, sentence):
    with pytest.raises(RunError, match=re.escape(sentence)) as error:
        small_recipe(f"train.objective={objective}")
    assert "\n" not in str(error.value)


def test_a_key_of_another_kind_is_not_given_as_its_own_remedy(small_recipe):
    with pytest.raises(RunError, match=r"privacy\.dp\.noise'; privacy\.dp\.kind = 'distributed' has it\. \[privacy"):
        small_recipe('privacy.dp={kind="central", clip=1.0, noise=1.0}')
