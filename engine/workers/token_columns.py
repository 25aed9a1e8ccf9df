"""A run's token columns: made once beside the driver, and copied to every node that does not see their folder."""

import json
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import ray

from datasets_partition.core.types import MESSAGES, OnRows, format_of, ignore
from datasets_partition.sources.location import node_cache
from datasets_partition.store.sealed import written_whole
from datasets_partition.store.store import Store
from datasets_partition.store.tokens import tokenize
from engine.config.federation import Federation
from engine.models.base_model import load_tokenizer
from engine.objectives.base import require_format

Parts = dict[str, list[Any]]  # a file's name -> references to its pieces
PIECE_BYTES = 64 * 2**20
TOKENS_VERSION = 2  # raised whenever rows are encoded differently
MASKS_VERSION = 2  # raised whenever conversations alone are


def token_columns(store: Path, federation: Federation, shared: str | None = None, on_rows: OnRows = ignore) -> Path:
    """Returns the folder of the store's token columns; makes them if they are not there or in `shared` either."""
    objective, length, rows = federation.train.objective, federation.train.max_length, Store.open(store)
    columns = rows.read_span(0, 0)
    require_format(objective, columns)
    tokenizer, model = load_tokenizer(federation.model), federation.model
    known = [tokenizer.get_vocab(), repr(tokenizer), tokenizer.chat_template, tokenizer.backend_tokenizer.to_str()]
    words = sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    key = f"{TOKENS_VERSION}/{model.base}@{model.revision}/{objective!r}/{length}/{words}"
    if format_of(columns) == MESSAGES:
        key += f"/{MASKS_VERSION}"
    encode = partial(objective.encode, tokenizer=tokenizer, max_length=length)
    return tokenize(rows, key, encode, shared, on_rows).folder


def find_tokens(tokens: Path) -> Path | None:
    """Returns where this node sees the columns: in their own folder (the same machine, a shared disk) or as a copy."""
    return next((folder for folder in (tokens, _copy(tokens)) if folder.is_dir()), None)


def put_tokens(tokens: Path) -> Parts:
    """Puts the columns' files into the object store, in pieces."""
    parts: Parts = {}
    for file in tokens.iterdir():
        content = np.memmap(file, np.uint8, "r")
        parts[file.name] = [ray.put(content[i : i + PIECE_BYTES]) for i in range(0, len(content), PIECE_BYTES)]
    return parts


def receive_tokens(tokens: Path, parts: Parts) -> Path:
    """Writes a copy of the columns on this node, whole or not at all; returns its folder."""
    with written_whole(_copy(tokens)) as scratch:
        for name, pieces in parts.items():
            with (scratch / name).open("wb") as file:
                for piece in pieces:
                    content: Any = ray.get(piece)
                    file.write(content)
    return _copy(tokens)


def _copy(tokens: Path) -> Path:
    return node_cache() / tokens.parent.name / tokens.name
