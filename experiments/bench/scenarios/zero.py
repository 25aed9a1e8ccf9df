"""`fedpost bench zero`: what it costs to be many clients in one gang, for ZeRO stages 1 to 3 with two ranks on the CPU.

Where there are GPUs the same is measured on them too, with a whole one for each rank, and so with one rank on one GPU.

No figure is printed unless a run's first round leads where bare DeepSpeed loops lead, each client in a fresh engine.
The bare loop is DeepSpeed's own, on the same batches in the same kind of processes, without Ray, resets, sums or a
server. A gang's tokens per second are of whole rounds.
"""

import statistics
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import torch

import experiments
from datasets_partition.store.store import Store
from engine.config.sections import Zero
from engine.messages.events import Event, RoundDone
from engine.records.checkpoint import load_checkpoint
from experiments.bench.results import Figure, Steps
from experiments.bench.scenarios.lora import CLIENTS
from experiments.bench.scenarios.lora import recipe as lora_recipe
from experiments.bench.stored import stored_bytes
from experiments.bench.zero_ranks import Bare, Work, bare, in_ranks, loaded
from experiments.config.recipe import Recipe, parse_recipe, to_toml
from experiments.preflight.processes import memory
from experiments.runs.api import build_store, ray_session

STAGES, RANKS = (1, 2, 3), 2
ON_GPU = "_gpu"  # what the figures' names end in
TOLERANCE = 2e-5  # of weights after a round: both do the same, and add in another order
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 8}


def measure(small: bool) -> dict[str, Figure]:
    """All figures of all stages; ValueError when the two loops disagree on the CPU."""
    steps, figures, gpus = Steps(), dict[str, Figure](), torch.cuda.device_count()
    with TemporaryDirectory(prefix="fedpost-bench-") as name, ray_session(None):
        folder = Path(name)
        work = lora_recipe(folder, 2, cohort=2) if small else lora_recipe(folder, 5)
        steps_each = f"train.steps={2 if small else 10}"
        work = parse_recipe(to_toml(work), ["model.peft=none", steps_each, "clients.slots=1"])
        if not small:
            _large(folder / "large")
        for stage in STAGES:
            zero = Zero(stage=stage, ranks=RANKS)  # type: ignore[arg-type]
            figures |= _stage(steps, work, zero, folder, "", small)
            if not small:
                steps.say(f"stage {stage}: loading a larger model")
                loading = _loading(replace(work.model, base=str(folder / "large")), zero)
                figures[f"peak_over_shard_s{stage}"] = loading
        on_gpu = replace(work, clients=replace(work.clients, num_gpus=1.0))
        for stage in STAGES if gpus else ():
            zero = Zero(stage=stage, ranks=min(RANKS, gpus))  # type: ignore[arg-type]
            try:
                figures |= _stage(steps, on_gpu, zero, folder, ON_GPU, small)
            except ValueError as error:  # the CPU's figures stand
                steps.say(f"stage {stage} on GPUs: no figures, since {error}")
    return figures


def _stage(steps: Steps, work: Recipe, zero: Zero, folder: Path, where: str, small: bool) -> dict[str, Figure]:
    """The figures of one stage on one kind of device, `where` at the end of their names."""
    stage = f"stage {zero.stage}{' on GPUs' if where else ''}"
    own = folder / f"stage-{zero.stage}{where}"
    steps.say(f"{stage}: bare loops, resets and fresh engines")
    plain = _bare(work, zero, 2 if small else 7)
    steps.say(f"{stage}: rounds through the engine")
    found = _figures(work, zero, own, plain)
    short = parse_recipe(to_toml(work), ["train.steps=1", f"rounds={2 if small else 20}"])
    steps.say(f"{stage}: {short.rounds * short.cohort.expected(CLIENTS):g} short clients in one gang")
    found["rss_slope_mb_per_client"] = _growth(short, zero, own.with_name(f"{own.name}-short"))
    return {f"{name}_s{zero.stage}{where}": figure for name, figure in found.items()}


def _bare(work: Recipe, zero: Zero, tries: int) -> list[Bare]:
    """What each rank has measured without the engine."""
    from engine.workers.token_columns import token_columns

    store = build_store(work)
    cohort = work.cohort.sample(Store.open(store).num_training, work.seed, 0).tolist()
    gpu = work.clients.num_gpus > 0
    found: list[Bare] = in_ranks(zero, gpu, bare, Work(work, zero, token_columns(store, work), cohort, tries))
    return found


def _figures(work: Recipe, zero: Zero, folder: Path, plain: list[Bare]) -> dict[str, Figure]:
    """Resets, whole rounds' speed, and bytes into the store; ValueError where the first round leads elsewhere."""
    stored: list[int] = []

    def look(event: Event) -> None:
        if isinstance(event, RoundDone):  # what a round brings into the store comes at its end
            stored.append(stored_bytes())

    run = experiments.run(replace(work, clients=replace(work.clients, zero=zero)), out=folder, on_event=look)
    apart = gate(folder, zero, [rank.first_S for rank in plain])
    rows = [row for row in run.metrics.to_pylist() if row["split"] == "engine"]
    speed = statistics.median([row["value"] for row in rows if row["name"] == "tokens_per_s"][1:])
    size = sum(parameter.numel() for parameter in _parameters(run.model))
    moved, first = (stored[-1] - stored[0]) / (len(stored) - 1), plain[0]
    return {
        "reset_share": Figure(first.reset_s / first.client_s, f"of a client of {work.train.steps} steps"),
        "reset_speedup": Figure(first.fresh_s / first.reset_s, "fresh engine / reset"),
        "reset_ms": Figure(first.reset_s * 1e3, "ms"),
        "fresh_s": Figure(first.fresh_s, "s"),
        "apart": Figure(apart, "largest difference after the first round"),
        "loop_efficiency": Figure(speed / first.tokens_per_s, "of the bare loop"),
        "tokens_per_s": Figure(speed, "tokens/s"),
        "bare_tokens_per_s": Figure(first.tokens_per_s, "tokens/s"),
        "bytes_over_bound": Figure(moved / (size * (4 + 8)), "of P (4 + 8 gangs), by Ray's own count"),
    }


def gate(folder: Path, zero: Zero, plain: list[np.ndarray]) -> float:
    """How far a run's shards after its first round are from the `plain` ones; ValueError where that is too far."""
    saved = load_checkpoint(folder / "checkpoints", 1)
    assert saved is not None
    shards = [part.params.numpy() for part in saved.state.parts]
    apart = float(np.abs(np.concatenate(shards) - np.concatenate(plain)).max())
    if not apart <= TOLERANCE:
        raise ValueError(f"stage {zero.stage}: after the first round the gang and bare loops are {apart:.2g} apart")
    return apart


def _growth(work: Recipe, zero: Zero, folder: Path) -> Figure:
    """How the ranks' memory grows from client to client, once the first quarter of them is past."""
    held: list[float] = []

    def look(event: Event) -> None:
        if isinstance(event, RoundDone):
            held.append(_ranks_mb())

    experiments.run(replace(work, clients=replace(work.clients, zero=zero)), out=folder, on_event=look)
    if not all(held):
        return Figure(None, "not on this system")
    later = np.array(held[len(held) // 4 :])
    slope = float(np.polyfit(np.arange(len(later)) * work.cohort.expected(CLIENTS), later, 1)[0]) / zero.ranks
    return Figure(slope, f"MB a client and rank, {len(later)} rounds")


def _parameters(model: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return [tensor for file in model.glob("*.safetensors") for tensor in load_file(file).values()]


def _ranks_mb() -> float:
    """What all ranks of all gangs hold of their own; pages of the object store are not."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any(f"ray::{title}" in "".join(process.cmdline()) for title in ("Gang", "Rank")):
                total += memory(process.pid).get("RssAnon", 0.0)
    return total


def _large(folder: Path) -> None:
    """A random Llama of some 600 MB, so that a shard stands out from what a process takes anyway."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=8192, **LARGE)).save_pretrained(folder)


def _loading(model: object, zero: Zero) -> Figure:
    answers = in_ranks(zero, False, loaded, model, zero)
    if None in answers:
        return Figure(None, "not on this system")
    return Figure(max(grown / shard for grown, shard in answers), "growth / (a rank's shard + the largest tensor)")
