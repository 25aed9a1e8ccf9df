"""Digests of short runs: what moving and renaming code must not change.

    python -m tests.golden --out FOLDER [NAME ...]    run the recipes on this tree, keep their vectors and metrics
    python -m tests.golden A B [--only NAME ...]      compare two of them: each a commit, `.` or such a folder

Only the same machine and the same package versions give the same digests. Nothing here imports the project's inner
modules, and keys that were renamed are tried by both names, so that one script runs on either commit.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
BASE = """
name = "golden"
seed = 5
rounds = 2
[model]
base = "{folder}/base"
peft = {{ kind = "lora", r = 4, alpha = 8, targets = ["q_proj", "v_proj", "down_proj"] }}
[data]
source = {{ kind = "jsonl", path = "{folder}/rows.jsonl" }}
splits = {{ heldout = 0.25, unseen = 0.2 }}
cache = "{folder}/stores"
[clients]
slots = 1
[cohort]
size = 4
[train]
steps = 2
batch = 4
max_length = 48
optimizer = {{ kind = "adamw", lr = 1e-2 }}
[evaluate]
every = 1
rows = 4
"""
UNIFORM = 'strategy={kind="fedavg", weighting="uniform"}'
SGD = 'train.optimizer={kind="sgd", lr=0.05}'
RANKS = "model.peft.ranks=[{r=2, share=0.5}, {r=4, share=0.5}]"
RECIPES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "two_slots": ("clients.slots=2",),
    "three_slots": ("clients.slots=3",),
    "resumed": (),
    "full_tuning": ("model.peft=none", 'train.optimizer={kind="adamw", lr=1e-3}'),
    "lanes": ("clients.lanes=3",),
    "lanes_scaffold": ("clients.lanes=2", "strategy=scaffold", SGD),
    "mixed_ranks": ("strategy=hetlora", RANKS),
    "schedules": (
        "train.accumulate=2",
        "train.batch=2",
        "train.clip=0.5",
        'train.state="keep"',
        'train.over_steps={kind="cosine", warmup=1}',
        'train.over_rounds={kind="linear"}',
    ),
    "torch_optimizer": ('train.optimizer={kind="torch", name="NAdam", lr=5e-3}',),
    "scaffold": ("strategy=scaffold", SGD),
    "fedadam": ("strategy=fedadam",),
    "feddyn": ("strategy=feddyn", SGD),
    "fednova": ("strategy=fednova", SGD),
    "fedex": ("strategy=fedex",),
    "flexlora": ("strategy=flexlora", RANKS),
    "flora": ("strategy=flora",),
    "ffa": ("strategy=ffa",),
    "krum": ('strategy={kind="krum", f=1}', "cohort.size=6"),
    "rfa": ("strategy=rfa",),
    "ditto": ("strategy=ditto",),
    "fedsa": ("strategy=fedsa",),
    "transforms": ('transforms=[{kind="topk", share=0.3}, {kind="int8"}]',),
    "secagg": ('privacy.secagg={mode="ideal", bound=1.0}', UNIFORM),
    "secagg_full": ('privacy.secagg={mode="full", bound=1.0}', UNIFORM, "clients.slots=2"),
    "central_dp": ('privacy.dp={kind="central", noise_multiplier=0.5, clip=0.3, delta=1e-3}', UNIFORM),
    "distributed_dp": (
        'privacy.dp={kind="distributed", noise_multiplier=0.5, clip=0.3, delta=1e-3}',
        'privacy.secagg={mode="ideal", bound=1.0}',
        UNIFORM,
    ),
    "example_dp": ('privacy.dp={kind="example", noise_multiplier=0.5, clip=0.3, delta=1e-3}',),
    "gang_stage1": ("clients.zero={stage=1, ranks=2}", "rounds=1", "cohort.size=2"),
    "gang_stage2": ("clients.zero={stage=2, ranks=2}", "model.peft=none", "rounds=1", "cohort.size=2", SGD),
    "gang_stage3": ("clients.zero={stage=3, ranks=2}", "cohort.size=2", "strategy=scaffold", SGD),
    "mixed_pool": ("clients.zero={stage=3, ranks=2, from_rows=12}",),
    "csv": ('data.source={kind="csv", path="FOLDER/rows.csv"}',),
    "messages": ('data.source={kind="jsonl", path="FOLDER/messages.jsonl"}',),
}
RENAMED = {"clients.lanes": "clients.pack"}
# Figures of the clock and of the engine's own traffic.
TIMED = ["round_s", "apply_s", "tokens_per_s", "evaluate_s", "balance", "store_bytes"]


def make_base(folder: Path) -> None:
    """Writes a random Llama of a few thousand parameters with a byte-level tokenizer as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=258, special_tokens=["<end>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<pad>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_rows() -> Iterator[dict[str, str]]:
    """Yields the rows of ten clients with 4 to 22 rows each: spell a short word backwards."""
    letters = "abcdefgh"
    for client in range(10):
        for row in range(4 + 2 * client):
            word = "".join(letters[(client * 3 + row * (k + 1)) % 8] for k in range(3 + row % 3)) + str(row)
            yield {"client": f"client-{client}", "prompt": f"{word} backwards is ", "completion": word[::-1]}


def make_inputs(folder: Path) -> None:
    """Writes the base and the rows, as JSON lines, CSV and conversations."""
    make_base(folder / "base")
    rows = list(make_rows())
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    header = "client,prompt,completion\n"
    (folder / "rows.csv").write_text(header + "".join(",".join(row.values()) + "\n" for row in rows))
    with (folder / "messages.jsonl").open("w") as file:
        for row in rows:
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
            file.write(json.dumps({"client": row["client"], "messages": turns}) + "\n")
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    (folder / "base" / "chat_template.jinja").write_text(template)


def recipe_text(inputs: Path, changes: Sequence[str], renamed: dict[str, str]) -> tuple[str, list[str]]:
    """The recipe and the changes to it, in the words of the tree that it is for."""
    words = [change.replace("FOLDER", str(inputs)) for change in changes]
    for new, old in renamed.items():
        words = [word.replace(f"{new}=", f"{old}=") for word in words]
    return BASE.format(folder=inputs), words


def run_recipe(name: str, inputs: Path, out: Path) -> None:
    """Runs one recipe into the folder `out`; the recipe `resumed` stops after a round and is resumed."""
    import experiments

    try:
        from experiments.config.recipe import parse_recipe
    except ImportError:  # as it was called before the rooms
        from experiments.config.recipe import parse_recipe

    def recipe(*more: str) -> object:
        try:
            return parse_recipe(*recipe_text(inputs, (*RECIPES[name], *more), {}))
        except ValueError:
            return parse_recipe(*recipe_text(inputs, (*RECIPES[name], *more), RENAMED))

    if name == "resumed":
        experiments.run(recipe("rounds=1"), out=out)
        experiments.run(recipe(), out=out, resume=True)
    else:
        experiments.run(recipe(), out=out)


def vectors(run: Path) -> dict[str, np.ndarray]:
    """The tensors of the last checkpoint, of what clients keep, and of the exported model, by file and name."""
    from safetensors.numpy import load_file

    (*_, last) = sorted((run / "checkpoints").iterdir())
    places = ((last, "*"), (run / "model", "*"), (run / "client_state", "**/*"), (run / "memory", "**/*"))
    files = sorted(file for folder, name in places for file in folder.glob(f"{name}.safetensors"))
    tensors = {f"{file.relative_to(run)}:{name}": x for file in files for name, x in sorted(load_file(file).items())}
    for older, name in (("memory/", "client_state/"), (":residual", ":merged_delta")):
        tensors = {key.replace(older, name): x for key, x in tensors.items()}
    return tensors


def metrics(run: Path) -> list[str]:
    """All figures that do not depend on time, a line each."""
    lines = []
    for file in sorted((run / "metrics").glob("round-*.parquet")):
        table = pq.read_table(file, filters=~pc.field("name").isin(TIMED)).drop_columns("wall_s")
        lines += [json.dumps(row, sort_keys=True) for row in table.to_pylist()]
    return sorted(lines)


def keep(name: str, inputs: Path, out: Path) -> None:
    """Runs a recipe and keeps what it has led to."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        run_recipe(name, inputs, run)
        write_result(out, name, vectors(run), metrics(run))


def write_result(out: Path, name: str, arrays: dict[str, np.ndarray], lines: list[str]) -> None:
    """Writes a recipe's vectors and metrics."""
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / f"{name}.npz", **arrays)
    (out / f"{name}.txt").write_text("\n".join(lines))


def measure(out: Path, inputs: Path, names: Sequence[str]) -> None:
    """Runs the named recipes on the tree that Python imports from; keeps vectors and metrics, prints their digests."""
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init("local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="error")
    for name in names:
        keep(name, inputs, out)
        print(f"{name:16} {digest_of(out, name)}", flush=True)
    ray.shutdown()


def digest_of(out: Path, name: str) -> str:
    """The digests of a recipe's vectors and of its metrics."""
    with np.load(out / f"{name}.npz") as arrays:
        of_vectors = sha256(b"".join(key.encode() + arrays[key].tobytes() for key in arrays.files))
    return f"{of_vectors.hexdigest()[:16]} {sha256((out / f'{name}.txt').read_bytes()).hexdigest()[:16]}"


def largest_difference(a: Path, b: Path, name: str) -> str:
    """Says how far two results of a recipe are apart; nothing where they are equal."""
    if digest_of(a, name) == digest_of(b, name):
        return ""
    lines = [(folder / f"{name}.txt").read_text().splitlines() for folder in (a, b)]
    differing = sorted(set(lines[0]) ^ set(lines[1]))
    said = [f"{len(differing)} lines of metrics differ, such as {differing[0]}"] if differing else []
    with np.load(a / f"{name}.npz") as ours, np.load(b / f"{name}.npz") as theirs:
        if names := set(ours.files) ^ set(theirs.files):
            said.append(f"only in one of them: {', '.join(sorted(names)[:4])}")
        both = sorted(set(ours.files) & set(theirs.files))
        wrong = [key for key in both if ours[key].shape != theirs[key].shape]
        gaps = {key: np.abs(ours[key] - theirs[key]).max(initial=0.0) for key in both if key not in wrong}
        far = max(gaps, key=lambda key: gaps[key], default="")
        if wrong or (far and gaps[far] > 0):
            said.append(f"shapes differ: {wrong[:4]}" if wrong else f"{far} differs by up to {gaps[far]:.3g}")
    return "; ".join(said) or "the order of tensors differs"


def result_of(which: str, inputs: Path, scratch: Path, names: Sequence[str]) -> Path:
    """The folder of results that `which` names: itself, or made from a commit or from this tree (`.`)."""
    if which != "." and Path(which).is_dir():
        return Path(which)
    tree, out = ROOT, scratch / "results" / which.replace("/", "_")
    if which != ".":
        tree = scratch / "trees" / which.replace("/", "_")
        tree.mkdir(parents=True)
        archive = subprocess.run(["git", "archive", which], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", tree], input=archive, check=True)
    # The script itself is always this one.
    command = [sys.executable, str(Path(__file__)), "--out", str(out), "--inputs", str(inputs), *names]
    subprocess.run(command, cwd=tree, check=True, env={**os.environ, "PYTHONPATH": str(tree)})
    return out


def main() -> int:
    """Runs or compares, as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="recipes with --out; otherwise the two to compare")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--inputs", type=Path, help="where base and rows lie; they are made there if they do not")
    parser.add_argument("--only", nargs="+", default=[])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        inputs = given.inputs or Path(scratch) / "inputs"
        if not (inputs / "base").exists():
            inputs.mkdir(parents=True, exist_ok=True)
            make_inputs(inputs)
        if given.out is not None:
            measure(given.out, inputs, given.names or list(RECIPES))
            return 0
        if len(given.names) != 2:
            parser.error("name two commits or folders to compare, or --out FOLDER to run the recipes of this tree")
        names = given.only or list(RECIPES)
        a, b = (result_of(which, inputs, Path(scratch), names) for which in given.names)
        names = [name for name in names if all((folder / f"{name}.npz").exists() for folder in (a, b))]
        apart = {name: said for name in names if (said := largest_difference(a, b, name))}
        for name, said in apart.items():
            print(f"{name}: {said}")
        print(f"{len(names) - len(apart)} of {len(names)} recipes are the same, bit for bit")
        return 1 if apart else 0


if __name__ == "__main__":
    raise SystemExit(main())
