"""Models that are never trained: a base, or an adapter merged into its base, whose weights processes share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from engine.config.sections import Model
from engine.messages.errors import RunError
from engine.messages.frozen import FrozenModel
from engine.models.adapters import HEAD, begin_head
from engine.models.base_model import PackedBase, causal_config, is_classifier, map_base, pack, read_base, reason
from engine.models.start import TENSORS, stored_name
from engine.models.tokenizer import load_tokenizer, padding
from engine.objectives.base import Prompt, Tokenizer
from engine.objectives.chat_template import rendered_ids
from engine.objectives.completions import ended
from engine.objectives.reward import scores
from engine.objectives.token_batch import Batch

ROWS = 8  # texts that are scored at once


def read_frozen(frozen: FrozenModel, model: Model) -> tuple[PackedBase, np.ndarray]:
    """Reads the model into one uint8 buffer, as `read_base` does, in the number format of the trained `model`.

    RunError if it cannot be read, is a reward model where a language model is needed or the other way round, or is a
    language model of another vocabulary.
    """
    base, adapter = _base(frozen, model), None if frozen.base is None else Path(frozen.model)
    config = causal_config(base, scores=frozen.scores)
    has_head = is_classifier(config) if adapter is None else _has_head(adapter)
    if has_head != frozen.scores:
        why = "gives texts no score" if frozen.scores else "gives texts a score, and tokens no logits"
        raise RunError(f"the model {frozen.model} {why}: name another")
    if not frozen.scores:
        _refuse_other_vocabulary(frozen, model, config)
    packed, buffer = read_base(base, scores=frozen.scores)
    if adapter is None:
        return packed, buffer
    network = map_base(packed, torch.from_numpy(buffer))
    if frozen.scores:
        begin_head(network)  # in whose place the adapter has its own
    return pack(_merged(network, adapter, base), base, scores=frozen.scores)


def map_frozen(frozen: FrozenModel, packed: PackedBase, buffer: torch.Tensor, model: Model) -> Any:
    """Makes the network over the buffer in evaluation mode, or a `Scorer` of a model that scores texts."""
    network = map_base(packed, buffer).eval()
    return Scorer(network, _tokenizer(frozen, model)) if frozen.scores else network


class Scorer:
    """Scores prompts with completions by a reward model, whose tokens and template are its own."""

    def __init__(self, network: Any, tokenizer: Tokenizer) -> None:
        self.network, self.tokenizer = network, tokenizer
        self.pad = network.config.pad_token_id = padding(tokenizer, network)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """Returns a score for each; texts end with the end token, and turns by the template, as in training."""
        ids = [self._ids(*pair) for pair in zip(prompts, completions, strict=True)]
        values, device = list[float](), self.network.get_input_embeddings().weight.device
        for first in range(0, len(ids), ROWS):
            some = ids[first : first + ROWS]
            sizes = np.array([len(each) for each in some])
            batch = Batch.padded(np.concatenate(some), np.ones(sizes.sum(), bool), sizes, self.pad)
            values += scores(self.network, batch.to(device)).tolist()
        return values

    def _ids(self, prompt: Prompt, completion: str) -> list[int]:
        if isinstance(prompt, str):
            ids: list[int] = self.tokenizer(prompt + ended(completion, self.tokenizer))["input_ids"]
            return ids
        return rendered_ids(
            self.tokenizer, [*prompt.turns, {"role": "assistant", "content": completion}], prompt.options
        )


def _base(frozen: FrozenModel, model: Model) -> Model:
    return Model(
        base=frozen.base or frozen.model,
        revision=frozen.revision,
        dtype=model.dtype,
        trust_remote_code=model.trust_remote_code,
        template_date=model.template_date,
    )


def _tokenizer(frozen: FrozenModel, model: Model) -> Tokenizer:
    """Loads an adapter's own tokenizer if it has one, or its base's."""
    base, folder = _base(frozen, model), Path(frozen.model)
    if (folder / "tokenizer.json").is_file():
        base = Model(base=frozen.model, trust_remote_code=model.trust_remote_code, template_date=model.template_date)
    return load_tokenizer(base)


def _has_head(adapter: Path) -> bool:
    try:
        with safe_open(adapter / TENSORS, framework="pt") as tensors:
            return stored_name(HEAD) in tensors.keys()  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RunError(f"{adapter / TENSORS} cannot be read: {error}") from error


def _merged(network: Any, adapter: Path, base: Model) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(network, adapter).merge_and_unload()
    except Exception as error:  # PEFT raises many kinds
        what = f"the adapter in {adapter} does not fit its base {base.base!r}"
        raise RunError(f"{what}: {reason(error)}") from error


def _refuse_other_vocabulary(frozen: FrozenModel, model: Model, config: Any) -> None:
    """Raises RunError unless each token has the same number, and a logit, in both models."""
    sizes = [each.get_text_config().vocab_size for each in (config, causal_config(model))]
    theirs, ours = (tokenizer.get_vocab() for tokenizer in (_tokenizer(frozen, model), load_tokenizer(model)))
    if theirs == ours and sizes[0] == sizes[1]:
        return
    differ = sum(theirs.get(token) != ours.get(token) for token in theirs.keys() | ours.keys())
    why = f"{differ:,} tokens have other numbers" if theirs != ours else f"{sizes[0]:,} logits beside {sizes[1]:,}"
    raise RunError(
        f"the model {frozen.model} has another vocabulary than model.base {model.base!r} ({why}), and token by token "
        f"they cannot be compared: name a model of the same family"
    )
