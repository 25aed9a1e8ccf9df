"""Whole runs of objectives beside SFT on real Ray: on other slots, in gangs, with privacy, merging rules, a start."""

import json
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

import experiments
from engine.messages.events import Evaluated
from engine.records.metrics import read_log
from experiments.config.recipe import RECIPES, load_recipe
from tests import golden

ADAPTER = "adapter_model.safetensors"
UNIFORM = 'strategy={kind="fedavg", weighting="uniform"}'
DPO, KTO = 'train.objective={kind="dpo", beta=0.5}', 'train.objective={kind="kto", beta=0.5}'
REWARD, DISTILL = "train.objective=reward", 'train.objective={kind="distill", teacher="TEACHER"}'
COMPLETIONS = "data.source.columns={prompt='prompt', completion='chosen'}"


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """Preference pairs of ten clients: a word backwards is better than the word itself."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {
            **{key: row[key] for key in row if key != "completion"},
            "chosen": row["completion"],
            "rejected": row["completion"][::-1],
        }
        for row in golden.make_rows()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pairs_recipe(small_recipe, pairs_file):
    def make(*changes):
        return small_recipe(f"data.source.path='{pairs_file}'", "rounds=2", "cohort.size=4", *changes)

    return make


@pytest.fixture(scope="module")
def teacher(tiny_base, tmp_path_factory):
    """A base whose head prefers other tokens than the recipe's does."""
    folder = copytree(tiny_base, tmp_path_factory.mktemp("teacher") / "base")
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if "mlp" in name:
            tensor.mul_(1.5)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def weights(run):
    return load_file(run.model / ADAPTER)


def figure(run, name, split="heldout"):
    """A figure of all clients by round."""
    rows = read_log(run.folder / "metrics").to_pylist()
    return {
        row["round"]: row["value"] for row in rows if (row["split"], row["name"], row["client"]) == (split, name, None)
    }


@pytest.mark.parametrize("objective", [DPO, KTO, 'train.objective="orpo"'], ids=["dpo", "kto", "orpo"])
def test_the_same_bits_on_any_number_of_slots(ray_session, pairs_recipe, tmp_path, objective, full):
    if objective != DPO and not full:
        pytest.skip("one objective is run unless all are asked for")
    runs = [
        experiments.run(pairs_recipe(objective, f"clients.slots={slots}"), out=tmp_path / str(slots))
        for slots in ((1, 2, 3) if full else (1, 2))
    ]
    first = runs[0]
    assert first.losses["end"]["heldout"] < first.losses["round 0"]["heldout"]
    if objective == DPO:
        accuracy = figure(first, "loss.accuracy")
        assert accuracy[0] == 0.5 < accuracy[2] <= 1
    for run in runs[1:]:
        assert (run.model / ADAPTER).read_bytes() == (first.model / ADAPTER).read_bytes()
        assert run.losses == first.losses


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [1, 2])
def test_stored_columns_lead_where_live_ones_do(ray_session, pairs_recipe, tmp_path, lanes, full):
    if lanes == 1 and not full:
        pytest.skip("lanes are tried unless all is asked for")
    runs = {}
    for stored in ("true", "false"):
        objective = f"train.objective={{kind='dpo', beta=0.5, precompute_ref_log_probs={stored}}}"
        recipe = pairs_recipe(objective, "rounds=1", f"clients.lanes={lanes}", "train.optimizer.eps=1e-6")
        runs[stored] = experiments.run(recipe, out=tmp_path / stored)
    ours, theirs = (weights(run) for run in runs.values())
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5
    assert runs["true"].losses["end"] == pytest.approx(runs["false"].losses["end"], abs=1e-5)


COMBINATIONS = {
    "lanes": (DPO, "clients.lanes=3"),
    "kto in lanes": (KTO, "clients.lanes=3"),
    "kto by round": ('train.objective={kind="kto", kl="round"}',),
    "fedex": (DPO, "strategy=fedex"),
    "flora": (DPO, "strategy=flora"),
    "scaffold": (DPO, "strategy=scaffold", 'train.optimizer={kind="sgd", lr=0.05}'),
    "hetlora": (DPO, "strategy=hetlora", 'model.peft={kind="lora", ranks=[{r=2, share=0.5}, {r=8, share=0.5}]}'),
    "ditto": (DPO, "strategy=ditto"),
    "full": (DPO, "model.peft=none", "train.optimizer.lr=1e-3"),
    "full from the round": ('train.objective={kind="dpo", reference="round"}', "model.peft=none"),
    "dora": (DPO, 'model.peft={kind="lora", use_dora=true}', "clients.lanes=2"),
    "biases": (DPO, 'model.peft={kind="lora", bias="all"}'),
    "secagg": (DPO, 'privacy.secagg={mode="ideal", bound=1.0}', UNIFORM),
    "central": (DPO, 'privacy.dp={kind="central", noise_multiplier=0.5, clip=0.3, delta=1e-3}', UNIFORM),
    "example": (DPO, 'privacy.dp={kind="example", noise_multiplier=0.5, clip=0.3, delta=1e-3}', UNIFORM),
    "kto example": (
        'train.objective={kind="kto", kl="none"}',
        'privacy.dp={kind="example", noise_multiplier=0.5, clip=0.3, delta=1e-3}',
        UNIFORM,
    ),
    "transforms": (DPO, 'transforms=[{kind="topk", share=0.3}, {kind="int8"}]'),
    "cpo": ('train.objective="cpo"',),
    "simpo": ('train.objective="simpo"', "clients.lanes=2"),
    "reward in lanes": (REWARD, "clients.lanes=3"),
    "reward full": (REWARD, "model.peft=none", "train.optimizer.lr=1e-3"),
    "reward fedex": (REWARD, "strategy=fedex"),
    "reward hetlora": (
        REWARD,
        "strategy=hetlora",
        'model.peft={kind="lora", ranks=[{r=2, share=0.5}, {r=8, share=0.5}]}',
    ),
    "reward ia3": (REWARD, 'model.peft={kind="ia3"}', "clients.lanes=2"),
    "reward secagg": (REWARD, 'privacy.secagg={mode="ideal", bound=1.0}', UNIFORM),
    "reward example": (REWARD, 'privacy.dp={kind="example", noise_multiplier=0.5, clip=0.3, delta=1e-3}', UNIFORM),
    "packing": (
        'train.objective={kind="sft", packing=true}',
        COMPLETIONS,
    ),
    "distill in lanes": (DISTILL, COMPLETIONS, "clients.lanes=3"),
    "distill own samples in lanes": (
        DISTILL.replace("}", ", lmbda=0.5, max_completion_length=8}"),
        COMPLETIONS,
        "clients.lanes=3",
    ),
    "distill full": (DISTILL, COMPLETIONS, "model.peft=none", "train.optimizer.lr=1e-3"),
    "distill flora": (DISTILL, COMPLETIONS, "strategy=flora"),
    "distill example": (
        DISTILL,
        COMPLETIONS,
        'privacy.dp={kind="example", noise_multiplier=0.5, clip=0.3, delta=1e-3}',
        UNIFORM,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMBINATIONS)
def test_objectives_go_with_everything_else(ray_session, pairs_recipe, teacher, tmp_path, name, full):
    if name not in ("fedex", "kto in lanes") and not full:
        pytest.skip("two combinations are run unless all are asked for")
    changes = [change.replace("TEACHER", str(teacher)) for change in COMBINATIONS[name]]
    run = experiments.run(pairs_recipe(*changes), out=tmp_path / "run")
    losses = [run.losses[when]["heldout"] for when in ("round 0", "end")]
    assert losses[1] < losses[0] or "privacy" in "".join(COMBINATIONS[name])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("objective", [DPO, KTO, REWARD, DISTILL], ids=["dpo", "kto", "reward", "distill"])
@pytest.mark.parametrize("peft", ["", "model.peft=none"], ids=["lora", "all"])
def test_gangs_lead_where_plain_slots_do(ray_session, pairs_recipe, teacher, tmp_path, stage, objective, peft, full):
    if not full:
        pytest.skip("two runs each; gangs of fine-tuning are run")
    small = ("rounds=1", "cohort.size=2", "evaluate.every=0", "train.optimizer={kind='adamw', lr=2e-3, eps=1e-6}")
    its = (objective.replace("TEACHER", str(teacher)), COMPLETIONS) if objective == DISTILL else (objective,)
    changes = (*its, *small, *([peft] if peft else []))
    plain = experiments.run(pairs_recipe(*changes), out=tmp_path / "plain")
    zero = f"clients.zero={{stage={stage}, ranks=2, timeout_s=60}}"
    gang = experiments.run(pairs_recipe(*changes, zero), out=tmp_path / "gang")
    for when in ("round 0", "end"):
        assert gang.losses[when] == pytest.approx(plain.losses[when], abs=2e-5)
    if not peft:
        ours, theirs = weights(gang), weights(plain)
        assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 2e-5


def test_preferences_follow_another_run_and_are_compared_with_it(ray_session, pairs_recipe, small_recipe, tmp_path):
    first = experiments.run(small_recipe("rounds=1", "cohort.size=4"), out=tmp_path / "sft")
    start = f"model.start='{first.folder}'"
    reference = 'train.objective={kind="dpo", beta=0.5, reference="start"}'
    run = experiments.run(pairs_recipe(reference, start), out=tmp_path / "dpo")
    assert run.losses["round 0"]["heldout"] == pytest.approx(0.6931, abs=1e-4)
    assert figure(run, "loss.accuracy")[0] == 0.5 and figure(run, "loss.chosen")[0] == 0
    base = experiments.run(pairs_recipe(DPO, start, "rounds=1"), out=tmp_path / "base")
    assert figure(base, "loss.chosen")[0] > 0  # beside the base the start has learned already
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo_preference", "demo_reward"])
def test_shipped_recipes_of_preferences_learn(ray_session, tmp_path, name, full):
    """In their reduced form: the standard library alone, short prompts, fewer rounds, and one slot."""
    if name != "demo_preference" and not full:
        pytest.skip("one recipe is run unless all are asked for")
    small = ("data.source.packages=[]", "data.source.prompt_chars=60", f"data.cache='{tmp_path / 'stores'}'")
    size = ("clients.slots=1", "rounds=2", "cohort.size=3", "train.max_length=64", "evaluate.every=2")
    run = experiments.run(load_recipe(RECIPES / f"{name}.toml", [*small, *size]), out=tmp_path / "run")
    assert run.figures["accuracy"]["end"]["heldout"] > 0.75


def test_what_an_objective_shows_is_in_events_results_card_and_report(ray_session, pairs_recipe, tmp_path):
    events = []
    recipe = pairs_recipe(DPO, "rounds=1", "evaluate.finetune=1")
    run = experiments.run(recipe, out=tmp_path / "run", on_event=events.append)
    evaluated = {(event.round, event.baseline): event for event in events if isinstance(event, Evaluated)}
    assert evaluated.keys() == {(0, None), (1, None), (1, "finetuned")}
    assert evaluated[0, None].figures == {"accuracy": {"heldout": 0.5, "unseen": 0.5}}
    columns = {"round 0": evaluated[0, None], "end": evaluated[1, None], "fine-tuned": evaluated[1, "finetuned"]}
    assert run.figures == {"accuracy": {name: event.figures["accuracy"] for name, event in columns.items()}}
    assert run.losses == {name: event.losses for name, event in columns.items()}
    assert run.figures["accuracy"]["end"]["heldout"] == figure(run, "loss.accuracy")[1]
    assert run.figures["accuracy"]["fine-tuned"]["heldout"] == figure(run, "loss_finetuned.accuracy")[1]
    assert run.units == {"loss": "per pair", "accuracy": "share"}
    assert "| accuracy (share) | round 0 | " in (run.model / "README.md").read_text("utf-8")
    assert "Accuracy (share), start to end" in run.report.read_text("utf-8")


def test_a_reward_model_follows_fine_tuning_and_itself(ray_session, pairs_recipe, small_recipe, tmp_path):
    first = experiments.run(small_recipe("rounds=1", "cohort.size=4"), out=tmp_path / "sft")
    start = f"model.start='{first.folder}'"
    run = experiments.run(pairs_recipe(REWARD, start, "clients.slots=1"), out=tmp_path / "reward")
    assert run.losses["end"]["heldout"] < run.losses["round 0"]["heldout"] < 0.75
    assert figure(run, "loss.accuracy")[2] > figure(run, "loss.accuracy")[0]
    assert run.samples == [] and "AutoModelForSequenceClassification" in (run.model / "README.md").read_text()
    again = experiments.run(pairs_recipe(REWARD, f"model.start='{run.folder}'", "rounds=1"), out=tmp_path / "again")
    assert again.losses["round 0"] == pytest.approx(run.losses["end"], abs=1e-6)


def test_a_student_follows_a_run_that_is_its_teacher(ray_session, small_recipe, tmp_path):
    teacher = experiments.run(small_recipe("rounds=1", "cohort.size=4"), out=tmp_path / "teacher")
    distill = f'train.objective={{kind="distill", teacher="{teacher.folder}", beta=0}}'
    run = experiments.run(small_recipe(distill, "rounds=2", "cohort.size=4", "clients.lanes=2"), out=tmp_path / "run")
    assert run.losses["end"]["heldout"] < run.losses["round 0"]["heldout"] / 2
    assert figure(run, "loss.agreement")[2] > figure(run, "loss.agreement")[0]
