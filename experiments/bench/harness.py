"""The harness of all benchmarks: figures, progress on stderr, one folder and one Ray, inputs, recipes, times, gates."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import experiments
from engine.messages.events import Event, RoundDone
from experiments.config.recipe import RECIPES, SHIPPED, Recipe, parse_recipe
from experiments.report.terminal import say
from experiments.runs.api import Run, ray_session
from strategies.core.seeds import rng

# The files of `scenarios/` that hold several; all others are named after theirs.
FILES = {
    **dict.fromkeys(("lora", "tiny", "big_update", "cohort", "gpu"), "bare_loop"),
    **dict.fromkeys(("overhead", "population"), "null_clients"),
    **dict.fromkeys(("memory", "plan"), "held_memory"),
}
WITHOUT_RAY = {"partition", "population", "slots"}  # they start their own, or none
TEXTS = 4096  # different texts, from which the rows are drawn
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DEMO = (RECIPES / "demo.toml").read_text(encoding="utf-8")
# Short prompts of the standard library alone, and short rows: the demo in seconds.
SMALL_DEMO = (
    'data.source={kind="python_docs", packages=[], prompt_chars=60}',
    *("train.steps=1", "train.max_length=64", "evaluate.every=0", "evaluate.rows=1"),
)


class Figure(NamedTuple):
    """One result; its value is None where it cannot be measured on this machine."""

    value: float | None
    unit: str


class Bench:
    """A running scenario: its folder, whether it is small, and the figures that it has measured so far."""

    def __init__(self, folder: Path, small: bool) -> None:
        self.folder, self.small, self.figures = folder, small, dict[str, Figure]()
        self.began = self.last_line = time.monotonic()

    def say(self, step: str, pause_s: float = 0.0) -> None:
        """Prints the seconds since the start and the step that begins, unless the last line is younger than a pause."""
        if (now := time.monotonic()) - self.last_line >= pause_s:
            self.last_line = now
            say(f"{now - self.began:6.1f} s  {step}", error=True)

    def add(self, name: str, value: float | None, unit: str) -> None:
        """Adds a figure."""
        self.figures[name] = Figure(value, unit)

    def recipe(self, *changes: str, rows: Path | None = None) -> Recipe:
        """A recipe over the `base` of the folder and the rows in it, or in the folder `rows`; all rows train."""
        rows = rows or self.folder
        text = f"""
            name = "bench"
            seed = 1
            evaluate = {{ every = 0, rows = 1 }}
            checkpoint.keep = 1000
            data.source = {{ kind = "parquet", path = "{rows / "rows.parquet"}" }}
            data.splits = {{ heldout = 0.0, unseen = 0.0, duplicates = "keep" }}
            data.cache = "{rows / "stores"}"
            model.base = "{self.folder / "base"}"
            """
        return parse_recipe(text, [*changes])

    def run(self, work: Recipe, name: str, read: Callable[[], float] = lambda: 0.0) -> tuple[Run, list[float]]:
        """Runs a recipe in the subfolder `name`; returns the run, and what `read` gave at the end of each round."""
        readings: list[float] = []

        def at_each_round(event: Event) -> None:
            if isinstance(event, RoundDone):
                readings.append(read())

        return experiments.run(work, out=self.folder / name, on_event=at_each_round), readings


def scenario_of(name: str) -> Callable[[Bench], None]:
    """The scenario of that name."""
    scenario: Callable[[Bench], None] = getattr(import_module(f"{__package__}.scenarios.{FILES.get(name, name)}"), name)
    return scenario


def measure(name: str, small: bool) -> dict[str, Figure]:
    """Returns the figures of a scenario, which has a folder and a Ray while it runs."""
    scenario, session = scenario_of(name), nullcontext() if name in WITHOUT_RAY else ray_session(None)
    with TemporaryDirectory(prefix="fedpost-bench-") as folder, session:
        scenario(bench := Bench(Path(folder), small))
    return bench.figures


def write_llama(folder: Path, sizes: Sequence[int], *, vocabulary: int | None = None, of_bytes: bool = False) -> None:
    """Writes a random Llama of these SIZES, and the shipped tokenizer or one whose tokens are bytes."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer: Any = _bytes_tokenizer() if of_bytes else AutoTokenizer.from_pretrained(SHIPPED["tiny"])
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary or len(tokenizer), **dict(zip(SIZES, sizes, strict=True)))
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _bytes_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({sign: place for place, sign in enumerate(signs)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def write_rows(folder: Path, clients: int, rows: int | np.ndarray, words: int) -> None:
    """Writes rows.parquet: `rows` rows of `words` random words a client, or each client's number of rows (N,)."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(SHIPPED["tiny"])
    draw = rng(0, 0, -1, "sample")
    texts = pa.array([tokenizer.decode(draw.integers(300, 4000, words)) for _ in range(TEXTS)])
    owners = np.repeat(np.arange(clients), rows)
    picked = pa.array(draw.integers(0, TEXTS, len(owners)))
    folder.mkdir(exist_ok=True)
    table = pa.table({"client": pa.array(np.char.zfill(owners.astype("U7"), 7)), "text": texts.take(picked)})
    pq.write_table(table, folder / "rows.parquet")


def metric(run: Run, name: str, split: str = "engine") -> list[float]:
    """One number a round of what a run has logged about all clients together, round 0 left out."""
    rows = (row for row in run.metrics.to_pylist() if row["round"] > 0 and row["client"] is None)
    return [row["value"] for row in rows if (row["split"], row["name"]) == (split, name)]


def seconds_of(
    work: Callable[[], Any], tries: int = 1, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[float], Any]:
    """The seconds that each of `tries` calls takes by a clock, and what the last one returned."""
    seconds, result = [], None
    for _ in range(tries):
        began, result = clock(), work()
        seconds.append(clock() - began)
    return seconds, result


def largest_difference(what: str, left: Any, right: Any, tolerance: float) -> float:
    """How far two vectors are apart; ValueError, and so no figure, if that is more than `tolerance` or NaN."""
    apart = float(np.abs(np.asarray(left) - np.asarray(right)).max())
    if not apart <= tolerance:
        raise ValueError(f"{what} are {apart:.2g} apart, more than {tolerance:g}: no figure is worth anything")
    return apart


def power(number: int) -> str:
    """A power of ten as figures name it: 1e6."""
    return f"1e{len(str(number)) - 1}"
