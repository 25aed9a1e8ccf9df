"""`fedpost run RECIPE --dry`: a recipe's whole path on this machine, all that is large shrunk, and what that proves.

Ray is started with as many logical CPUs and GPUs as the shrunk recipe's slots take; torch computes on the CPU.
"""

import json
import math
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from datasets_partition.store.store import Store
from engine.config.privacy import NoDp
from engine.config.sections import Clients
from engine.messages.events import Event, RoundDone, Started
from experiments.config.recipe import Recipe, located, to_toml
from experiments.preflight.shrunk_recipe import ROUNDS, bearable, clients_of, shrunk_recipe
from experiments.preflight.shrunk_rows import Drawn, draw_rows, write_rows
from experiments.runs.api import Run, build_store, ray_session, run
from experiments.runs.resuming import leaves

# No process is to see a real GPU, or to ask the hub.
ALONE = {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "RAY_ADDRESS": None,
}


@dataclass(frozen=True)
class Proof:
    """One thing that a dry run was to show, whether it did, and by what."""

    name: str
    holds: bool
    said: str


@dataclass(frozen=True)
class Dry:
    """What a dry run came to: changed keys (real, dry), proofs, and what is left for the real run."""

    changed: dict[str, tuple[str, str]]
    proofs: list[Proof]
    left: list[str]


def dry_run(recipe: Recipe, on_step: Callable[[str], None] = lambda step: None) -> Dry:
    """Runs the shrunk recipe, and again from its first checkpoint, in a temporary folder.

    Raises ValueError for what would end the real run too, and where nothing is known of the base.
    """
    with environment(**ALONE), TemporaryDirectory(prefix="fedpost-dry-") as name:
        # Only now: what it imports reads the environment.
        from experiments.preflight.shrunk_base import base_config, described, shrunk, stand_in_tokenizer, write_base

        folder = Path(name)
        on_step("shrinking the base")
        tokenizer, config = stand_in_tokenizer(), base_config(located(recipe).model)
        small = shrunk(config, tokenizer)
        write_base(small, tokenizer, folder / "base")
        work = shrunk_recipe(recipe, folder / "base", folder)
        on_step("drawing rows")
        rows = draw_rows(recipe, clients_of(work), work.train.max_length, folder / "stores")
        write_rows(rows, folder)
        work = bearable(work, Store.open(build_store(work)).num_training)
        on_step(f"{ROUNDS} rounds, then once more from the first checkpoint")
        events: list[Event] = []
        with _logical(work.clients):
            first = run(work, out=folder / "run", on_event=events.append)
            again, resumed = _interrupted(work, first, folder / "again")
        changed = {"model.base": (f"{recipe.model.base}: {described(config)}", f"random: {described(small)}")}
        changed |= {"data": (_source(recipe), rows.said)} | _changes(recipe, work)
        proofs = [
            Proof("configuration", True, f"{len(leaves(tomllib.loads(to_toml(recipe))))} keys, which go together"),
            Proof("model", True, f"{small.architectures[0]} loads and trains: {_trained(events, first)}"),
            Proof("rows", True, f"{rows.said}, split and tokenized"),
            _placement(work.clients, events),
            *_rounds(work, events),
            _resume(work, first, again, resumed),
            _export(first),
        ]
        return Dry(changed, proofs, _left(recipe, rows))


def hidden_gpus(gpus: int) -> dict[str, str]:
    """An environment in which Ray counts so many GPUs and no process sees one; Ray wants as many names."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(["-1"] * gpus), "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


@contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """The environment with these values (None: without), for this process and those that it starts."""
    before = {name: os.environ.get(name) for name in values}

    def put(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(values)
    try:
        yield
    finally:
        put(before)


@contextmanager
def _logical(clients: Clients) -> Iterator[None]:
    """A Ray with so many logical CPUs and GPUs as all slots and ranks take."""
    gpus = _gpus(clients)
    with environment(**hidden_gpus(gpus)), ray_session(None, num_cpus=_cpus(clients), num_gpus=gpus):
        yield


def _processes(clients: Clients) -> int:
    zero, slots = clients.zero, clients.slots if clients.slots != "auto" else 1
    if zero is None:
        return slots
    return zero.gangs * zero.ranks + slots if zero.from_rows else zero.ranks * slots


def _cpus(clients: Clients) -> int:
    return max(1, math.ceil(clients.num_cpus * _processes(clients)))


def _gpus(clients: Clients) -> int:
    """How many GPUs all slots and ranks take: a fraction lies on one."""
    if 0 < clients.num_gpus < 1:
        return math.ceil(_processes(clients) / math.floor(1 / clients.num_gpus + 1e-6))
    return round(clients.num_gpus * _processes(clients))


def _interrupted(work: Recipe, first: Run, folder: Path) -> tuple[Run, int | None]:
    """The run as it would be had it ended after its first checkpoint, gone on with; and from which round that was."""
    shutil.copytree(first.folder, folder)
    for later in (folder / "model", folder / "checkpoints" / f"{ROUNDS:05d}"):
        shutil.rmtree(later)
    events: list[Event] = []
    again = run(work, out=folder, resume=True, on_event=events.append)
    return again, next(event.resumed for event in events if isinstance(event, Started))


def _changes(recipe: Recipe, work: Recipe) -> dict[str, tuple[str, str]]:
    """The keys in which two recipes differ, without those that have a line of their own."""
    old, new = (leaves(tomllib.loads(to_toml(one))) for one in (recipe, work))
    own = ("data.", "model.base", "model.revision", "checkpoint.")
    return {
        key: (_shown(old.get(key)), _shown(new.get(key)))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(own)
    }


def _shown(value: object) -> str:
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _source(recipe: Recipe) -> str:
    source, partition = (type(part).__name__ for part in (recipe.data.source, recipe.data.partition))
    where = vars(recipe.data.source).get("path") or vars(recipe.data.source).get("name")
    return f"{source}{f' {where}' if where else ''}, {partition}"


def _trained(events: list[Event], done: Run) -> str:
    started = next(event for event in events if isinstance(event, Started))
    adapter = done.model / "adapter_config.json"
    if not adapter.exists():
        return f"{started.parameters:,} parameters"
    layers = json.loads(adapter.read_text(encoding="utf-8"))["target_modules"]
    return f"adapters on {', '.join(sorted({layer.rpartition('.')[2] for layer in layers}))}"


def _placement(clients: Clients, events: list[Event]) -> Proof:
    started = next(event for event in events if isinstance(event, Started))
    processes, zero = _processes(clients), clients.zero
    assert isinstance(clients.slots, int)  # a shrunk recipe's
    asked = clients.slots + (zero.gangs if zero is not None and zero.from_rows else 0)
    what = f"{started.slots} slots" if zero is None else f"a gang of {zero.ranks} ranks"
    if zero is not None and zero.from_rows:
        what += f" and {processes - zero.ranks} plain slot"
    each = f"num_cpus = {clients.num_cpus:g} and num_gpus = {clients.num_gpus:g}"
    fewer = f" of {asked} asked for" if started.slots < asked else ""
    on = f"logical CPUs: {_cpus(clients)}, logical GPUs: {_gpus(clients)}"
    return Proof("placement", started.slots == asked, f"{what}{fewer} with {each}; {on}")


def _rounds(work: Recipe, events: list[Event]) -> list[Proof]:
    """What the rounds say of strategy and privacy."""
    rounds = [event for event in events if isinstance(event, RoundDone)]
    aborted = [event.aborted for event in rounds if event.aborted is not None]
    failed = {client: why for event in rounds for client, why in event.failed.items()}
    counts = " and ".join(str(event.clients) for event in rounds)
    kind = vars(work.strategy).get("kind", type(work.strategy).__name__)
    strategy = f"{kind}, {len(rounds)} rounds of {counts} clients"
    if failed:
        strategy += f"; {len(failed)} failed: {next(iter(failed.values()))}"
    if aborted:
        strategy += f"; no result in {len(aborted)}: {aborted[0]}"
    secagg, dp = work.privacy.secagg, work.privacy.dp
    private = [f"secure aggregation ({secagg.mode})"] if work.privacy.secure else []
    private += [] if isinstance(dp, NoDp) else [f"{dp.kind} noise, {rounds[-1].epsilon}"]
    holds = not aborted and not failed and all(event.clients for event in rounds)
    return [
        Proof("strategy", holds, strategy),
        Proof("privacy", holds, "; ".join(private) or "the recipe asks for none"),
    ]


def _resume(work: Recipe, first: Run, again: Run, resumed: int | None) -> Proof:
    fresh = not work.privacy.simulated and not isinstance(work.privacy.dp, NoDp)
    files = [(file, again.model / file.name) for file in first.model.glob("*.safetensors")]
    same = bool(files) and (fresh or all(file.read_bytes() == other.read_bytes() for file, other in files))
    ended = "ended well, with other noise" if fresh else "ended in the same bits" if same else "ended in other bits"
    return Proof("checkpoint and resume", same and resumed == 1, f"from the checkpoint of round {resumed}, {ended}")


def _export(done: Run) -> Proof:
    """Loads the model as a program without this project would, and lets it read a few tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(done.model)
    network = AutoModelForCausalLM.from_pretrained(done.model)
    with torch.no_grad():
        logits = network(torch.tensor([tokenizer("the end")["input_ids"]])).logits
    kind = "a PEFT adapter" if (done.model / "adapter_config.json").exists() else "a model"
    return Proof("export", bool(logits.isfinite().all()), f"{kind}, which transformers loads and runs")


def _left(recipe: Recipe, rows: Drawn) -> list[str]:
    """What only the real run can show."""
    clients = recipe.clients
    need = f"{_processes(clients):,} slots or ranks ({_cpus(clients):,} CPUs, {_gpus(clients):,} GPUs)"
    left = [
        f"that the cluster has room for {'slots' if clients.slots == 'auto' else need}, its network and shared disks",
        "memory: `fedpost plan RECIPE` estimates it",
        "the real weights and tokenizer, its chat template, and the loss",
        "speed, and time limits, which were raised where they are short",
    ]
    if clients.availability.trace is not None:
        left.append("the trace of who is there when")
    if clients.min_share:
        left.append("whether clients.min_share of a cohort give an update")
    if clients.num_gpus:
        left.append(f"GPU kernels ({recipe.model.attention} in {recipe.model.dtype})" + (", NCCL" * bool(clients.zero)))
    if recipe.model.compile:
        left.append("torch.compile")
    if not rows.real:
        left.append("the real rows: `fedpost partition RECIPE` reads them")
    if not isinstance(recipe.privacy.dp, NoDp):
        left.append("epsilon and noise at the real population, cohort and number of parameters")
    return left


def show_dry(recipe: Recipe) -> bool:
    """Dry-runs a recipe and prints what it came to; whether all was proved."""
    console = Console(highlight=False, soft_wrap=True)
    found = dry_run(recipe, lambda step: console.print(f"[dim]{step} ...[/dim]"))
    console.print()
    changed = Table("changed", "real", "dry", box=None)
    for key, values in found.changed.items():
        changed.add_row(key, *map(escape, values))
    proofs = Table("proved", "", "by", box=None)
    for proof in found.proofs:
        proofs.add_row(proof.name, "yes" if proof.holds else "[red]no[/red]", escape(proof.said))
    for table in (changed, proofs):
        console.print(table, soft_wrap=False)
        console.print()
    console.print("[bold]only the real run can show[/bold]")
    for line in found.left:
        console.print(f"  {escape(line)}")
    return all(proof.holds for proof in found.proofs)
