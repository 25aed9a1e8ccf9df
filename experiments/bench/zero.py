"""`fedpost bench zero`: what it costs to be many clients in one gang, for ZeRO stages 1 to 3 with two ranks.

No speed is printed unless the gang's trainer and a bare DeepSpeed loop lead to the same weights. The bare loop is
DeepSpeed's own, on the same batches in the same kind of processes, without Ray, resets, sums or a server. A gang's
tokens per second are of whole rounds.
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
from engine.events import Event, RoundDone
from engine.settings import Zero
from experiments.api import build_store, ray_session
from experiments.bench.lora import CLIENTS
from experiments.bench.lora import recipe as lora_recipe
from experiments.bench.results import Figure, Steps
from experiments.bench.zero_ranks import Work, bare, in_ranks, loaded
from experiments.config import Recipe, parse_recipe, to_toml

STAGES, RANKS = (1, 2, 3), 2
TOLERANCE = 2e-5  # of weights after a client: both loops do the same, and add in another order
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 8}


def measure(small: bool) -> dict[str, Figure]:
    """All figures of all stages; ValueError when the two loops disagree."""
    steps, figures = Steps(), dict[str, Figure]()
    with TemporaryDirectory(prefix="fedpost-bench-") as name, ray_session(None):
        folder = Path(name)
        work = lora_recipe(folder, 2 if small else 5)
        work = parse_recipe(to_toml(work), ["model.peft=none", "train.steps=10", "clients.slots=1"])
        short = parse_recipe(to_toml(work), ["train.steps=1", f"rounds={2 if small else 20}"])
        if not small:
            _large(folder / "large")
        for stage in STAGES:
            steps.say(f"stage {stage}: a bare loop, resets and fresh engines")
            zero = Zero(stage=stage, ranks=RANKS)  # type: ignore[arg-type]
            found = _bare_figures(work, zero, 2 if small else 7)
            steps.say(f"stage {stage}: rounds through the engine")
            found |= _run_figures(work, zero, folder / f"stage-{stage}", found.pop("bare_tokens_per_s"))
            steps.say(f"stage {stage}: {short.rounds * short.cohort.expected(CLIENTS):g} short clients in one gang")
            found["rss_slope_mb_per_client"] = _growth(short, zero, folder / f"short-{stage}")
            if not small:
                steps.say(f"stage {stage}: loading a larger model")
                found["peak_over_shard"] = _loading(replace(work.model, base=str(folder / "large")), zero)
            figures |= {f"{name}_s{stage}": figure for name, figure in found.items()}
    return figures


def _bare_figures(work: Recipe, zero: Zero, tries: int) -> dict[str, Figure]:
    (tokens,) = _tokens(work)
    answers = in_ranks(zero, bare, Work(work.model, work.train, zero, tokens, 0, tries))
    apart = max(answer.apart for answer in answers)
    if not apart <= TOLERANCE:
        raise ValueError(f"stage {zero.stage}: the gang's trainer and the bare loop are {apart:.2g} apart")
    slowest = answers[0]
    return {
        "reset_share": Figure(slowest.reset_s / slowest.client_s, f"of a client of {work.train.steps} steps"),
        "reset_speedup": Figure(slowest.fresh_s / slowest.reset_s, "fresh engine / reset"),
        "reset_ms": Figure(slowest.reset_s * 1e3, "ms"),
        "fresh_s": Figure(slowest.fresh_s, "s"),
        "apart": Figure(apart, "largest difference"),
        "bare_tokens_per_s": Figure(slowest.tokens_per_s, "tokens/s"),
    }


def _tokens(work: Recipe) -> list[Path]:
    """The token columns of the recipe's store, which a first run has made."""
    from engine.rows import token_columns

    return [token_columns(build_store(work), work)]


def _run_figures(work: Recipe, zero: Zero, folder: Path, plain: Figure) -> dict[str, Figure]:
    """Whole rounds: speed, and bytes through the object store."""
    run = experiments.run(replace(work, clients=replace(work.clients, zero=zero)), out=folder)
    rows = [row for row in run.metrics.to_pylist() if row["split"] == "engine"]
    speeds, moved = ([row["value"] for row in rows if row["name"] == name] for name in ("tokens_per_s", "store_bytes"))
    size = sum(parameter.numel() for parameter in _parameters(run.model))
    speed = statistics.median(speeds[1:])
    assert plain.value is not None
    return {
        "loop_efficiency": Figure(speed / plain.value, "of the bare loop"),
        "tokens_per_s": Figure(speed, "tokens/s"),
        "bare_tokens_per_s": plain,
        "bytes_over_bound": Figure(statistics.median(moved) / (size * (4 + 8)), "of P (4 + 8 gangs)"),
    }


def _growth(work: Recipe, zero: Zero, folder: Path) -> Figure:
    """How the ranks' memory grows from client to client, once the first quarter of them is past."""
    held: list[float] = []

    def look(event: Event) -> None:
        if isinstance(event, RoundDone):
            held.append(_ranks_mb())

    experiments.run(replace(work, clients=replace(work.clients, zero=zero)), out=folder, on_event=look)
    later = np.array(held[len(held) // 4 :])
    slope = float(np.polyfit(np.arange(len(later)) * work.cohort.expected(CLIENTS), later, 1)[0]) / RANKS
    return Figure(slope, f"MB a client and rank, {len(later)} rounds")


def _parameters(model: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return [tensor for file in model.glob("*.safetensors") for tensor in load_file(file).values()]


def _ranks_mb() -> float:
    """What all ranks of all gangs hold of their own."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any(f"ray::{title}" in "".join(process.cmdline()) for title in ("Gang", "Rank")):
                total += process.memory_full_info().uss / 2**20
    return total


def _large(folder: Path) -> None:
    """A random Llama of some 600 MB, so that a shard stands out from what a process takes anyway."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=8192, **LARGE)).save_pretrained(folder)


def _loading(model: object, zero: Zero) -> Figure:
    answers = in_ranks(zero, loaded, model, zero)
    if None in answers:
        return Figure(None, "not on this system")
    return Figure(max(grown / shard for grown, shard in answers), "growth / (shard + largest tensor)")
