"""Small random models and random rows that the benchmarks train."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from experiments.config.recipe import SHIPPED, Recipe, parse_recipe
from strategies.core.seeds import rng

TEXTS = 4096  # different ones; clients draw from them


def write_llama(folder: Path, sizes: dict[str, int], *, vocabulary: int | None = None, of_bytes: bool = False) -> None:
    """A random Llama of these sizes with the shipped tokenizer, or one `of_bytes`.

    `vocabulary` is given where it is to be larger than the tokenizer's.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer: Any = _bytes() if of_bytes else AutoTokenizer.from_pretrained(SHIPPED["tiny"])
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary or len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _bytes() -> Any:
    """A tokenizer whose tokens are bytes, and an end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({sign: place for place, sign in enumerate(signs)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def write_rows(path: Path, clients: int, rows: int | np.ndarray, words: int) -> None:
    """`rows` rows of so many random words for each client, or each client's own number (N,), as Parquet."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(SHIPPED["tiny"])
    draw = rng(0, 0, -1, "sample")
    texts = pa.array([tokenizer.decode(draw.integers(300, 4000, words)) for _ in range(TEXTS)])
    owners = np.repeat(np.arange(clients), rows)
    picked = pa.array(draw.integers(0, TEXTS, len(owners)))
    names = pa.array(np.char.zfill(owners.astype("U7"), 7))
    pq.write_table(pa.table({"client": names, "text": texts.take(picked)}), path)


def bench_recipe(folder: Path, base: Path, changes: str) -> Recipe:
    """A recipe over `base` and the rows of `folder`, all of them for training, with further keys in TOML."""
    written = f"""
        name = "bench"
        seed = 1
        evaluate = {{ every = 0, rows = 1 }}
        checkpoint = {{ keep = 1000 }}
        {changes}
        [data]
        source = {{ kind = "parquet", path = "{folder / "rows.parquet"}" }}
        splits = {{ heldout = 0.0, unseen = 0.0, duplicates = "keep" }}
        cache = "{folder / "stores"}"
    """
    return parse_recipe(written, [f"model.base={base}"])
