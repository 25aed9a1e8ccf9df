"""A run's token columns: made once beside the driver, and copied to every node that does not see their folder."""

import json
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from datasets_partition.core.types import MESSAGES, OnRows, format_of, ignore
from datasets_partition.sources.location import node_cache
from datasets_partition.store.sealed import written_whole
from datasets_partition.store.store import Store
from datasets_partition.store.tokens import tokenize
from engine.config.federation import Federation
from engine.models.tokenizer import embedded_tokens, load_tokenizer, refuse_unembedded
from engine.objectives.base import require_format

TokenPieces = dict[str, list[Any]]  # a file's name -> references to its pieces
PIECE_BYTES = 64 * 2**20
TOKENS_VERSION = 2  # raised whenever rows are encoded differently
MASKS_VERSION = 2  # raised whenever conversations alone are


def token_columns(store: Path, federation: Federation, shared: str | None = None, on_rows: OnRows = ignore) -> Path:
    """Returns the folder of the store's token columns; makes them if they are not there or in `shared` either."""
    objective, length, opened = federation.train.objective, federation.train.max_length, Store.open(store)
    columns = opened.read_span(0, 0)
    require_format(objective, columns)
    tokenizer, model = load_tokenizer(federation.model), federation.model
    known = [tokenizer.get_vocab(), repr(tokenizer), tokenizer.chat_template, tokenizer.backend_tokenizer.to_str()]
    embedded = embedded_tokens(model)
    words = sha256(json.dumps([*known, embedded], sort_keys=True).encode()).hexdigest()
    key = f"{TOKENS_VERSION}/{model.base}@{model.revision}/{objective.encoding}/{length}/{words}"
    if format_of(columns) == MESSAGES:
        key += f"/{MASKS_VERSION}"

    def encode(table: pa.Table) -> pa.Table:
        encoded = objective.encode(table, tokenizer, length)
        refuse_unembedded(encoded, tokenizer, embedded, model)
        return encoded

    regroup = partial(objective.regroup, max_length=length) if objective.regroups else None
    return tokenize(opened, key, encode, shared, on_rows, regroup).folder


def find_tokens(tokens: Path) -> Path | None:
    """Returns where this node sees the columns: in their own folder (the same machine, a shared disk) or as a copy."""
    return next((folder for folder in (tokens, _copy(tokens)) if folder.is_dir()), None)


def put_tokens(tokens: Path) -> TokenPieces:
    """Puts the columns' files into the object store, in pieces."""
    pieces: TokenPieces = {}
    for file in tokens.iterdir():
        content = np.memmap(file, np.uint8, "r")
        pieces[file.name] = [ray.put(content[i : i + PIECE_BYTES]) for i in range(0, len(content), PIECE_BYTES)]
    return pieces


def receive_tokens(tokens: Path, pieces: TokenPieces) -> Path:
    """Writes a copy of the columns on this node, whole or not at all; returns its folder."""
    with written_whole(_copy(tokens)) as scratch:
        for name, references in pieces.items():
            with (scratch / name).open("wb") as file:
                for reference in references:
                    content: Any = ray.get(reference)
                    file.write(content)
    return _copy(tokens)


def _copy(tokens: Path) -> Path:
    return node_cache() / tokens.parent.name / tokens.name
