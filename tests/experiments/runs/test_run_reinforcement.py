"""Whole runs of reinforcement on real Ray: the same bits on other slots and after a stop, rewards, rollouts."""

import json
import threading

import pytest

import experiments
from engine.messages.events import RoundDone
from engine.records.metrics import ROLLOUTS, read_log
from experiments.config.recipe import RECIPES, load_recipe
from experiments.runs.driving import RunStopped
from tests import golden

ADAPTER = "adapter_model.safetensors"
GRPO = (
    'train.objective={kind="grpo", rewards=[{kind="length", target=8, unit="characters"}], num_generations=4, '
    'max_completion_length=6, every=2, beta=0.05, reference="start"}'
)
UNIFORM = 'strategy={kind="fedavg", weighting="uniform"}'
REWARDS = """
def first_letter(prompt, completion, row):
    return float(completion[:1] == row["answer"][:1]) + row["level"] / 10
"""


@pytest.fixture(scope="module")
def grpo_recipe(small_recipe):
    def make(*changes):
        short = ("rounds=2", "cohort.size=4", "clients.lanes=2", "evaluate.every=1", "evaluate.rows=2", "train.steps=2")
        return small_recipe(GRPO, UNIFORM, *short, *changes)

    return make


@pytest.fixture(scope="module")
def plain(ray_session, grpo_recipe, tmp_path_factory):
    """A run in one slot."""
    return experiments.run(grpo_recipe(), out=tmp_path_factory.mktemp("plain") / "run")


def figure(run, name, split="heldout"):
    """A figure of all clients by round."""
    rows = read_log(run.folder / "metrics").to_pylist()
    return {
        row["round"]: row["value"] for row in rows if (row["split"], row["name"], row["client"]) == (split, name, None)
    }


def rollouts(run):
    return {file.name: json.loads(file.read_text()) for file in sorted((run.folder / ROLLOUTS).iterdir())}


def test_the_same_bits_and_rollouts_on_other_slots_and_after_a_stop(plain, grpo_recipe, tmp_path, full):
    stop, folder = threading.Event(), tmp_path / "stopped"

    def after_the_first_round(event):
        if isinstance(event, RoundDone):
            stop.set()

    with pytest.raises(RunStopped):
        experiments.run(grpo_recipe("clients.slots=2"), out=folder, on_event=after_the_first_round, stop=stop)
    runs = [experiments.run(grpo_recipe("clients.slots=2"), out=folder, resume=True)]
    runs += [experiments.run(grpo_recipe("clients.slots=3"), out=tmp_path / "3")] if full else []
    for run in runs:
        assert (run.model / ADAPTER).read_bytes() == (plain.model / ADAPTER).read_bytes()
        assert run.losses == plain.losses and run.figures == plain.figures and rollouts(run) == rollouts(plain)


def test_what_is_measured_and_shown(plain):
    assert figure(plain, "loss.win")[0] == 0.5 and figure(plain, "loss.kl")[0] == 0 != figure(plain, "loss.kl")[2]
    assert plain.units == {"loss": "minus the reward", "reward": "reward", "greedy": "reward", "win": "share"}
    assert plain.figures["reward"]["end"]["heldout"] == -plain.losses["end"]["heldout"]
    assert list(rollouts(plain)) == ["000000.json", "000001.json", "000002.json"]
    page = plain.report.read_text("utf-8")
    assert "What the model writes" in page and "Reward (reward), start to end" in page
    for shown in rollouts(plain).values():
        assert len(shown) == 2 and all(each["prompt"] for each in shown)
        for answer in (each[kind] for each in shown for kind in ("sampled", "greedy")):
            length = len(answer["text"].strip())
            assert answer["reward"] == pytest.approx(max(0, 1 - abs(length - 8) / 8))
    train = {name: figure(plain, f"term.{name}", "train") for name in ("reward", "length", "signal", "failed", "kl")}
    assert all(0 < value < 1 for value in train["reward"].values()) and set(train["failed"].values()) == {0}
    assert all(0 < value <= 6 for value in train["length"].values()) and train["signal"][1] > 0 < train["kl"][2]


def test_a_reward_of_ones_own_reads_columns_of_its_rows(ray_session, grpo_recipe, tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text(REWARDS)
    path = tmp_path / "rows.jsonl"
    rows = [
        {"client": row["client"], "prompt": row["prompt"], "answer": row["completion"], "level": number % 3}
        for number, row in enumerate(golden.make_rows())
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    rewards = 'train.objective.rewards=[{kind="own_reward:first_letter"}]'
    recipe = grpo_recipe(f"data.source.path='{path}'", rewards, "rounds=1", "clients.slots=2")
    run = experiments.run(recipe, out=tmp_path / "run")
    levels = figure(run, "term.reward", "train")[1]
    assert 0 < levels < 0.4 and figure(run, "term.failed", "train")[1] == 0


COMBINATIONS = {
    "rloo fedex": (
        'train.objective={kind="rloo", rewards=[{kind="length", target=8, unit="characters"}], num_generations=3, '
        'max_completion_length=6, beta=0.1, normalize_advantages=true, reference="base"}',
        "strategy=fedex",
        "clients.lanes=1",
    ),
    "example": (
        'train.objective.loss_type="dr_grpo"',
        'privacy.dp={kind="example", noise_multiplier=0.5, clip=0.3, delta=1e-3}',
        "clients.lanes=1",
    ),
    "central": ('privacy.dp={kind="central", noise_multiplier=0.5, clip=0.3, delta=1e-3}',),
    "scaffold": ("strategy=scaffold", 'train.optimizer={kind="sgd", lr=0.05}'),
    "ditto": ("strategy=ditto",),
    "hetlora": (
        "strategy=hetlora",
        'model.peft={kind="lora", ranks=[{r=2, share=0.5}, {r=8, share=0.5}]}',
        'train.objective.reference="base"',
    ),
    "full": ("model.peft=none", "train.optimizer.lr=1e-3", "clients.lanes=1"),
    "round": ('train.objective.reference="round"',),
    "no reference": ('train.objective.reference="none"', "train.objective.beta=0.0"),
    "overlap": ("evaluate.overlap=true",),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMBINATIONS)
def test_reinforcement_goes_with_everything_else(ray_session, grpo_recipe, tmp_path, name, full):
    if name != "rloo fedex" and not full:
        pytest.skip("one combination is run unless all are asked for")
    run = experiments.run(grpo_recipe(*COMBINATIONS[name]), out=tmp_path / "run")
    rewards = figure(run, "loss.reward")
    assert set(rewards) == {0, 1, 2} and all(0 <= reward <= 1 for reward in rewards.values())
    assert figure(run, "term.signal", "train")[1] > 0
    assert (run.folder / ROLLOUTS).is_dir() == ("privacy" not in "".join(COMBINATIONS[name]))


def test_secure_sums_have_the_figures_of_plain_ones(plain, grpo_recipe, tmp_path):
    secure = ('privacy.secagg={mode="ideal", bound=1.0}', "rounds=1", "evaluate.every=0")
    masked = experiments.run(grpo_recipe(*secure), out=tmp_path / "secure")
    for name in ("reward", "length", "ended", "signal", "failed"):
        ours, theirs = (figure(run, f"term.{name}", "train")[1] for run in (masked, plain))
        assert ours == pytest.approx(theirs, abs=1e-3), name


@pytest.mark.slow
def test_the_shipped_recipe_learns(ray_session, tmp_path, full):
    """In a reduced form: rows of the standard library alone and short, in few clients, and fewer rounds in one slot."""
    small = ("data.source.packages=[]", "data.source.prompt_chars=60", f"data.cache='{tmp_path / 'stores'}'")
    small += ("data.partition={kind='iid', clients=8}", "data.splits.unseen=0", "evaluate.rows=24")
    size = ("clients.slots=1", "rounds=2", "cohort.size=3", "train.max_length=64", "evaluate.every=2")
    run = experiments.run(load_recipe(RECIPES / "demo_grpo.toml", [*small, *size]), out=tmp_path / "run")
    reward = run.figures["reward"]
    assert reward["end"]["heldout"] > reward["round 0"]["heldout"] + 0.05
