"""The engine checks a recipe by what its rule declares: a user's own rule is refused where a shipped one is."""

import ast
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from engine.messages.errors import RunError
from strategies.core.base import AveragingRule, NeedsSgd, Rule
from strategies.core.errors import StrategyError
from strategies.lora.products import FedExLora

ROOT = Path(__file__).resolve().parents[3]
CONCRETE = tuple(f"strategies.{room}." for room in ("averaging", "lora", "personalized", "robust"))
SGD = 'train.optimizer={kind="sgd", lr=0.1}'
GANGS = "clients.zero={stage=3, ranks=2}"
FULL_TUNING = "model.peft=none"
MIXED = 'model.peft={kind="lora", r=8, ranks=[{r=4, share=0.9}, {r=8, share=0.1}]}'
SECURE = ("privacy.secagg={mode='ideal'}", "privacy.rows_cap=8")
NOISY = ("privacy.dp={kind='central', noise_multiplier=1, clip=1, delta=0.1}", "privacy.rows_cap=8")


def declared(**attributes: object) -> Rule:
    """A rule of somebody's own, no relative of a shipped one, that declares this and nothing else."""
    return dataclass(frozen=True)(type("Own", (AveragingRule,), {"__module__": __name__, **attributes}))()


def refused(recipe, rule, said: str, named: str = "Own") -> None:
    with pytest.raises((RunError, StrategyError), match=said) as error:
        replace(recipe, strategy=rule)
    assert named in str(error.value)


@dataclass(frozen=True)
class Merging(AveragingRule):
    """Merges into the base as FedEx does, and has nothing else in common with it."""

    merges_into_base: ClassVar[bool] = True


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["evaluate.overlap=true"], "evaluate.overlap does not work with"),
        ([GANGS], "needs whole vectors"),
        ([FULL_TUNING], "works on adapters"),
        ([MIXED], "needs one rank for all clients"),
    ],
)
def test_an_own_rule_that_merges_into_the_base_is_refused_where_fedex_is(small_recipe, changes, said):
    start = "strategy=flora" if MIXED in changes else "strategy=fedavg"
    recipe = small_recipe(start, *changes)
    refused(recipe, Merging(), said, "Merging")
    refused(recipe, FedExLora(), said, "'fedex'")
    replace(small_recipe(), strategy=Merging())


@pytest.mark.parametrize(
    ("attributes", "changes", "said"),
    [
        ({"needs_lora": True}, [FULL_TUNING], "works on adapters"),
        ({"lora_rank_multiple": 3}, [], "3 equal parts, but model.peft.r is 8: set it to 9"),
        ({"reads": "each"}, [GANGS], "needs whole vectors"),
        ({"reads": "each"}, SECURE, "reads each update, and secure aggregation"),
        ({"reads": "passes"}, NOISY, "reads several sums"),
        ({"elementwise": False}, [GANGS], "needs whole vectors"),
        ({"personalizes": True, "keeps_state": True}, [GANGS], "needs whole vectors"),
        ({"personalizes": True, "keeps_state": True}, ["evaluate.overlap=true"], "evaluate.overlap does not work"),
        ({"keeps_basis": False}, ['train.state="keep"'], "another meaning from round to round"),
        ({"freezes": True}, ["train.optimizer={kind='adamw', weight_decay=0.1}"], "weight decay would shrink"),
        ({"freezes": True}, ["transforms=[{kind='projection'}]"], "a projection's noise would move"),
        ({"sends_update": False}, ["transforms=[{kind='int8'}]"], "sends nothing that could be transformed"),
        ({"sends_update": False}, SECURE, "sends nothing that could be summed"),
        ({"sends_update": False}, NOISY, "sends nothing that could be made private"),
        ({"sends_products": True, "needs_lora": True}, ["transforms=[{kind='int8'}]"], "sends products beside"),
        ({"sends_products": True}, [FULL_TUNING], "works on adapters"),
        ({"needs_optimizer": NeedsSgd("wants SGD")}, [], 'wants SGD: set train.optimizer = { kind = "sgd" }'),
        ({"needs_optimizer": NeedsSgd("wants SGD", momentum=0.5)}, [SGD], r"momentum = 0\.5 }"),
        (
            {"needs_optimizer": NeedsSgd("wants SGD", constant=True)},
            [SGD, "train.over_steps={kind='linear'}"],
            "needs one learning rate within a round",
        ),
        (
            {"needs_optimizer": NeedsSgd("wants SGD", divides=True)},
            ["train.optimizer={kind='sgd', lr=0}"],
            "divides by the learning rate",
        ),
        ({"bounded_weights": False}, SECURE, "weighs clients without a bound"),
        ({"picks_coordinates": True}, SECURE, "a sum may show what one client alone sends"),
        ({"picks_coordinates": True}, NOISY, "clients that have not trained shrink what they leave out"),
        ({"loss_before": True}, ["privacy.dp={kind='example', noise_multiplier=1}"], "sends the loss before training"),
    ],
)
def test_each_declaration_of_an_own_rule_counts(small_recipe, attributes, changes, said):
    recipe = small_recipe(*changes)
    replace(recipe, strategy=declared())
    refused(recipe, declared(**attributes), said)


def test_weights_that_are_alike_need_no_cap(small_recipe):
    recipe = small_recipe("strategy={kind='fedavg', weighting='uniform'}", SECURE[0])
    refused(recipe, declared(), "weighs clients by their rows")
    replace(recipe, strategy=declared(weighs_alike=True))


def test_mixed_ranks_leave_blocks_in_the_sum_unless_products_are_sent(small_recipe):
    hetlora = "strategy={kind='hetlora', weighting='examples', gamma=1.0}"
    recipe = small_recipe(hetlora, MIXED, "cohort.size=20", *SECURE)
    few = replace(recipe.cohort, size=5)
    with pytest.raises(RunError, match=r"0\.5 clients are expected to have rank 8"):
        replace(recipe, cohort=few, strategy=declared(mixed_ranks=True, needs_lora=True))
    bounded = replace(recipe.privacy, secagg=replace(recipe.privacy.secagg, bounds={"product": 1.0}))
    products = declared(mixed_ranks=True, needs_lora=True, sends_products=True)
    replace(recipe, cohort=few, privacy=bounded, strategy=products)


def test_pruned_ranks_are_not_counted_as_given(small_recipe):
    """Where two of three clients prune, the others' sum of a row is known, and the third's change is the rest."""
    leaves_out, moves = "'hetlora' leave out coordinates by their own data", "'hetlora' clients .* send a change"
    for privacy, why in ((SECURE, leaves_out), (NOISY, moves)):
        hetlora = small_recipe("strategy={kind='hetlora', weighting='examples', gamma=1.0}", *privacy)
        with pytest.raises(ValueError, match=f"{why} .* with gamma = 1"):
            replace(hetlora, strategy=replace(hetlora.strategy, gamma=0.99))


def test_transforms_that_pick_coordinates_are_not_for_secure_sums(small_recipe):
    chain = "transforms=[{kind='clip'}, {kind='topk', share=0.1}]"
    with pytest.raises(RunError, match=r"'topk' sends the coordinates that each client picks .* \"projection\""):
        small_recipe(chain, *SECURE)
    small_recipe(chain, *NOISY)
    small_recipe("transforms=[{kind='clip'}, {kind='int8'}, {kind='sign'}, {kind='projection'}]", *SECURE)


def test_extras_and_higher_ranks_are_checked_by_their_declarations(small_recipe):
    def beside(self, layout):
        return {"more": layout.size}

    joint = NOISY[0].replace("delta=", "joint=true, delta=")
    recipe = small_recipe(joint, NOISY[1])
    refused(recipe, declared(beside=beside), "which is no change of the model")
    replace(recipe, strategy=declared(beside=beside, extras_are_changes=True))
    mixed = small_recipe(joint, NOISY[1], "strategy=flora", MIXED)
    rule = {"mixed_ranks": True, "needs_lora": True}
    refused(mixed, declared(**rule), "shrinks what lies beyond its own rank")
    replace(mixed, strategy=declared(**rule, keeps_higher_ranks=True))


def test_who_overrides_correct_corrects():
    def correct(self, grad_KP, params_KP, broadcast, client_state, run="global"):
        grad_KP.mul_(2)

    assert declared(correct=correct).corrects and not declared().corrects


@pytest.mark.parametrize("package", ["engine", "strategies/core", "strategies/privacy", "strategies/contract"])
def test_nothing_but_the_recipes_default_names_a_concrete_strategy(package):
    places = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(CONCRETE):
                places.add((path.relative_to(ROOT).as_posix(), node.module))
    assert places <= {("engine/config/sections.py", "strategies.averaging.fedavg")}
