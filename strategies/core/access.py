"""Access levels: what of a base model the clients of a rule may touch, from a text API to open weights and data."""

from collections.abc import Collection, Mapping
from typing import Literal, get_args

Capability = Literal[
    "generate",  # texts that continue a prompt
    "score",  # log-probabilities of a given completion
    "inject",  # vectors in place of tokens before the prompt
    "input_gradients",  # gradients of a loss with respect to injected vectors
    "layers",  # the first and last layers, and a compressed middle
    "activations",  # hidden states behind the first layers, and their gradients
    "weights",  # the whole model at home
    "corpus",  # the data and code that it was trained with
]
Level = Literal[
    "api_text", "api_logprobs", "api_embeddings", "api_gradients", "emulator", "split", "weights", "weights_data"
]
LEVELS: tuple[Level, ...] = get_args(Level)
_TEXT: frozenset[Capability] = frozenset({"generate"})
_LOGPROBS: frozenset[Capability] = _TEXT | {"score"}
_EMBEDDINGS: frozenset[Capability] = _LOGPROBS | {"inject"}
_GRADIENTS: frozenset[Capability] = _EMBEDDINGS | {"input_gradients"}
_EMULATOR: frozenset[Capability] = frozenset({"layers"})
_SPLIT: frozenset[Capability] = _EMULATOR | {"activations"}
_WEIGHTS: frozenset[Capability] = _GRADIENTS | _SPLIT | {"weights"}
# A level is a set of capabilities and not a rung of a ladder: an emulator cannot generate what the model would.
GRANTS: Mapping[Level, frozenset[Capability]] = {
    "api_text": _TEXT,
    "api_logprobs": _LOGPROBS,
    "api_embeddings": _EMBEDDINGS,
    "api_gradients": _GRADIENTS,
    "emulator": _EMULATOR,
    "split": _SPLIT,
    "weights": _WEIGHTS,
    "weights_data": _WEIGHTS | {"corpus"},
}
# The words of arXiv 2505.23593, which calls black and gray boxes closed; which level is in which box is our reading.
BOXES: Mapping[Level, str] = {
    "api_text": "black box",
    "api_logprobs": "black box",
    "api_embeddings": "gray box",
    "api_gradients": "gray box",
    "emulator": "gray box",
    "split": "gray box",
    "weights": "open weights",
    "weights_data": "open source",
}
PARTY = "base-model owner"  # who sees what clients send below "weights", as the ledger calls it


def is_home(level: Level) -> bool:
    """Whether clients have the base at home."""
    return "weights" in GRANTS[level]


def lowest(needs: Collection[Capability]) -> Level:
    """The first level that grants all of it; each capability is granted by some level."""
    return next(level for level in LEVELS if GRANTS[level] >= {*needs})
