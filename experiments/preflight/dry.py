"""`fedpost run RECIPE --dry`: runs everything in a recipe on this machine, shrunk, and says what that proves.

Ray starts with as many logical CPUs and GPUs as the slots of the shrunk recipe need; torch computes on the CPU.
"""

import json
import math
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from rich.table import Table

from datasets_partition.store.store import Store
from engine.config.sections import Clients
from engine.messages.errors import RunError
from engine.messages.events import Event, RoundDone, Started
from experiments.config.recipe import Recipe, located, to_toml
from experiments.preflight.processes import environment, hidden_gpus
from experiments.preflight.shrunk_recipe import ROUNDS, SCORER, Drawn, bearable, clients_of, draw_rows, shrunk_recipe
from experiments.report.run_folder import leaves
from experiments.report.terminal import console, plain
from experiments.runs.api import Run, build_store, ray_session, run
from experiments.runs.resuming import FINISHED

# No process may use a real GPU, the hub, or a cluster.
ALONE = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "RAY_ADDRESS": None}


class Proof(NamedTuple):
    """One thing that a dry run should prove, whether it did, and the evidence."""

    name: str
    holds: bool
    said: str


class Dry(NamedTuple):
    """The result of a dry run: changed keys (real, dry), proofs, and what only the real run can show."""

    changed: dict[str, tuple[str, str]]
    proofs: list[Proof]
    left: list[str]


def dry_run(recipe: Recipe, on_step: Callable[[str], None] = lambda step: None) -> Dry:
    """Runs the shrunk recipe and resumes it; raises what would end the real run too, and RunError for unknown bases."""
    with environment(**ALONE), TemporaryDirectory(prefix="fedpost-dry-") as name:
        # Imported here, since it imports libraries that read the environment.
        from experiments.preflight.shrunk_base import base_config, described, stand_in_tokenizer, write_base
        from experiments.preflight.shrunk_config import shrunk

        folder = Path(name)
        on_step("shrinking the base")
        tokenizer, config = stand_in_tokenizer(), base_config(located(recipe).model)
        try:
            small = shrunk(config, tokenizer)
            write_base(small, tokenizer, folder / "base")
            if any(model.scores for model in recipe.train.objective.models):
                write_base(small, tokenizer, folder / SCORER, scores=True)
        except Exception as error:  # an architecture may have sizes that are not known here
            raise RunError(
                f"a {type(config).__name__} cannot be shrunk ({str(error).strip().splitlines()[0]}): save a small base "
                f"of the same architecture in a folder, and try it with --set model.base=FOLDER, without --dry"
            ) from error
        work = shrunk_recipe(recipe, folder / "base", folder)
        on_step("drawing rows")
        rows = draw_rows(recipe, clients_of(work), work.train.max_length, folder / "stores")
        pq.write_table(rows.table, folder / "rows.parquet")
        work = bearable(work, Store.open(build_store(work)).num_training)
        on_step(f"{ROUNDS} rounds, then once more from the first checkpoint")
        events: list[Event] = []
        _, cpus, gpus = _needs(work.clients)
        with environment(**hidden_gpus(gpus)), ray_session(None, num_cpus=cpus, num_gpus=gpus):
            first = run(work, out=folder / "run", on_event=events.append)
            again, resumed = _interrupted(work, first, folder / "again")
        started = next(event for event in events if isinstance(event, Started))
        base = f"{recipe.model.base}: {described(config)}", f"random: {described(small)}"
        changed = {"model.base": base, "data": (_source(recipe), rows.said)} | _changes(recipe, work)
        proofs = [
            Proof("configuration", True, f"{len(leaves(tomllib.loads(to_toml(recipe))))} keys, which are compatible"),
            Proof("model", True, f"{small.architectures[0]} loads and trains: {_trained(started, first)}"),
            Proof("rows", True, f"{rows.said}, split and tokenized"),
            _placement(work.clients, started),
            *_rounds(work, events),
            _resume(work, first, again, resumed),
            _export(first, work),
        ]
        return Dry(changed, proofs, _left(recipe, rows))


def _needs(clients: Clients) -> tuple[int, int, int]:
    """The number of all slots and ranks, and of CPUs and GPUs that they need; a fraction of a GPU stays on one GPU."""
    zero, slots = clients.zero, clients.slots if clients.slots != "auto" else 1
    ranks = 0 if zero is None else zero.ranks * (zero.gangs if zero.from_rows else slots)
    processes = ranks + slots if zero is None or zero.from_rows else ranks
    gpus = round(clients.num_gpus * processes)
    if 0 < clients.num_gpus < 1:
        gpus = math.ceil(processes / math.floor(1 / clients.num_gpus + 1e-6))
    return processes, max(1, math.ceil(clients.num_cpus * processes)), gpus


def _interrupted(work: Recipe, first: Run, folder: Path) -> tuple[Run, int | None]:
    """A copy of the run, cut off after its first checkpoint and resumed; and the round that it resumed from."""
    shutil.copytree(first.folder, folder)
    (folder / FINISHED).unlink()
    for later in (folder / "model", folder / "checkpoints" / f"{ROUNDS:05d}"):
        shutil.rmtree(later)
    events: list[Event] = []
    again = run(work, out=folder, resume=True, on_event=events.append)
    return again, next(event.resumed for event in events if isinstance(event, Started))


def _changes(recipe: Recipe, work: Recipe) -> dict[str, tuple[str, str]]:
    """The keys in which two recipes differ, without those that have their own lines."""
    old, new = (leaves(tomllib.loads(to_toml(each))) for each in (recipe, work))
    changed = {}
    for key in sorted(old.keys() | new.keys()):
        before, after = (values.get(key, "unset") for values in (old, new))
        if before != after and not key.startswith(("data.", "model.base", "model.revision", "checkpoint.")):
            real, dry = (f"{value:g}" if isinstance(value, float) else str(value) for value in (before, after))
            changed[key] = real, dry
    return changed


def _source(recipe: Recipe) -> str:
    source, partition = recipe.data.source, type(recipe.data.partition).__name__
    where = vars(source).get("path") or vars(source).get("name")
    return f"{type(source).__name__}{f' {where}' if where else ''}, {partition}"


def _trained(started: Started, finished: Run) -> str:
    adapter = finished.model / "adapter_config.json"
    if not adapter.exists():
        return f"{started.parameters:,} parameters"
    layers = json.loads(adapter.read_text(encoding="utf-8"))["target_modules"]
    return f"adapters on {', '.join(sorted({layer.rpartition('.')[2] for layer in layers}))}"


def _placement(clients: Clients, started: Started) -> Proof:
    zero, asked, (processes, cpus, gpus) = clients.zero, clients.slots, _needs(clients)
    assert isinstance(asked, int)  # a shrunk recipe's
    what = f"{started.slots} slots" if zero is None else f"a gang of {zero.ranks} ranks"
    if zero is not None and zero.from_rows:
        asked += zero.gangs
        what += f" and {processes - zero.ranks} plain slot"
    what += f" of {asked} asked for" if started.slots < asked else ""
    each = f"num_cpus = {clients.num_cpus:g} and num_gpus = {clients.num_gpus:g}"
    on = f"logical CPUs: {cpus}, logical GPUs: {gpus}"
    return Proof("placement", started.slots == asked, f"{what} with {each}; {on}")


def _rounds(work: Recipe, events: list[Event]) -> list[Proof]:
    """What the rounds prove about strategy and privacy."""
    rounds = [event for event in events if isinstance(event, RoundDone)]
    aborted = [event.aborted for event in rounds if event.aborted is not None]
    failed = {client: why for event in rounds for client, why in event.failed.items()}
    counts = " and ".join(str(event.clients) for event in rounds)
    kind = vars(work.strategy).get("kind", type(work.strategy).__name__)
    strategy = f"{kind}, {len(rounds)} rounds of {counts} clients"
    strategy += f"; {len(failed)} failed: {next(iter(failed.values()))}" if failed else ""
    strategy += f"; no result in {len(aborted)}: {aborted[0]}" if aborted else ""
    dp = work.privacy.dp
    private = [f"secure aggregation ({work.privacy.secagg.mode})"] if work.privacy.secure else []
    private += [] if dp.unit is None else [f"{dp.kind} noise, {rounds[-1].epsilon}"]
    holds = not aborted and not failed and all(event.clients for event in rounds)
    said = "; ".join(private) or "the recipe asks for none"
    return [Proof("strategy", holds, strategy), Proof("privacy", holds, said)]


def _resume(work: Recipe, first: Run, again: Run, resumed: int | None) -> Proof:
    fresh = not work.privacy.simulated and work.privacy.dp.unit is not None
    files = [(file, again.model / file.name) for file in first.model.glob("*.safetensors")]
    same = bool(files) and (fresh or all(file.read_bytes() == other.read_bytes() for file, other in files))
    ended = "ended well, with other noise" if fresh else "ended in the same bits" if same else "ended in other bits"
    return Proof("checkpoint and resume", same and resumed == 1, f"from the checkpoint of round {resumed}, {ended}")


def _export(finished: Run, work: Recipe) -> Proof:
    """Loads the model, or the adapter onto its base, without fedpost and runs it on a few tokens."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, adapter = AutoTokenizer.from_pretrained(finished.model), finished.model / "adapter_config.json"
    kind, weights = ("a PEFT adapter", work.model.base) if adapter.exists() else ("a model", finished.model)
    if work.scores:
        network: Any = AutoModelForSequenceClassification.from_pretrained(weights, num_labels=1)
    else:
        network = AutoModelForCausalLM.from_pretrained(weights)
    if adapter.exists():
        network = PeftModel.from_pretrained(network, finished.model)
    with torch.no_grad():
        logits = network(torch.tensor([tokenizer("the end")["input_ids"]])).logits
    return Proof("export", bool(logits.isfinite().all()), f"{kind}, which transformers loads and runs")


def _left(recipe: Recipe, rows: Drawn) -> list[str]:
    """What only the real run can show."""
    clients, model, has_noise = recipe.clients, recipe.model, recipe.privacy.dp.unit is not None
    processes, cpus, gpus = _needs(clients)
    room = "slots" if clients.slots == "auto" else f"{processes:,} slots or ranks ({cpus:,} CPUs, {gpus:,} GPUs)"
    kernels = f"GPU kernels ({model.attention} in {model.dtype})" + (", NCCL" if clients.zero else "")
    left = {
        f"whether the cluster has room for {room}, its network, shared disks": True,
        "memory: `fedpost plan RECIPE` estimates it": True,
        "the real weights and tokenizer, its chat template, and the loss": True,
        "speed and time limits (short limits were raised)": True,
        "the trace of when clients are available": clients.availability.trace is not None,
        "whether clients.min_share of a cohort send an update": clients.min_share > 0,
        kernels: clients.num_gpus > 0,
        "torch.compile": model.compile,
        "the weights of the objective's other models, and their vocabulary": bool(recipe.train.objective.models),
        "the real rows: `fedpost partition RECIPE` reads them": not rows.real,
        "epsilon and noise at the real population, cohort and number of parameters": has_noise,
    }
    return [line for line, is_left in left.items() if is_left]


def show_dry(recipe: Recipe) -> bool:
    """Dry-runs a recipe and prints the result; returns whether everything was proved."""
    screen = console()
    result = dry_run(recipe, lambda step: screen.print(plain(f"{step} ...", "dim")))
    changed, proofs = Table("changed", "real", "dry", box=None), Table("proved", "", "by", box=None)
    for key, values in result.changed.items():
        changed.add_row(plain(key), *map(plain, values))
    for proof in result.proofs:
        proofs.add_row(plain(proof.name), "yes" if proof.holds else plain("no", "red"), plain(proof.said))
    for table in (changed, proofs):
        screen.print()
        screen.print(table, soft_wrap=False)
    screen.print()
    screen.print(plain("only the real run can show", "bold"))
    for line in result.left:
        screen.print(plain(f"  {line}"))
    return all(proof.holds for proof in result.proofs)
