"""What privacy does not go with: refused before anything starts, with a way out that works."""

from typing import get_args

import pytest

from strategies import Strategies

FULL = "privacy.secagg.mode=full"
CAPPED = "privacy.rows_cap=20"
UNIFORM = "strategy={kind='fedavg', weighting='uniform'}"
EACH = [kind().kind for kind in get_args(Strategies) if kind.reads != "sum"]


@pytest.mark.parametrize("mode", ["ideal", "full"])
@pytest.mark.parametrize("kind", EACH)
def test_every_rule_that_reads_more_than_a_sum_is_refused(small_recipe, kind, mode):
    changes = (f"strategy={kind}", "cohort.size=15", f"privacy.secagg.mode={mode}", "privacy.rows_cap=20")
    with pytest.raises(
        ValueError, match=r"secure aggregation gives the server one sum a round: take .*\"centered_clip"
    ):
        small_recipe(*changes)
    small_recipe(*changes, "privacy.secagg.mode=off")
    small_recipe(*changes, "strategy={kind='centered_clipping'}")


@pytest.mark.parametrize(
    ("changes", "said", "mended"),
    [
        (["strategy=local", FULL, CAPPED], "sends nothing that could be summed", ["strategy=fedavg"]),
        (["strategy=fedavg", FULL], r"set privacy\.rows_cap, or", [CAPPED]),
        (["strategy=fedavg", FULL], r"weighs clients by their rows", ["strategy.weighting=uniform"]),
        (["strategy=qfedavg", "strategy.lipschitz=1.0", FULL, CAPPED], "without a bound", ["strategy=fedavg"]),
        (["strategy={kind='hetlora', gamma=1.0}", FULL, CAPPED], "without a bound", ["strategy.weighting=examples"]),
        (
            ["strategy=scaffold", "train.optimizer={kind='sgd', lr=0.1}", FULL],
            r"sends the sum 'c' beside .* set privacy\.secagg\.bounds\.c",
            ["privacy.secagg.bounds={c=1.0}"],
        ),
        (
            ["privacy.secagg.bounds={d=1.0}", FULL, CAPPED],
            "names 'd', but .* sends no such sum",
            ["privacy.secagg.bounds={}"],
        ),
        (["privacy.secagg.threshold=9", FULL, CAPPED], "threshold must be 2 to 5", ["privacy.secagg.threshold=4"]),
        (
            ["privacy.secagg.neighbors=3", FULL, CAPPED],
            "number of neighbors must be",
            ["privacy.secagg.neighbors=4"],
        ),
        (
            ["privacy.secagg.active=true", "privacy.secagg.threshold=2", FULL, CAPPED],
            "active profile",
            ["privacy.secagg.threshold=4"],
        ),
        (["cohort.size=1", FULL, CAPPED], "at least 2 clients", ["cohort.size=2"]),
        (
            ["privacy.secagg.bits=8", "cohort.size=80", FULL, CAPPED],
            r"a cohort of 80 does not fit a ring of 8 bits: at most 63 clients do",
            ["cohort.size=63"],
        ),
        (["privacy.secagg.min_contributors=6", FULL, CAPPED], "more than the 5 clients of a cohort", ["cohort.size=6"]),
        (
            ["privacy.secagg.min_contributors=1", FULL, CAPPED],
            "must be at least 2",
            ["privacy.secagg.min_contributors=2"],
        ),
        (["privacy.secagg.bound=0.0", FULL, CAPPED], "numbers above 0, but bound is 0", ["privacy.secagg.bound=0.1"]),
        (
            [
                "strategy={kind='hetlora', weighting='examples', gamma=1.0}",
                "model.peft={kind='lora', r=8, ranks=[{r=4, share=0.9}, {r=8, share=0.1}]}",
                FULL,
                CAPPED,
            ],
            r"0.5 clients are expected to have rank 8",
            ["cohort.size=20"],
        ),
        (["privacy.dp={kind='central', noise_multiplier=1.0}"], "weighs clients by their rows", [UNIFORM]),
        (
            ["privacy.dp={kind='distributed', noise_multiplier=1.0}", UNIFORM],
            "hides nothing where the server sees single updates",
            [FULL],
        ),
        (
            ["privacy.dp={kind='central', noise_multiplier=0.0, epsilon=2.0}", UNIFORM],
            "with a noise multiplier of 0, which gives none at all",
            ["privacy.dp={kind='central', epsilon=2.0}"],
        ),
        (
            ["privacy.dp={kind='central', noise_multiplier=1.0}", "strategy=krum", "cohort.size=15"],
            "reads each update",
            ["strategy={kind='fedavg', weighting='uniform'}"],
        ),
        (
            ["privacy.dp={kind='example', noise_multiplier=1.0}", "strategy={kind='qfedavg', lipschitz=1.0}"],
            "sends the loss before training",
            ["strategy={kind='fedavg'}"],
        ),
        (
            ["cohort={kind='poisson', size=5}", "privacy.dp={kind='central', noise_multiplier=1.0}", UNIFORM, FULL],
            "which tells how many came",
            ["privacy.dp.sampling=none"],
        ),
        (
            [
                "cohort={kind='poisson', size=5, cap=20}",
                "privacy.dp={kind='distributed', noise_multiplier=1.0, sampling='poisson'}",
                UNIFORM,
                FULL,
            ],
            "how many came to a round without a sum",
            ["privacy.dp.sampling=none"],
        ),
        (["evaluate.without_privacy=true", CAPPED], "there is no privacy to do without", [FULL]),
        (["clients.availability.dropout=1.0"], "below 1", ["clients.availability.dropout=0.9"]),
        (["clients.availability.deadline_s=0.0"], "must be above 0", ["clients.availability.deadline_s=1.0"]),
    ],
)
def test_what_privacy_does_not_go_with(small_recipe, changes, said, mended):
    with pytest.raises(ValueError, match=said):
        small_recipe(*changes)
    small_recipe(*changes, *mended)


def test_kinds_may_be_given_by_their_name_alone(small_recipe):
    recipe = small_recipe("privacy.dp=none")
    assert recipe.privacy.dp.kind == "none" and not recipe.privacy.secure and recipe.privacy.simulated
    assert not small_recipe(FULL, CAPPED).privacy.simulated


def test_who_drops_out_is_a_function_of_the_seed(small_recipe):
    availability = small_recipe("clients.availability.dropout=0.3").clients.availability
    gone = availability.gone(range(1000), 3, 7)
    assert gone == availability.gone(range(1000), 3, 7) != availability.gone(range(1000), 3, 8)
    assert 250 < len(gone) < 350 and {leaving.before for leaving in gone.values()} == {"keys", "shares", "masked input"}
    assert {c: leaving for c, leaving in gone.items() if c < 10} == availability.gone(range(10), 3, 7)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ((), 3),
        (("evaluate.samples=1",), 1),
        (("evaluate.samples=0",), 0),
        (("privacy.secagg.mode=ideal",), 0),
        (("privacy.secagg.mode=full",), 0),
        (("privacy.dp={kind='central', noise_multiplier=1.0}",), 0),
        (("privacy.dp={kind='example', noise_multiplier=1.0}",), 0),
        (("privacy.secagg.mode=full", "evaluate.samples=2"), 2),
    ],
)
def test_rows_leave_a_private_run_only_where_the_recipe_asks_for_them(small_recipe, changes, shown):
    recipe = small_recipe("strategy={kind='fedavg', weighting='uniform'}", *changes)
    assert recipe.samples == shown
    private = any("privacy" in change for change in changes)
    assert (recipe.shown_rows is not None) == (private and shown > 0)
