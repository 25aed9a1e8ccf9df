"""`fedpost bench objectives`: DPO and GRPO against bare PyTorch loops, one client at a time and in lanes, by size.

DPO has its live reference pass, GRPO samples with a cache and is judged by a reward; the bare loops do the same.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.bench.bare import PROCESSES, compare
from experiments.bench.harness import TEXTS, Bench, write_llama
from experiments.bench.scenarios.bare_loop import case_name
from experiments.config.recipe import SHIPPED
from strategies.core.seeds import rng

CLIENTS, COHORT, ROWS = 40, 16, 16
LENGTHS = (32, 128)  # tokens of a prompt, or of a side of a pair
SAMPLES, NEW = 4, 16  # completions of a prompt, and tokens of each
# Rows of a step and their tokens; each is measured one client at a time and in lanes.
SIZES = ((1, 32), (2, 32), (4, 32), (1, 128), (2, 128))
LANES = 8
OBJECTIVES = {
    "dpo": "{kind='dpo', precompute_ref_log_probs=false}",
    "grpo": f"{{kind='grpo', rewards=[{{kind='length', unit='characters', target=80}}], num_generations={SAMPLES}, "
    f"max_completion_length={NEW}, reference='none'}}",
}


def objectives(bench: Bench) -> None:
    """Measures tokens per second of DPO and GRPO clients by case, and what lanes gain over one client at a time."""
    write_llama(bench.folder / "base", (256, 512, 4, 4))
    for length in LENGTHS:
        write_pairs(bench.folder / f"dpo-{length}", length)
        write_prompts(bench.folder / f"grpo-{length}", length)
    for kind in OBJECTIVES:
        for batch, length in SIZES[:1] if bench.small else SIZES:
            # Both are measured against the same bare loop, which is in the same state of the machine.
            single, together = (_ratio(bench, kind, batch, length, lanes) for lanes in (1, LANES))
            bench.add(f"{kind}_lanes_speedup_{batch}x{length}", together / single, "times one client at a time")


def _ratio(bench: Bench, kind: str, batch: int, length: int, lanes: int) -> float:
    """Adds a case's figures, and returns the engine's speed over the bare loop's."""
    case = f"{kind}_{case_name(batch, length, lanes)}"
    bench.say(f"{kind}: {batch} rows of {length} tokens a step, {lanes} of {COHORT} clients at once")
    longest = length + NEW * (kind == "grpo")
    train = f"train={{steps=4, batch={batch}, max_length={longest}, optimizer={{kind='adamw', eps=1e-6}}}}"
    size = (f"rounds={3 if bench.small else 6}", f"clients.slots={PROCESSES}", f"cohort.size={COHORT}")
    changes = (*size, train, f"train.objective={OBJECTIVES[kind]}", f"clients.lanes={lanes}")
    compared = compare(bench.recipe(*changes, rows=bench.folder / f"{kind}-{length}"), bench.folder / f"run-{case}")
    bench.add(f"{case}_efficiency", compared.ratio, "of the bare loop's tokens/s")
    bench.add(f"{case}_apart", compared.apart, "largest difference")
    return compared.ratio


def write_pairs(folder: Path, length: int) -> None:
    """Writes rows.parquet: pairs of random words, each side at least `length` tokens long."""
    tokenizer, draw = _tokenizer(), rng(0, 0, -1, "sample")
    texts = pa.array([tokenizer.decode(draw.integers(300, 4000, 3 * length)) for _ in range(TEXTS // 8)])
    chosen, rejected = (texts.take(pa.array(draw.integers(0, len(texts), CLIENTS * ROWS))) for _ in range(2))
    prompts = pa.array([f"{number} " for number in range(CLIENTS * ROWS)])
    _write(folder, {"prompt": prompts, "chosen": chosen, "rejected": rejected})


def write_prompts(folder: Path, length: int) -> None:
    """Writes rows.parquet: prompts of random words, of `length` tokens each."""
    tokenizer, draw, prompts = _tokenizer(), rng(0, 0, -1, "sample"), set[str]()
    while len(prompts) < CLIENTS * ROWS:
        # Of random tokens the tokenizer makes others, which last.
        ids = tokenizer(tokenizer.decode(draw.integers(300, 4000, length)))["input_ids"]
        text = tokenizer.decode(ids[:length])
        if len(tokenizer(text)["input_ids"]) == length:
            prompts.add(text)
    _write(folder, {"prompt": pa.array(sorted(prompts))})


def _write(folder: Path, columns: dict[str, pa.Array]) -> None:
    owners = pa.array([f"{client:07}" for client in np.repeat(np.arange(CLIENTS), ROWS)])
    folder.mkdir()
    pq.write_table(pa.table({"client": owners, **columns}), folder / "rows.parquet")


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHIPPED["tiny"])
