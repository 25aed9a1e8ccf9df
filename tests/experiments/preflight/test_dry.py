"""Dry runs by the command: the whole path of recipes for large machines, and what is refused."""

import json

import pytest

from experiments.config.recipe import RECIPES, parse_recipe
from experiments.preflight.dry import _placement, _resume, _rounds, dry_run
from experiments.preflight.shrunk_recipe import bearable, clients_of, draw_rows, out_of_reach, shrunk_recipe
from experiments.runs.api import Run

PROVED = ("configuration", "model", "rows", "placement", "strategy", "privacy", "checkpoint and resume", "export")
LARGE = """
    name = "large"
    seed = 3
    rounds = 500
    [model]
    base = "meta-llama/Llama-3.3-70B-Instruct"
    dtype = "bfloat16"
    attention = "flash_attention_2"
    peft = { kind = "lora", r = 16, alpha = 32, targets = ["q_proj", "v_proj"] }
    [data]
    source = { kind = "datasets", name = "some-lab/some-instructions", split = "train" }
    partition = { kind = "dirichlet", label = "topic", clients = 100000, alpha = 0.1 }
    [clients]
    slots = 512
    num_cpus = 2
    num_gpus = 0.25
    lanes = 4
    availability = { dropout = 0.05, trace = "on-the-cluster.parquet" }
    [cohort]
    size = 2048
    [train]
    epochs = 1
    batch = 16
    max_length = 4096
    [strategy]
    kind = "fedadam"
    weighting = "uniform"
    [privacy]
    secagg = { mode = "full", min_contributors = 3 }
    dp = { kind = "distributed", epsilon = 4.0, delta = 1e-6, clip = 0.5 }
"""

SINGLE = sorted({*RECIPES.glob("*.toml")} - {RECIPES / "access.toml"})  # that is several runs


@pytest.fixture
def large(tmp_path):
    """The recipe's file, and a folder to run from."""
    path = tmp_path / "large.toml"
    path.write_text(LARGE)
    return path


def proved(output):
    """What a dry run's output says of each proof."""
    rows = [line.strip() for line in output.splitlines()]
    return {name: next((row for row in rows if row.startswith(f"{name}  ")), "") for name in PROVED}


def dry(command, path, *arguments):
    ended = command("run", path, "--dry", *arguments, cwd=path.parent, COLUMNS="200")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert all(" yes " in said for said in proved(ended.stdout).values()), ended.stdout
    return ended.stdout


@pytest.mark.slow
def test_a_recipe_for_512_slots_and_a_70b_base_is_proved_here_and_leaves_nothing(command, large, full):
    if not full:
        pytest.skip("half a minute; smaller recipes are tried")
    said = dry(command, large)
    facts = proved(said)
    assert "LlamaForCausalLM" in facts["model"] and "q_proj, v_proj" in facts["model"]
    assert "made-up" in facts["rows"]
    assert "2 slots with num_cpus = 2 and num_gpus = 0.25" in facts["placement"]
    assert "logical CPUs: 4, logical GPUs: 1" in facts["placement"]
    assert "fedadam, 2 rounds" in facts["strategy"]
    assert "secure aggregation (full); distributed noise, epsilon" in facts["privacy"]
    assert "80 layers, width 8,192, 64 heads over 8" in said and "2 layers, width 256, 16 heads over 2" in said
    assert "512 slots or ranks (1,024 CPUs, 128 GPUs)" in said
    assert "the trace of when clients are available" in said
    assert [path.name for path in large.parent.iterdir()] == [large.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ("clients.zero={stage=3, ranks=64}", "clients.num_gpus=1", "clients.lanes=1", "privacy.dp=none"),
        ("clients.zero={stage=2, ranks=8, from_rows=5000, gangs=4}", "clients.num_gpus=1", "clients.lanes=1",
         "privacy.secagg.mode=off", "privacy.dp=none"),
        ("privacy.secagg.mode=off", "privacy.dp={kind='adaptive', epsilon=2.0}", "cohort={kind='poisson', rate=0.01}"),
        ("privacy.secagg.mode=off", "privacy.dp={kind='example', epsilon=8.0}", "clients.lanes=1"),
        ("privacy.secagg.mode=off", "privacy.dp=none", "strategy=krum", "clients.lanes=auto"),
        ("privacy.secagg.mode=off", "privacy.dp=none", "strategy=scaffold", "train.optimizer=sgd",
         "evaluate.overlap=true"),
        ("privacy.secagg.mode=off", "privacy.dp=none", "strategy=flora", "model.dtype=float32"),
        ("privacy.dp=none", "model.peft=none", "model.dtype=float32", "model.base=EleutherAI/pythia-6.9b",
         "clients.lanes=1"),
        ("train.objective=reward",),
        ("privacy.secagg.mode=off", "privacy.dp=none", "train.objective={kind='distill', teacher='org/teacher'}"),
    ],
    ids=["gangs", "gangs and slots", "adaptive", "example", "krum", "scaffold", "flora", "full tuning", "reward",
         "distill"],
)  # fmt: skip
def test_whatever_a_recipe_asks_for_is_tried(command, large, full, changes):
    if not full:
        pytest.skip("of recipes for large machines one is tried unless all are asked for")
    dry(command, large, *[part for change in changes for part in ("--set", change)])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SINGLE, ids=lambda path: path.stem)
def test_shipped_recipes_are_proved(command, tmp_path, full, recipe):
    if not full:
        pytest.skip("dry runs of shipped recipes, unless all are asked for, are left to others")
    path = tmp_path / recipe.name
    path.write_text(recipe.read_text())
    dry(command, path)


def test_warm_ups_are_shortened_with_what_they_are_part_of(tmp_path):
    warm = "train={steps=9, over_steps={warmup=9}, over_rounds={warmup=500}}"
    train = shrunk_recipe(parse_recipe(LARGE, [warm]), tmp_path, tmp_path).train
    assert (train.steps, train.over_steps.warmup, train.over_rounds.warmup) == (2, 2, 2)


def test_own_rows_are_drawn_through_the_recipes_partition(small_recipe, rows_file, tmp_path):
    recipe = small_recipe("data.partition={kind='iid', clients=9}", "cohort.size=6")
    work = shrunk_recipe(recipe, tmp_path, tmp_path)
    drawn = draw_rows(recipe, clients_of(work), work.train.max_length, tmp_path / "stores")
    assert drawn.real and "clients" in drawn.said
    assert drawn.table.column_names == ["client", "prompt", "completion"]
    completions = {json.loads(line)["completion"] for line in rows_file.read_text().splitlines()}
    assert set(drawn.table["completion"].to_pylist()) <= {completion[:12] for completion in completions}
    with pytest.raises(ValueError, match=r"cohort.size is 9, but only 7 clients can train"):
        recipe = small_recipe("data.partition={kind='iid', clients=9}", "cohort.size=9")
        draw_rows(recipe, 10, 64, tmp_path / "stores")


def test_prompts_leave_room_for_short_completions_and_keep_what_rewards_read(small_recipe, tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"client": f"c{row % 9}", "prompt": f"question {row} " * 9, "answer": str(row)} for row in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = '[{kind="number", column="answer"}]'
    objective = f'train.objective={{kind="grpo", rewards={rewards}, num_generations=16, max_completion_length=512}}'
    for given in (str(path), "s3://bucket/rows.jsonl"):
        recipe = small_recipe(objective, "train.max_length=1024", f"data.source.path='{given}'")
        work = shrunk_recipe(recipe, tmp_path, tmp_path)
        assert (work.train.objective.num_generations, work.train.objective.max_completion_length) == (2, 8)
        drawn = draw_rows(recipe, clients_of(work), work.train.max_length, tmp_path / "stores")
        assert {"client", "prompt", "answer"} == set(drawn.table.column_names)
        assert max(map(len, drawn.table["prompt"].to_pylist())) <= 8
        assert set(drawn.table["answer"].to_pylist()) <= {row["answer"] for row in rows} or not drawn.real


def test_conversations_are_shortened_to_their_first_answer(small_recipe, tmp_path):
    path = tmp_path / "rows.jsonl"
    roles = ("system", "user", "assistant", "user", "assistant")
    turns = [{"role": role, "content": f"{role} " * 50} for role in roles]
    path.write_text("".join(json.dumps({"client": client, "messages": turns}) + "\n" for client in "abc"))
    splits = "data.splits={heldout=0.0, unseen=0.0, leaks='allow', duplicates='keep'}"
    recipe = small_recipe(f"data.source.path={path}", "cohort.size=2", splits)
    table = draw_rows(recipe, 4, 128, tmp_path / "stores").table
    assert [turn["role"] for turn in table["messages"][0].as_py()] == ["system", "user", "assistant"]
    assert all(len(turn["content"]) == 8 for turn in table["messages"][0].as_py())


def test_rows_that_are_elsewhere_or_too_many_are_made_up(small_recipe, tmp_path, monkeypatch):
    for change in ("data.source.path=s3://bucket/rows.jsonl", "data.source.path=gone.jsonl"):
        assert out_of_reach(small_recipe(change)).endswith("is not on this machine")
    assert out_of_reach(small_recipe()) is None
    monkeypatch.setattr("experiments.preflight.shrunk_recipe.TOO_MUCH", 100)
    assert "GiB" in out_of_reach(small_recipe())


def test_a_cohort_is_as_large_as_its_rule_and_its_privacy_need(tmp_path):
    def cohort(*changes):
        return shrunk_recipe(parse_recipe(LARGE, list(changes)), tmp_path, tmp_path).cohort.size

    plain = ("privacy={}", "clients.availability={}")
    assert cohort(*plain) == 6
    assert cohort(*plain, "cohort.size=2") == 2
    assert cohort(*plain, "strategy={kind='bulyan', f=3}") >= 15
    assert cohort("privacy.secagg.min_contributors=20") >= 20
    assert cohort("privacy.secagg.neighbors=30") > 30


def test_what_few_clients_cannot_bear_is_left_out(tmp_path):
    central = "privacy={dp={kind='adaptive', noise_multiplier=5.0}}"
    work = shrunk_recipe(parse_recipe(LARGE, [central]), tmp_path, tmp_path)
    assert bearable(work, 8).privacy.dp.noise_multiplier == 0.01
    often = shrunk_recipe(parse_recipe(LARGE, ["clients.availability.dropout=0.9"]), tmp_path, tmp_path)
    assert bearable(often, 8).clients.availability.dropout == 0.0
    never = shrunk_recipe(parse_recipe(LARGE, ["clients.availability.dropout=0.0"]), tmp_path, tmp_path)
    assert bearable(never, 8) == never
    most = shrunk_recipe(parse_recipe(LARGE, ["privacy={}", "clients.min_share=0.9"]), tmp_path, tmp_path)
    assert (most.clients.min_share, most.clients.availability.trace) == (0.0, None)


def test_a_round_without_result_proves_nothing(tmp_path):
    from engine.messages.events import RoundDone

    work = shrunk_recipe(parse_recipe(LARGE), tmp_path, tmp_path)
    round_ = RoundDone(1, 1.0, 1.0, 1.0, 0, {}, aborted="3 clients are there, and it takes 5", epsilon="epsilon 4")
    strategy, privacy = _rounds(work, [round_])
    assert not strategy.holds and not privacy.holds and "it takes 5" in strategy.said


def test_rounds_of_nobody_prove_nothing(tmp_path):
    from engine.messages.events import RoundDone

    plain = shrunk_recipe(parse_recipe(LARGE, ["privacy={}", "clients.availability.dropout=0.9"]), tmp_path, tmp_path)
    rounds = [RoundDone(round_, 1.0, 1.0, 1.0, clients, {}) for round_, clients in ((1, 4), (2, 0))]
    assert not any(proof.holds for proof in _rounds(plain, rounds))
    assert all(proof.holds for proof in _rounds(plain, rounds[:1]))
    assert bearable(plain, 8).clients.availability.dropout == 0.0  # of so few clients often nobody would be left


def test_fewer_slots_than_asked_for_prove_no_placement(tmp_path):
    from engine.messages.events import Started

    def started(slots):
        return Started(slots, 2, 6, 2, 0, 10, 10, 0, None, 1)

    for changes, asked in (
        ((), 2),
        (("clients.zero={stage=2}",), 1),
        (("clients.zero={stage=2, from_rows=9}",), 2),
    ):
        plain = ["privacy={}", "clients.lanes=1", "clients.num_gpus=1", *changes]
        clients = shrunk_recipe(parse_recipe(LARGE, plain), tmp_path, tmp_path).clients
        assert not _placement(clients, started(asked - 1)).holds and _placement(clients, started(asked)).holds


def test_no_model_proves_no_resume(small_recipe, tmp_path):
    first, again = (Run(tmp_path / name, {}, [], {}, {}) for name in ("first", "again"))
    first.model.mkdir(parents=True)
    assert not _resume(small_recipe(), first, again, 1).holds
    for run in (first, again):
        run.model.mkdir(parents=True, exist_ok=True)
        (run.model / "model.safetensors").write_bytes(b"the same")
    assert _resume(small_recipe(), first, again, 1).holds and not _resume(small_recipe(), first, again, 2).holds


def test_options_that_do_not_go_with_it_are_refused_in_one_sentence(command, large):
    ended = command("run", large, "--dry", "--out", "x", "--resume", "--set", "rounds=2")
    assert ended.returncode == 2
    assert ended.stderr == (
        "error: --dry runs on this machine alone and leaves nothing behind: leave out --out, --resume\n"
    )


def test_a_base_of_which_nothing_is_known_ends_it_at_once():
    with pytest.raises(ValueError, match=r"save its config.json in a folder"):
        dry_run(parse_recipe(LARGE, ["model.base=my/own-model"]))
