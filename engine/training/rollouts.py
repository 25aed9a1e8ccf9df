"""Samples completions of prompts, with a cache of what the network has read.

Legend: P prompts of T tokens with padding, G samples of each, B = P G sequences, C new tokens, V tokens to choose from.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.messages.errors import RunError
from engine.objectives.sampling import Completion, Completions, Sampling
from engine.objectives.token_batch import Batch
from strategies.core.seeds import keyed_rng, sample_key

CACHES = ("past_key_values", "cache_params")  # transformers' names, the second for state-space models
Cache = Any
OWN_TEXTS, OWN_TOKENS, OWN_BATCH = 64, 64, 8  # of what a base writes by itself, to align an emulator with it
# Takes token ids (B, T), 1 where a token is real (B, earlier tokens + T), positions (B, T), and the cache of earlier
# tokens (None: there are none). Returns the logits (B, V) after the last token, and the cache with the new tokens.
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Cache], tuple[torch.Tensor, Cache]]
Key = bytes | None  # of a sequence's draws; without one the likeliest token is taken each time
Choice = tuple[torch.Tensor, torch.Tensor]  # tokens (B,) and their log-probabilities (B,), float64


@dataclass(frozen=True)
class Rollouts:
    """The completions (B, C) of prompts, the samples of a prompt one after another, on the network's device.

    Each has `lengths_B` tokens, with its end token if it `ended_B`; padding follows. `logprobs_BC` are the tokens'
    log-probabilities at the temperature, and 0 at padding.
    """

    ids_BC: torch.Tensor
    lengths_B: torch.Tensor
    ended_B: torch.Tensor
    logprobs_BC: torch.Tensor

    def completions(self) -> Completions:
        """Returns them one by one."""
        ids, logprobs = self.ids_BC.cpu().numpy(), self.logprobs_BC.cpu().numpy()
        each = zip(ids, logprobs, self.lengths_B.tolist(), self.ended_B.tolist(), strict=True)
        return [Completion(row[:length], its[:length], ended) for row, its, length, ended in each]


@torch.no_grad()
def complete(
    forward: Forward,
    prompts: Sequence[np.ndarray],
    keys: Sequence[Key],
    sampling: Sampling,
    *,
    ends: frozenset[int],
    pad: int,
    device: torch.device,
) -> Rollouts:
    """Completes each prompt (token ids) `sampling.samples` times; one of `ends` ends a completion.

    `keys` (B,) are the sequences': a token depends on its sequence's key, its position and its logits, never on the
    batch or torch's generators. An empty prompt fills a place of the batch and has no completion.
    """
    ids_PT, attention_PT = _left_padded(prompts, pad)
    position_PT = (attention_PT.cumsum(1) - 1).clamp(min=0)
    logits, cache = forward(ids_PT.to(device), attention_PT.to(device), position_PT.to(device), None)
    sequence_B = torch.arange(len(prompts)).repeat_interleave(sampling.samples)
    if sampling.samples > 1:  # the samples of a prompt share what the network made of it
        logits, cache = logits[sequence_B.to(device)], _repeated(cache, sampling.samples, sequence_B.to(device))
    attention_BT, position_B1 = attention_PT[sequence_B].to(device), position_PT[sequence_B, -1:].to(device)
    choose = _chooser(keys, sampling, device)
    running_B = torch.tensor([len(prompt) > 0 for prompt in prompts])[sequence_B].to(device)
    end_E = torch.tensor(sorted(ends), device=device)
    lengths_B, ended_B = torch.zeros_like(sequence_B, device=device), torch.zeros_like(running_B)
    ids, logprobs = list[torch.Tensor](), list[torch.Tensor]()
    for place in range(sampling.tokens):
        chosen_B, logprob_B = choose(logits, place)
        ids.append(torch.where(running_B, chosen_B, pad))
        logprobs.append(torch.where(running_B, logprob_B, 0.0).float())
        lengths_B += running_B
        ended_B |= running_B & torch.isin(chosen_B, end_E)
        running_B = running_B & ~ended_B
        if place + 1 == sampling.tokens or not running_B.any():
            break
        attention_BT = torch.cat([attention_BT, attention_BT.new_ones(len(keys), 1)], 1)
        position_B1 = position_B1 + 1
        logits, cache = forward(ids[-1][:, None], attention_BT, position_B1, cache)
    return Rollouts(torch.stack(ids, 1), lengths_B, ended_B, torch.stack(logprobs, 1))


def cached_forward(network: Any, *, every_logit: bool = False) -> Forward:
    """Makes the forward pass of a transformers model, or of PEFT's wrapper of one; RunError if it has no cache.

    With `every_logit` the head sees all positions of the batch.
    """
    plain = network.get_base_model() if hasattr(network, "get_base_model") else network
    accepted = inspect.signature(plain.forward).parameters
    cache_name = next((name for name in CACHES if name in accepted), None)
    if cache_name is None:
        raise RunError(
            f"the base, a {type(plain).__name__}, keeps no cache with which several texts go on in one batch: choose "
            f"another model.base"
        )

    def forward(
        ids_BT: torch.Tensor, attention_BT: torch.Tensor, position_BT: torch.Tensor, cache: Cache
    ) -> tuple[torch.Tensor, Cache]:
        inputs = {"input_ids": ids_BT, "attention_mask": attention_BT, "position_ids": position_BT, cache_name: cache}
        if cache is not None and cache_name != "past_key_values":  # a state has no place for each token
            inputs["attention_mask"] = None
        if not every_logit:
            inputs["logits_to_keep"] = 1
        out = network(**{name: value for name, value in inputs.items() if name in accepted}, use_cache=True)
        return out.logits[:, -1], out[cache_name]

    return forward


def own_samples(network: Any, tokenizer: Any, seed: int, device: torch.device) -> Callable[[int], Batch]:
    """Lets the network write texts by its own probabilities; returns what gives the batch of a step, turn by turn."""
    keys = [sample_key(seed, -1, -1, 0, number, 0) for number in range(OWN_TEXTS)]
    begin, sampling = np.array([tokenizer.eos_token_id]), Sampling(tokens=OWN_TOKENS)
    forward = cached_forward(network)
    ids: list[np.ndarray] = []
    for first in range(0, OWN_TEXTS, OWN_BATCH):
        some = keys[first : first + OWN_BATCH]
        # No token ends a text, so that all have the same length.
        written = complete(forward, [begin] * len(some), some, sampling, ends=frozenset({-1}), pad=0, device=device)
        ids += [*written.ids_BC.cpu().numpy()]

    def batch(step: int) -> Batch:
        chosen = [ids[(step * OWN_BATCH + place) % OWN_TEXTS] for place in range(OWN_BATCH)]
        lengths_B = np.full(OWN_BATCH, OWN_TOKENS)
        return Batch.padded(np.concatenate(chosen), np.ones(OWN_BATCH * OWN_TOKENS, bool), lengths_B, 0).to(device)

    return batch


def _left_padded(prompts: Sequence[np.ndarray], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids and 1 where a token is real (P, T)."""
    lengths_P = np.array([len(prompt) for prompt in prompts])
    width = max(1, int(lengths_P.max()))
    real_PT = np.arange(width) >= width - lengths_P[:, None]
    ids_PT = np.full(real_PT.shape, pad, np.int64)
    ids_PT[real_PT] = np.concatenate(prompts)
    real_PT[:, -1] = True  # a row that attends to nothing would be NaN
    return torch.from_numpy(ids_PT), torch.from_numpy(real_PT.astype(np.int64))


def _repeated(cache: Cache, times: int, sequence_B: torch.Tensor) -> Cache:
    """Returns the cache with each sequence a number of times; `sequence_B` numbers the sequences that come of it."""
    if "batch_repeat_interleave" in vars(type(cache)):  # a cache of the model's own
        cache.batch_repeat_interleave(times)
    else:  # what is made to select among beams takes any number of them
        cache.reorder_cache(sequence_B)
    return cache


def _chooser(keys: Sequence[Key], sampling: Sampling, device: torch.device) -> Callable[[torch.Tensor, int], Choice]:
    """Makes the choice of the next tokens from logits (B, V) and the number of tokens before."""
    greedy_B = torch.tensor([key is None for key in keys])
    if device.type == "cpu":
        uniform_BC = torch.zeros(len(keys), sampling.tokens, dtype=torch.float64)
        for place, key in enumerate(keys):
            if key is not None:
                uniform_BC[place] = torch.from_numpy(keyed_rng(key).random(sampling.tokens))
    else:
        words = [np.frombuffer((key or bytes(16))[:16], "<u4") for key in keys]
        key_B4, greedy_B = torch.from_numpy(np.stack(words).astype(np.int64)).to(device), greedy_B.to(device)

    def choose(logits_BV: torch.Tensor, place: int) -> Choice:
        wide_BV = logits_BV.double() / sampling.temperature
        if device.type == "cpu":
            chosen_B = by_inversion(wide_BV, uniform_BC[:, place])
        else:
            chosen_B = by_gumbel(wide_BV, key_B4, place)
        chosen_B = torch.where(greedy_B, wide_BV.argmax(1), chosen_B)
        return chosen_B, wide_BV.gather(1, chosen_B[:, None])[:, 0] - wide_BV.logsumexp(1)

    return choose


def by_inversion(logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """Chooses the first token at which the cumulative probability exceeds a number below 1; all in float64."""
    cumulative_BV = (logits_BV - logits_BV.amax(1, keepdim=True)).exp().cumsum(1)
    total_B1 = cumulative_BV[:, -1:]
    # Rounding could reach the total, which no token exceeds.
    below_B1 = (uniform_B[:, None] * total_B1).minimum(torch.nextafter(total_B1, total_B1.new_zeros(())))
    chosen_B1 = torch.searchsorted(cumulative_BV, below_B1, right=True)
    return chosen_B1[:, 0].clamp(max=logits_BV.shape[1] - 1)  # beyond the last if they are NaN


def by_gumbel(logits_BV: torch.Tensor, key_B4: torch.Tensor, place: int) -> torch.Tensor:
    """Chooses by the Gumbel-max trick (arXiv 1611.01144, section 2) with random numbers of each token's own.

    All of it is elementwise but the maximum, and so has the same bits on a GPU, where cumulative sums do not. The
    numbers are those of Philox at the counter of the token and its place, with 128 bits of key in key and counter.
    """
    vocabulary = logits_BV.shape[1]
    block_V = torch.arange(-(-vocabulary // 4), device=logits_BV.device)
    high_B, low_B, *rest = key_B4[:, None].unbind(2)
    counter = (block_V.expand(len(key_B4), -1), torch.full_like(block_V, place), *rest)
    words = torch.stack(philox(counter, (high_B, low_B)), 2).flatten(1)[:, :vocabulary]
    gumbel_BV = -(-((words.double() + 0.5) / 2**32).log()).log()
    return (logits_BV + gumbel_BV).argmax(1)


def philox(counter: Sequence[torch.Tensor], key: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Computes Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3).

    Four counters and two keys of 32 bits, of shapes that go together, give four words of 32 bits; all are int64.
    """
    mask = 0xFFFFFFFF
    a, b, c, d = counter
    key_0, key_1 = key
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57  # of 64 bits, whose sign does not matter below
        a, b = (second >> 32 & mask) ^ b ^ key_0, second & mask
        c, d = (first >> 32 & mask) ^ d ^ key_1, first & mask
        key_0, key_1 = key_0 + 0x9E3779B9 & mask, key_1 + 0xBB67AE85 & mask
    return [a, b, c, d]
