"""Loads a base's tokenizer, and refuses tokens for which the base has no embedding."""

from dataclasses import replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from datasets_partition.store.tokens import IDS
from engine.config.sections import Model
from engine.messages.errors import RunError
from engine.models.base_model import origin, reason, refusal
from engine.models.trainable import shape_of
from engine.objectives.base import Tokenizer
from engine.objectives.templates import chosen_template, dated

SOURCES = (".model", ".tiktoken")  # endings of files that tokenizers are made of


def load_tokenizer(model: Model) -> Tokenizer:
    """Loads the base's tokenizer with the recipe's chat template; RunError if it cannot be used.

    Without a pad token it takes its end token as that. A chat template writes the recipe's date (today's without one).
    """
    from transformers import AutoTokenizer

    folder = Path(model.base)
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(model.base, **origin(model))
    except Exception as error:  # the base's own code may raise anything
        if not folder.is_dir() or (folder / "tokenizer.json").is_file():
            raise refusal(model, "has no tokenizer that can be loaded", error) from error
        sources = sorted(path.name for path in folder.iterdir() if path.match("vocab.*") or path.suffix in SOURCES)
        why = f" and {sources[0]} cannot be made into one ({reason(error)})" if sources else ""
        raise RunError(
            f"model.base {model.base!r} has no tokenizer.json{why}: copy the tokenizer's files of the model that it "
            f"was made from into that folder"
        ) from error
    where = f"the tokenizer of model.base {model.base!r}"
    if not tokenizer.is_fast:
        what = f"is a {type(tokenizer).__name__}, which is slow and does not tell where in the text a token lies"
        raise RunError(f"{where} {what}: convert it to a tokenizer.json with the library tokenizers")
    if tokenizer.eos_token is None:
        remedy = 'name one in its tokenizer_config.json, as "eos_token"'
        raise RunError(f"{where} has no end token, which fine-tuning needs: {remedy}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = _with_default(tokenizer.chat_template)
    day = date.fromisoformat(model.template_date) if model.template_date else date.today()
    tokenizer.chat_template = dated(chosen_template(tokenizer, model.chat_template), day)
    return tokenizer


def _with_default(templates: str | dict[str, str] | None) -> str | dict[str, str] | None:
    """Returns chat templates with the only one that is not for tools as "default", if they are named and lack that."""
    if isinstance(templates, dict) and "default" not in templates:
        usual = [text for name, text in templates.items() if name != "tool_use"]
        return {**templates, "default": usual[0]} if len(usual) == 1 else templates
    return templates


def padding(tokenizer: Tokenizer, network: Any) -> int:
    """Returns the token that pads rows: the pad token, or 0 where that has no embedding, since padding is masked."""
    rows = shape_of(network.get_input_embeddings().weight)[0]
    pad: int = tokenizer.pad_token_id
    return pad if pad < rows else 0


def embedded_tokens(model: Model) -> int | None:
    """Returns the number of tokens for which the base has an embedding; None if its configuration does not say."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model.base, **origin(model))
    except Exception:  # a folder with a tokenizer alone will do to tokenize
        return None
    size: int | None = getattr(config.get_text_config(), "vocab_size", None)
    return size


def refuse_unembedded(columns: pa.Table, tokenizer: Tokenizer, embedded: int | None, model: Model) -> None:
    """Raises RunError if the rows' token columns hold a token beyond the base's embedding."""
    names = [name for name in columns.column_names if name.endswith(IDS)]
    largest = max((pc.max(pc.list_flatten(columns[name])).as_py() or 0 for name in names), default=0)
    if embedded is None or largest < embedded:
        return
    raise RunError(
        f"the rows hold the token {tokenizer.convert_ids_to_tokens(largest)!r} (number {largest}), and model.base "
        f"{model.base!r} has embeddings for {embedded} tokens: load it with transformers, call "
        f"resize_token_embeddings({len(tokenizer)}), save it with its tokenizer, and name that folder as model.base "
        f'(an adapter leaves new embeddings untrained, model.peft = "none" trains them)'
    )


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Returns the files from which a tokenizer can be loaded where the base is not."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def received_tokenizer(model: Model, files: dict[str, bytes]) -> Tokenizer:
    """Loads a tokenizer from its files."""
    with TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return load_tokenizer(replace(model, base=folder, revision=None))
