import json

import numpy as np
import pytest

from engine.aggregation.privacy_account import PrivacyAccount, Spending, plan_noise
from strategies.core.layout import Layout
from strategies.privacy.central import CentralDp

WEIGHTS = "weights min(rows, 20) / 20"
LAYOUT = Layout(("w",), ((3,),))
DP = "privacy.dp={kind='central', noise_multiplier=1.0, delta=1e-3}"


@pytest.fixture
def plan(small_recipe):
    planned = plan_noise(small_recipe(DP, "strategy={kind='fedavg', weighting='uniform'}"), LAYOUT, np.full(100, 4), 12)
    assert planned.warned == ()
    return planned.plan


def test_what_is_spent_is_on_disk_before_noise_is_drawn(plan, tmp_path):
    path = tmp_path / "privacy.json"
    spending = Spending.open(path, plan, WEIGHTS, simulated=False, round_=0)
    assert not path.exists()
    first, second = spending.charge(3), spending.charge(3)
    assert 0 < first.epsilon < second.epsilon
    said = json.loads(path.read_text())
    assert said["rounds"] == 2 and said["epsilon"] == second.epsilon and said["statement"] == f"{second}, {WEIGHTS}"
    assert said["weights"] == WEIGHTS
    assert (said["unit"], said["sampling"], said["simulated"]) == ("client", "none", False)


@pytest.mark.parametrize("content", ["", "[]", '{"rounds": "many"}'])
def test_a_damaged_account_of_what_is_spent_is_named(plan, tmp_path, content):
    (tmp_path / "privacy.json").write_text(content)
    with pytest.raises(ValueError, match=r"privacy\.json, the record of privacy spent, cannot be read"):
        Spending.open(tmp_path / "privacy.json", plan, WEIGHTS, simulated=False, round_=3)


def test_fresh_noise_of_a_round_that_is_run_again_is_charged_again(plan, tmp_path):
    path = tmp_path / "privacy.json"
    before = Spending.open(path, plan, WEIGHTS, simulated=False, round_=0)
    spent = [before.charge(3).epsilon for _ in range(3)]
    # The last checkpoint is of round 1: rounds 2 and 3 are run again.
    again = Spending.open(path, plan, WEIGHTS, simulated=False, round_=1)
    assert again.charge(3).epsilon > spent[-1] and again.charged == 4
    seeded = Spending.open(path, plan, WEIGHTS, simulated=True, round_=1)
    assert seeded.charge(3).epsilon == spent[1] and "simulated" in str(seeded.charge(3))


def test_example_level_noise_counts_local_steps(small_recipe, tmp_path):
    recipe = small_recipe("privacy.dp={kind='example', noise_multiplier=1.0, delta=1e-3}")
    plan = plan_noise(recipe, LAYOUT, np.full(100, 40), 12).plan
    simulated = Spending.open(tmp_path / "a.json", plan, WEIGHTS, simulated=True, round_=0).charge(6)
    many = Spending.open(tmp_path / "b.json", plan, WEIGHTS, simulated=True, round_=0)
    assert (simulated.unit, simulated.steps) == ("example", 6)
    assert [many.charge(3).steps for _ in range(2)] == [3, 6]


def test_an_account_without_noise_is_json_for_everybody(small_recipe, tmp_path):
    """JSON has no Infinity."""
    recipe = small_recipe(DP.replace("1.0", "0.0"), "strategy={kind='fedavg', weighting='uniform'}")
    plan = plan_noise(recipe, LAYOUT, np.full(100, 4), 12).plan
    spending = Spending.open(tmp_path / "privacy.json", plan, WEIGHTS, simulated=False, round_=0)
    assert spending.charge(3).epsilon == float("inf")
    said = json.loads((tmp_path / "privacy.json").read_text(), parse_constant=pytest.fail)
    assert said["epsilon"] is None and said["statement"].startswith("epsilon inf at delta 0.001 ")
    again = Spending.open(tmp_path / "privacy.json", plan, WEIGHTS, simulated=False, round_=1)
    assert (again.charged, again.statement) == (1, said["statement"])


def test_a_large_delta_is_said(small_recipe):
    recipe = small_recipe(DP.replace("1e-3", "0.1"), "strategy={kind='fedavg', weighting='uniform'}")
    planned = plan_noise(recipe, LAYOUT, np.full(100, 4), 12)
    assert planned.warned == ("delta = 0.1 is above 1 / 100: to publish one client at random would count as private",)
    assert isinstance(recipe.privacy.dp, CentralDp)


def test_without_privacy_there_is_no_plan(small_recipe):
    assert plan_noise(small_recipe(), LAYOUT, np.full(100, 4), 12) == (None, ())


SHOWN = "2 held-out rows are shown word for word (evaluate.samples)"


def test_rows_that_are_shown_are_in_the_statement_and_said_at_the_start(small_recipe, tmp_path):
    def account(*changes):
        recipe = small_recipe("strategy={kind='fedavg', weighting='uniform'}", *changes)
        return PrivacyAccount.open(recipe, LAYOUT, tmp_path, np.array([4, 20]), 3)

    noisy = account(DP, "evaluate.samples=2")
    noisy.charge()
    assert noisy.statement.endswith(f", outside of epsilon: {SHOWN}") and SHOWN in " ".join(noisy.warned)
    assert SHOWN in " ".join(account("privacy.secagg.mode=full", "evaluate.samples=2").warned)
    assert (
        account(DP).warned == account("privacy.secagg.mode=full").warned == account("evaluate.samples=2").warned == ()
    )


@pytest.mark.parametrize(
    ("privacy", "share"),
    [
        # A ring of 32 bits for 4 clients has (2^31 - 1) // 4 - 1 steps for the bound of 1.
        ("secagg={mode='full'}", 20_000_000 / 10 / 536_870_910),
        # Three coordinates of a vector of norm 3e-5, on a grid of 2^-40.
        ("dp={kind='central', noise_multiplier=0.0, delta=1e-3, clip=3e-5}", 2e6 * 2**-40 * 3**0.5 / 3e-5),
    ],
    ids=["ring", "grid"],
)
def test_a_cap_far_above_the_usual_rows_is_said(small_recipe, tmp_path, privacy, share):
    def warned(cap, strategy="fedavg"):
        changes = f"privacy={{rows_cap={cap}, {privacy}}}", f"strategy={{kind='{strategy}'}}", "cohort.size=4"
        return PrivacyAccount.open(small_recipe(*changes), LAYOUT, tmp_path, np.array([4, 10, 2_000_000]), 3).warned

    assert warned(20) == ()
    least = int(20_000_000 * 0.01 / share)  # from here on a hundredth of a coordinate is lost
    assert warned(int(0.99 * least)) == ()
    (warning,) = warned(int(1.01 * least))
    assert "a client with 10 rows" in warning and "0.01 of their size: set privacy.rows_cap" in warning


def test_delta_for_a_row_follows_the_number_of_all_rows(small_recipe):
    """The smallest client has one row: a delta of 1 / 1^1.1 would let any client publish its rows."""
    rows = np.array([1, 3, 96])
    example = small_recipe("privacy.dp={kind='example', noise_multiplier=1.0}")
    planned = plan_noise(example, LAYOUT, rows, 12)
    assert planned.plan.delta == pytest.approx(100**-1.1) and planned.warned == ()
    # The noise is still for the client whose rows are drawn most often: all of one in each batch of four.
    assert planned.plan.scheme.rate == 1.0

    given = plan_noise(small_recipe("privacy.dp={kind='example', noise_multiplier=1.0, delta=0.02}"), LAYOUT, rows, 12)
    assert given.plan.delta == 0.02
    assert given.warned == ("delta = 0.02 is above 1 / 100: to publish one row at random would count as private",)


PART = "a part of at most 20 rows of one value of the column 'client', of up to 3 parts"


def test_the_statement_names_a_client_that_is_part_of_a_person(small_recipe, tmp_path):
    """Group privacy: k clients have k epsilon, at (e^(k epsilon) - 1) / (e^epsilon - 1) times delta."""

    def statement(dp):
        recipe = small_recipe(dp, "strategy={kind='fedavg', weighting='uniform'}")
        account = PrivacyAccount.open(recipe, LAYOUT, tmp_path, np.array([4, 20]), 3, unit=PART)
        account.charge()
        return account.statement

    assert statement(DP).endswith(
        f", weight 1 for each client, where one client is {PART}: k clients together have k times this epsilon, "
        "at (e^(k epsilon) - 1) / (e^epsilon - 1) times this delta"
    )
    assert PART not in statement("privacy.dp={kind='example', noise_multiplier=1.0}")  # its unit is a row
