"""A base with learned places in front of every text. Legend: N places, D width, B rows, T tokens, P trained numbers.

The logits are those of the text's own tokens, so that batches and losses are the same as without the places. Words and
projected vectors are no methods of PEFT, hence the wrapper of our own; prompts and prefixes equal PEFT's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from engine.messages.errors import RunError
from engine.messages.exposure import PromptSizes

STORED = "prompt_embeddings"  # the name under which PEFT stores what is learned


@dataclass(frozen=True)
class Projection:
    """The map from z (d,) to vectors p0 + A z, one after another (N D,)."""

    start_P: torch.Tensor
    matrix_Pd: torch.Tensor

    @classmethod
    def drawn(cls, peft: Any, start_P: torch.Tensor, spread: float, seed: int) -> "Projection":
        """Draws A for a Projected kind, on the CPU; `spread` is the standard deviation of the embeddings' numbers."""
        normals = torch.randn(len(start_P), peft.d, generator=torch.Generator().manual_seed(seed))
        return cls(start_P.float().cpu(), normals * (peft.alpha * spread / peft.d**0.5))

    def __call__(self, numbers_d: torch.Tensor) -> torch.Tensor:
        """The vectors (N D,) of z (d,)."""
        return self.start_P + self.matrix_Pd @ numbers_d.float().cpu()


def spread_of(network: Any) -> float:
    """Returns the standard deviation of the numbers of a network's embeddings."""
    return float(network.get_input_embeddings().weight.float().std())


class Prefixed(nn.Module):
    """`base` behind the places of a kind; `prompt_embeddings` is what is learned, the only parameter with a gradient.

    `source` makes the vectors (N, D) of it. A prefix has keys and values in their place.
    """

    def __init__(self, base: Any, peft: Any, seed: int) -> None:
        """The kind is one of engine/config/prefixes.py; the seed draws what a projection is."""
        super().__init__()
        self.base, self.peft, self.config = base.requires_grad_(False), peft, base.config
        self._disable_adapters = False  # as PEFT's layers have it: the base alone computes
        embeddings, self.is_prefix = base.get_input_embeddings().weight, peft.kind == "prefix"
        self.heads = _heads(base)
        device = embeddings.device
        tokens_N = torch.randint(len(embeddings), (peft.n,))
        words_ND = embeddings[tokens_N.to(device)].float()
        self.source: Callable[[torch.Tensor], torch.Tensor] = lambda learned: learned
        match peft.kind:
            case "prefix":
                learned = torch.randn(peft.n, 2 * math.prod(self.heads)).to(device)
            case "words":
                learned, self.source = tokens_N.float().to(device), lambda learned: embeddings[learned.long()].float()
            case "projected":
                project = Projection.drawn(peft, words_ND.reshape(-1), spread_of(base), seed)
                learned = torch.zeros(peft.d, device=device)
                self.source = lambda learned: project(learned).view(words_ND.shape).to(device)
            case _:
                learned = words_ND
        self.prompt_embeddings = nn.Parameter(learned)
        if not self.is_prefix:
            self._head().register_forward_pre_hook(self._without_places, prepend=True)
        self.skipped = 0  # places at the start of the present forward pass

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Any:
        """Computes as the base does, with logits (B, T, V) of the tokens alone; a cache holds the places already."""
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        if self._disable_adapters:
            return self.base(input_ids=input_ids, **_given(inputs), **options)
        assert input_ids is not None
        rows, places = len(input_ids), self.peft.n
        begins = past_key_values is None or not past_key_values.get_seq_length()
        if attention_mask is not None and attention_mask.ndim == 4:  # of every pair of tokens, as plans have it
            above = 0 if self.is_prefix else places
            inputs["attention_mask"] = F.pad(attention_mask, (places, 0, above, 0))
        elif attention_mask is not None:
            inputs["attention_mask"] = torch.cat([attention_mask.new_ones(rows, places), attention_mask], 1)
        if position_ids is not None:
            inputs["position_ids"] = position_ids + places
        if not begins:
            return self.base(input_ids=input_ids, **_given(inputs), **options)
        if self.is_prefix:
            inputs["past_key_values"] = self._cache(rows)
            return self.base(input_ids=input_ids, **_given(inputs), **{**options, "use_cache": True})
        if position_ids is not None:
            before_BN = torch.arange(places, device=input_ids.device).expand(rows, -1)
            inputs["position_ids"] = torch.cat([before_BN, position_ids + places], 1)
        embedded_BTD = self.base.get_input_embeddings()(input_ids)
        places_BND = self.vectors().to(embedded_BTD.dtype).expand(rows, -1, -1)
        self.skipped = 0 if "logits_to_keep" in options else places
        try:
            return self.base(inputs_embeds=torch.cat([places_BND, embedded_BTD], 1), **_given(inputs), **options)
        finally:
            self.skipped = 0

    def vectors(self) -> torch.Tensor:
        """Returns what is in the places (N, D), or of a prefix (N, 2 layers heads width)."""
        return self.source(self.prompt_embeddings)

    @property
    def sizes(self) -> PromptSizes:
        """What an adapter's configuration says of the base."""
        config = self.base.config.get_text_config()
        width, heads = config.hidden_size, config.num_attention_heads
        return PromptSizes(*self.heads, width, heads, self.choices, self.is_prefix)

    @property
    def choices(self) -> int:
        """The number of tokens that each number may stand for; 0 where numbers are no tokens."""
        return len(self.base.get_input_embeddings().weight) if self.peft.kind == "words" else 0

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        """Continues token ids (1, T) greedily, and returns them with what follows."""
        new, ids_BT = options["max_new_tokens"], input_ids
        ends = self.base.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else {*(ends or ())}
        out, cache = self(ids_BT, attention_mask, use_cache=True), None
        for _ in range(new):
            token_B1 = out.logits[:, -1].argmax(-1, keepdim=True)
            ids_BT = torch.cat([ids_BT, token_B1], 1)
            if int(token_B1) in ends:
                break
            cache = out.past_key_values
            out = self(token_B1, torch.ones_like(ids_BT), past_key_values=cache, use_cache=True)
        return ids_BT

    def get_input_embeddings(self) -> Any:
        """Returns the base's."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """Returns the base's."""
        return self.base.get_output_embeddings()

    def get_base_model(self) -> Any:
        """Returns the base."""
        return self.base

    @property
    def dtype(self) -> torch.dtype:
        """The base's."""
        dtype: torch.dtype = self.base.dtype
        return dtype

    @property
    def generation_config(self) -> Any:
        """The base's."""
        return self.base.generation_config

    def _head(self) -> nn.Module:
        head: nn.Module | None = self.base.get_output_embeddings()
        if head is None:
            name = type(self.base).__name__
            raise RunError(f'a {name} has no head that gives logits: take another model.peft than "{self.peft.kind}"')
        return head

    def _without_places(self, _: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (inputs[0][:, self.skipped :],)

    def _cache(self, rows: int) -> Any:
        from transformers import DynamicCache

        layers, heads, width = self.heads
        learned = self.prompt_embeddings.to(self.base.dtype).view(self.peft.n, 2 * layers, heads, width)
        cache = DynamicCache(config=self.base.config)
        for layer in range(layers):
            keys, values = (
                learned[:, 2 * layer + place].transpose(0, 1).expand(rows, -1, -1, -1) for place in range(2)
            )
            cache.update(keys, values, layer)
        return cache


def _given(inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns what is there: not every base takes all of it."""
    return {name: value for name, value in inputs.items() if value is not None}


def _heads(base: Any) -> tuple[int, int, int]:
    """Returns the layers, the heads of keys and values in each, and their width."""
    config = base.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, width
