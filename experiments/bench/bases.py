"""Small random models and random rows that the benchmarks train."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from experiments.config.recipe import SHIPPED
from strategies.core.seeds import rng

TEXTS = 4096  # different texts, from which the rows are drawn
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def write_llama(folder: Path, sizes: Sequence[int], *, vocabulary: int | None = None, of_bytes: bool = False) -> None:
    """Writes a random Llama of these SIZES with the shipped tokenizer, or with one whose tokens are bytes.

    `vocabulary` is given if it is larger than the tokenizer's.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer: Any = _bytes_tokenizer() if of_bytes else AutoTokenizer.from_pretrained(SHIPPED["tiny"])
    torch.manual_seed(0)
    named = dict(zip(SIZES, sizes, strict=True))
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary or len(tokenizer), **named)).save_pretrained(folder)
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
    names = pa.array(np.char.zfill(owners.astype("U7"), 7))
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"client": names, "text": texts.take(picked)}), folder / "rows.parquet")
