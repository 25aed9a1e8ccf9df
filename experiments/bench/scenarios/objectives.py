"""`fedpost bench objectives`: DPO with its live reference pass against a bare PyTorch loop, and in lanes, by size."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.bench.bare import PROCESSES, compare
from experiments.bench.harness import TEXTS, Bench, write_llama
from experiments.bench.scenarios.bare_loop import case_name
from experiments.config.recipe import SHIPPED
from strategies.core.seeds import rng

CLIENTS, COHORT, ROWS = 40, 16, 16
WORDS = 3 * 128  # of each side, which the length cuts
# Pairs of a step, tokens of a side, lanes.
CASES = (
    *((4, 128, 1), (1, 32, 1), (1, 32, 8), (2, 32, 1), (2, 32, 8)),
    *((4, 32, 1), (4, 32, 8), (1, 128, 1), (1, 128, 8), (2, 128, 1), (2, 128, 8)),
)
SMALL_CASES = 3
DPO = "train.objective={kind='dpo', precompute_ref_log_probs=false}"


def objectives(bench: Bench) -> None:
    """Measures tokens per second of DPO clients by case, and what lanes gain over one client at a time."""
    write_llama(bench.folder / "base", (256, 512, 4, 4))
    write_pairs(bench.folder)
    speeds = dict[str, float]()
    for batch, length, lanes in CASES[:SMALL_CASES] if bench.small else CASES:
        case = case_name(batch, length, lanes)
        bench.say(f"DPO, {batch} pairs of 2 x {length} tokens a step, {lanes} of {COHORT} clients at once")
        train = f"train={{steps=4, batch={batch}, max_length={length}, optimizer={{kind='adamw', eps=1e-6}}}}"
        size = (f"rounds={3 if bench.small else 8}", f"clients.slots={PROCESSES}", f"cohort.size={COHORT}")
        work = bench.recipe(*size, train, DPO, f"clients.lanes={lanes}")
        compared = compare(work, bench.folder / f"run-{case}")
        bench.add(f"dpo_efficiency_{case}", compared.ratio, "of the bare loop's tokens/s")
        bench.add(f"apart_{case}", compared.apart, "largest difference")
        # Both are measured against the same bare loop, which is in the same state of the machine.
        speeds[case] = compared.ratio
        single = case_name(batch, length, 1)
        if lanes > 1:
            bench.add(
                f"dpo_lanes_speedup_{batch}x{length}", speeds[case] / speeds[single], "times one client at a time"
            )


def write_pairs(folder: Path) -> None:
    """Writes rows.parquet: pairs of random words, each side longer than any case's length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED["tiny"])
    draw = rng(0, 0, -1, "sample")
    texts = pa.array([tokenizer.decode(draw.integers(300, 4000, WORDS)) for _ in range(TEXTS // 8)])
    owners = np.repeat(np.arange(CLIENTS), ROWS)
    chosen, rejected = (texts.take(pa.array(draw.integers(0, len(texts), len(owners)))) for _ in range(2))
    prompts = pa.array([f"{number} " for number in range(len(owners))])
    columns = {"client": pa.array(np.char.zfill(owners.astype("U7"), 7)), "prompt": prompts}
    pq.write_table(pa.table({**columns, "chosen": chosen, "rejected": rejected}), folder / "rows.parquet")
