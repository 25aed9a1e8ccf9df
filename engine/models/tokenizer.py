"""Loads a base's tokenizer, and refuses tokens for which the base has no embedding."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from engine.config.sections import Model
from engine.messages.errors import RunError
from engine.models.base_model import origin, refusal
from engine.objectives.base import Tokenizer


def load_tokenizer(model: Model) -> Tokenizer:
    """Loads the base's tokenizer, with its end token as pad token if it has none; RunError if it cannot be used."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(model.base, **origin(model))
    except Exception as error:  # the base's own code may raise anything
        raise refusal(model, "has no tokenizer that can be loaded", error) from error
    if not tokenizer.is_fast:
        raise RunError(f"the tokenizer of model.base {model.base!r} is no fast one: convert it to a tokenizer.json")
    if tokenizer.eos_token is None:
        raise RunError(f"the tokenizer of model.base {model.base!r} has no end token, which fine-tuning needs")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def padding(tokenizer: Tokenizer, network: Any) -> int:
    """Returns the token that fills rows up: the pad token, or 0 where that has no embedding, since padding is masked."""
    rows: int = network.get_input_embeddings().num_embeddings
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
    ids = columns["input_ids"] if "input_ids" in columns.column_names else pa.chunked_array([], pa.list_(pa.int32()))
    largest = pc.max(pc.list_flatten(ids)).as_py()
    if embedded is None or largest is None or largest < embedded:
        return
    raise RunError(
        f"the rows hold the token {tokenizer.convert_ids_to_tokens(largest)!r} (number {largest}), and model.base "
        f"{model.base!r} has embeddings for {embedded} tokens: load it with transformers, call "
        f"resize_token_embeddings({len(tokenizer)}), save it with its tokenizer, and name that folder as model.base "
        f'(an adapter leaves new embeddings untrained, model.peft = "none" trains them)'
    )
