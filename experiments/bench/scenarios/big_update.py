"""`fedpost bench big_update`: an update of 25 million parameters and hardly any training, against the bare loop."""

from dataclasses import replace

from experiments.bench.bare import PROCESSES, compare
from experiments.bench.bases import write_llama, write_rows
from experiments.bench.harness import Bench, scenario
from experiments.bench.sampling import command_mb

LLAMA = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VOCABULARY = 195_000  # twice times 64: 25 million parameters, and a step on one short row


@scenario()
def measure(bench: Bench) -> None:
    """Measures time and memory over the bare loop's; ValueError when the two disagree."""
    write_llama(bench.folder / "base", LLAMA, vocabulary=VOCABULARY // 10 if bench.small else VOCABULARY)
    write_rows(bench.folder, 40, 1, 8)
    work = bench.recipe(
        *(f"rounds={3 if bench.small else 8}", f"clients.slots={PROCESSES}", "cohort.size=20", "model.peft=none"),
        'train={steps=1, batch=1, max_length=8, optimizer={kind="sgd", lr=0.1}}',
    )
    compared = compare(work, bench.folder / "run")
    rss, pss = command_mb(replace(work, rounds=3), bench.folder / "command")
    bench.add("time_ratio", 1 / compared.ratio, "times the bare loop's time")
    bench.add("tree_rss_mb", rss, "MB, all processes but Ray's daemons")
    bench.add("tree_pss_mb", pss, "MB, shared pages counted once")
    bench.add("apart", compared.apart, "largest difference")
