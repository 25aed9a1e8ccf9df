"""Whole runs on real Ray: the same bits on any number of slots, after deaths and resumes, and what a run leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.compute as pc
import pytest

import experiments
from engine.messages.events import Evaluated, RoundDone, Started
from experiments.config.recipe import to_toml

ROOT = Path(__file__).resolve().parents[3]
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="session")
def reference(ray_session, small_recipe, tmp_path_factory):
    """A finished run of the small recipe with two slots and the baselines: what other runs are compared with."""
    events = []
    folder = tmp_path_factory.mktemp("reference") / "run"
    run = experiments.run(small_recipe("clients.slots=2"), out=folder, baselines=True, on_event=events.append)
    return run, events


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 3])
def test_the_bits_do_not_depend_on_the_number_of_slots(reference, small_recipe, tmp_path, slots, full):
    if slots == 1 and not full:
        pytest.skip("three slots are tried unless all are asked for")
    run, _ = reference
    other = experiments.run(small_recipe(f"clients.slots={slots}"), out=tmp_path / "run")
    assert bits(other) == bits(run)
    assert losses(other) == losses(run)


def test_a_run_reports_its_progress_and_learns(reference):
    run, events = reference
    started = next(event for event in events if isinstance(event, Started))
    assert (started.slots, started.training, started.unseen) == (2, 8, 2)
    assert [event.round for event in events if isinstance(event, RoundDone)] == [1, 2, 3, 4]
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    assert [event.round for event in evaluated if event.baseline is None] == [0, 2, 4]
    assert run.losses["end"]["heldout"] < run.losses["round 0"]["heldout"]
    assert run.losses["end"]["unseen"] < run.losses["round 0"]["unseen"]
    assert set(run.losses) == {"round 0", "local only", "centralized", "end"}
    # Sixty steps on so few rows: how much is learned by heart differs from one processor to another.
    assert run.losses["centralized"]["heldout"] != pytest.approx(run.losses["round 0"]["heldout"], abs=1e-3)
    assert "unseen" not in run.losses["local only"]


def test_the_run_folder_holds_what_the_design_names(reference):
    run, _ = reference
    names = {path.name for path in run.folder.iterdir()}
    assert names == {
        "recipe.toml",
        "manifest.json",
        "metrics",
        "ledger",
        "checkpoints",
        "model",
        "samples.json",
        "report.html",
        "finished.json",
        "openness.json",
    }
    assert {path.name for path in run.model.iterdir()} >= {
        ADAPTER,
        "adapter_config.json",
        "README.md",
        "tokenizer.json",
    }
    assert "<html" in run.report.read_text()
    assert [path.name for path in sorted((run.folder / "checkpoints").iterdir())] == ["00003", "00004"]
    assert json.loads((run.folder / "manifest.json").read_text())["seed"] == 5
    assert not run.metrics.to_pandas().empty


def test_each_client_of_a_cohort_is_counted_once(reference):
    run, _ = reference
    rows = run.metrics.filter(pc.equal(run.metrics["name"], "rows")).to_pylist()
    for round_ in range(1, 5):
        clients = [row["client"] for row in rows if row["round"] == round_ and row["split"] == "train"]
        assert len(clients) == len(set(clients)) == 5


def test_the_adapter_gives_the_same_loss_in_a_program_without_this_project(reference, tiny_base, tmp_path):
    run, _ = reference
    store = json.loads((run.folder / "manifest.json").read_text())["data"]["key"][:16]
    program = tmp_path / "plain.py"
    program.write_text(PLAIN_PROGRAM)
    rows = run.folder.parent.parent / "stores" / store
    ended = subprocess.run(
        [sys.executable, "-I", program, tiny_base, run.model, rows], capture_output=True, text=True, cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) == pytest.approx(run.losses["end"]["heldout"], abs=1e-5)


PLAIN_PROGRAM = """
import sys
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, store = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
index = pa.ipc.open_file(f"{store}/index.arrow").read_all().to_pylist()
rows = pq.read_table(f"{store}/rows.parquet").to_pylist()
total = count = 0
for client in index:
    if not client["train"]:  # never trains
        continue
    first = client["start"] + client["train"]
    for row in rows[first : first + client["heldout"]]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        for position in range(len(prompt), len(ids)):
            total -= logits[position - 1, ids[position]].item()
            count += 1
print(total / count)
assert not {"engine", "strategies", "datasets_partition", "experiments"} & set(sys.modules)
"""


def test_a_slot_killed_in_the_middle_changes_no_bit(reference, small_recipe, slot_processes, tmp_path):
    run, _ = reference
    others, seen = slot_processes(), []

    def kill_one(event):
        if isinstance(event, RoundDone):
            seen.append(slot_processes() - others)
            if event.round == 1:
                assert len(seen[0]) == 2
                min(seen[0], key=lambda process: process.pid).kill()

    other = experiments.run(small_recipe("clients.slots=2"), out=tmp_path / "run", on_event=kill_one)
    assert len(seen[-1]) == 2 and len(seen[-1] - seen[0]) == 1, "no slot was made anew"
    assert bits(other) == bits(run)
    assert losses(other) == losses(run)


@pytest.mark.slow
def test_a_run_killed_by_sigkill_and_resumed_ends_in_the_same_bits(reference, small_recipe, tmp_path, full):
    for kill_at in (1, 2, 3) if full else (2,):
        killed_and_resumed(reference, small_recipe, tmp_path / str(kill_at), kill_at)


def killed_and_resumed(reference, small_recipe, folder, kill_at):
    run, _ = reference
    folder.mkdir()
    recipe_file, out = folder / "recipe.toml", folder / "run"
    recipe_file.write_text(to_toml(small_recipe()))
    command = [sys.executable, "-m", "experiments", "run", str(recipe_file), "--out", str(out)]
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + 240
    while not (out / "checkpoints" / f"{kill_at:05d}").exists() and time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (out / "checkpoints" / f"{kill_at:05d}").exists(), log.read_text()
    assert not (out / "model").exists()
    resumed = []
    other = experiments.run(small_recipe(), out=out, resume=True, on_event=resumed.append)
    assert next(event for event in resumed if isinstance(event, Started)).resumed in (kill_at, kill_at + 1)
    assert bits(other) == bits(run)
    assert losses(other) == losses(run)
    with pytest.raises(ValueError, match="has finished"):
        experiments.run(small_recipe(), out=out, resume=True)


def test_full_tuning_leaves_a_model_that_transformers_loads(ray_session, small_recipe, tmp_path):
    from transformers import AutoModelForCausalLM

    changes = ("model.peft=none", "rounds=2", "train.optimizer={kind='sgd', lr=0.5, momentum=0.9}")
    run = experiments.run(small_recipe(*changes), out=tmp_path / "run")
    assert run.losses["end"]["heldout"] < run.losses["round 0"]["heldout"]
    model = AutoModelForCausalLM.from_pretrained(run.model)
    assert model.num_parameters() > 0


def bits(run):
    return (run.model / ADAPTER).read_bytes()


def losses(run):
    """Every loss of a run, per client too, by round: baselines aside, which not every run has."""
    return {
        (row["round"], row["split"], row["client"]): row["value"]
        for row in run.metrics.to_pylist()
        if row["name"] == "loss"
    }


def test_the_servers_own_rows_are_a_split_of_their_own(ray_session, small_recipe, tmp_path):
    changes = ("rounds=2", "data.splits.server=0.2", "cohort.size=3", "evaluate.server_rows=1000")
    run = experiments.run(small_recipe(*changes), out=tmp_path / "run")
    assert run.losses["end"]["server"] < run.losses["round 0"]["server"]
    judged = run.metrics.filter(pc.equal(run.metrics["split"], "server")).to_pylist()
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert {row["value"] for row in judged if row["name"] == "rows"} == {manifest["data"]["server_rows"]}
    assert all(row["client"] is None for row in judged)
    assert "rows of the server" in (run.model / "README.md").read_text()


def test_an_evaluation_beside_the_next_round_is_the_same(reference, small_recipe, tmp_path):
    events = []
    run = experiments.run(small_recipe("evaluate.overlap=true"), out=tmp_path / "run", on_event=events.append)
    seen = [(type(event).__name__, event.round) for event in events if isinstance(event, RoundDone | Evaluated)]
    assert seen.index(("Evaluated", 2)) == seen.index(("RoundDone", 3)) + 1
    assert judged(run) == judged(reference[0]) and {row[0] for row in judged(run)} == {"0", "2", "4"}
    assert bits(run) == bits(reference[0])


def judged(run):
    """Each held-out loss by round, split and client."""
    keys = ("round", "split", "client", "value")
    rows = [row for row in run.metrics.to_pylist() if row["name"] == "loss" and row["split"] != "train"]
    return sorted(tuple(str(row[key]) for key in keys) for row in rows)


def test_conversations_are_trained_on_and_sampled(ray_session, small_recipe, tiny_base, tmp_path):
    base, rows = tmp_path / "base", tmp_path / "rows.jsonl"
    shutil.copytree(tiny_base, base)
    template = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}<a>{% endif %}"
    (base / "chat_template.jinja").write_text(template)
    with rows.open("w") as file:
        for number in range(40):
            turns = [("user", f"what is {number}"), ("assistant", "odd" if number % 2 else "even"), ("user", "sure?")]
            turns += [("assistant", f"yes {number}")]
            talk = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"client": f"c{number % 5}", "messages": talk}) + "\n")
    run = experiments.run(
        small_recipe(
            f"model.base='{base}'", f"data.source.path='{rows}'", "rounds=1", "cohort.size=3", "clients.lanes=64"
        ),
        out=tmp_path / "run",
    )
    # More lanes than clients are no other recipe than the one that a resumed run will be given.
    assert "lanes = 64" in (run.folder / "recipe.toml").read_text()
    (sample, *_) = run.samples
    question, answer, again = sample.prompt.splitlines()
    assert question.startswith("user: what is ") and answer.startswith("assistant: ") and again == "user: sure?"
    assert sample.reference == f"yes {question.split()[-1]}"
