import json

import numpy as np
import pytest

from engine.aggregation.privacy_account import PrivacyAccount, plan_noise
from strategies.core.layout import Layout
from strategies.privacy.central import CentralDp

LAYOUT = Layout(("w",), ((3,),))
DP = "privacy.dp={kind='central', noise_multiplier=1.0, delta=1e-3}"
FULL = "privacy.secagg.mode=full"
WEIGHTS = "weight 1 for each client"


@pytest.fixture
def account(small_recipe, tmp_path):
    """Opens the account of a run in `tmp_path`."""

    def account(*changes, round_=0, steps=3, unit=None):
        recipe = small_recipe("strategy={kind='fedavg', weighting='uniform'}", *changes)
        return PrivacyAccount.open(recipe, LAYOUT, tmp_path, np.full(100, 4), steps, round_, unit=unit)

    return account


def test_what_is_spent_is_on_disk_before_noise_is_drawn(account, tmp_path):
    path, fresh = tmp_path / "privacy.json", account(DP, FULL)
    assert not path.exists() and fresh.warned == ()
    first, second = fresh.charge(), fresh.charge()
    assert 0 < first["epsilon"] < second["epsilon"]
    said = json.loads(path.read_text())
    assert said["rounds"] == 2 and said["epsilon"] == second["epsilon"] and said["statement"] == fresh.statement
    assert fresh.statement.startswith(f"epsilon {second['epsilon']:.4g} ") and fresh.statement.endswith(f", {WEIGHTS}")
    assert said["weights"] == WEIGHTS
    assert (said["unit"], said["sampling"], said["simulated"]) == ("client", "none", False)


@pytest.mark.parametrize("content", ["", "[]", '{"rounds": "many"}'])
def test_a_damaged_account_of_what_is_spent_is_named(account, tmp_path, content):
    (tmp_path / "privacy.json").write_text(content)
    with pytest.raises(ValueError, match=r"privacy\.json, the record of privacy spent, cannot be read"):
        account(DP, FULL, round_=3)


def test_fresh_noise_of_a_round_that_is_run_again_is_charged_again(account):
    before = account(DP, FULL)
    spent = [before.charge()["epsilon"] for _ in range(3)]
    # The last checkpoint is of round 1: rounds 2 and 3 are run again.
    again = account(DP, FULL, round_=1)
    assert again.charge()["epsilon"] > spent[-1] and again.charged == 4
    seeded = account(DP, round_=1)
    assert seeded.charge()["epsilon"] == spent[1] and "simulated" in seeded.statement


def test_example_level_noise_counts_local_steps(account, tmp_path):
    def spent(steps):
        noisy = account("privacy.dp={kind='example', noise_multiplier=1.0, delta=1e-3}", steps=steps)
        for _ in range(6 // steps):
            noisy.charge()
            yield json.loads((tmp_path / "privacy.json").read_text())

    assert [(facts["unit"], facts["steps"]) for facts in spent(6)] == [("example", 6)]
    assert [facts["steps"] for facts in spent(3)] == [3, 6]


def test_an_account_without_noise_is_json_for_everybody(account, tmp_path):
    """JSON has no Infinity."""
    none = DP.replace("1.0", "0.0")
    assert account(none, FULL).charge()["epsilon"] == float("inf")
    said = json.loads((tmp_path / "privacy.json").read_text(), parse_constant=pytest.fail)
    assert said["epsilon"] is None and said["statement"].startswith("epsilon inf at delta 0.001 ")
    again = account(none, FULL, round_=1)
    assert (again.charged, again.statement) == (1, said["statement"])


def test_a_large_delta_is_said(small_recipe):
    recipe = small_recipe(DP.replace("1e-3", "0.1"), "strategy={kind='fedavg', weighting='uniform'}")
    _, warned = plan_noise(recipe, LAYOUT, np.full(100, 4), 12)
    assert warned == ("delta = 0.1 is above 1 / 100: to publish one client at random would count as private",)
    assert isinstance(recipe.privacy.dp, CentralDp)


def test_without_privacy_there_is_no_plan(small_recipe):
    assert plan_noise(small_recipe(), LAYOUT, np.full(100, 4), 12) == (None, ())


SHOWN = "2 held-out rows are shown word for word (evaluate.samples)"


def test_rows_that_are_shown_are_in_the_statement_and_said_at_the_start(account):
    noisy = account(DP, "evaluate.samples=2")
    noisy.charge()
    assert noisy.statement.endswith(f", outside of epsilon: {SHOWN}") and SHOWN in " ".join(noisy.warned)
    assert SHOWN in " ".join(account(FULL, "evaluate.samples=2").warned)
    assert account(DP).warned == account(FULL).warned == account("evaluate.samples=2").warned == ()


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
    plan, warned = plan_noise(example, LAYOUT, rows, 12)
    assert plan.delta == pytest.approx(100**-1.1) and warned == ()
    # The noise is still for the client whose rows are drawn most often: all of one in each batch of four.
    assert plan.scheme.rate == 1.0

    example = small_recipe("privacy.dp={kind='example', noise_multiplier=1.0, delta=0.02}")
    plan, warned = plan_noise(example, LAYOUT, rows, 12)
    assert plan.delta == 0.02
    assert warned == ("delta = 0.02 is above 1 / 100: to publish one row at random would count as private",)


PART = "a part of at most 20 rows of one value of the column 'client', of up to 3 parts"


def test_the_statement_names_a_client_that_is_part_of_a_person(account):
    """Group privacy: k clients have k epsilon, at (e^(k epsilon) - 1) / (e^epsilon - 1) times delta."""

    def statement(dp):
        noisy = account(dp, unit=PART)
        noisy.charge()
        return noisy.statement

    assert statement(DP).endswith(
        f", {WEIGHTS}, where one client is {PART}: k clients together have k times this epsilon, "
        "at (e^(k epsilon) - 1) / (e^epsilon - 1) times this delta"
    )
    assert PART not in statement("privacy.dp={kind='example', noise_multiplier=1.0}")  # its unit is a row
