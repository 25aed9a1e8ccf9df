"""The losses of the bare loop's steps, as plain loops would write them, for the benchmarks' settings alone.

Legend: P prompts, B sequences, T tokens of one, C of them new, N learned tokens of a batch, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from engine.objectives.base import Objective
from engine.objectives.token_batch import Batch, token_losses
from strategies.core.seeds import keyed_rng


class Step(NamedTuple):
    """The rows of a step, their numbers among the client's, and the keys of the draws by row and sample."""

    rows: pa.RecordBatch
    numbers: list[int]
    key: Callable[[int, int], bytes]


def step_loss(network: Any, tokenizer: Any, objective: Objective, step: Step) -> torch.Tensor:
    """The mean loss of a step."""
    options = vars(objective)
    if objective.kind == "grpo":
        return _grpo(network, tokenizer, options, step)
    batch = objective.collate(step.rows, 0).to(network.device)
    if objective.kind == "dpo":
        return _dpo(network, options["beta"], batch)
    return token_losses(network, batch).sum() / batch.learned


def _dpo(network: Any, beta: float, batch: Batch) -> torch.Tensor:
    def scores() -> torch.Tensor:
        nll_BT = torch.zeros(batch.ids_BT.shape, device=batch.ids_BT.device)
        nll_BT[batch.row_N, batch.place_N] = token_losses(network, batch)
        return -nll_BT.sum(1)

    with torch.no_grad(), network.disable_adapter():
        reference_B = scores()
    ratio_B = scores() - reference_B
    loss: torch.Tensor = -F.logsigmoid(beta * (ratio_B[::2] - ratio_B[1::2])).mean()
    return loss


def _grpo(network: Any, tokenizer: Any, options: Mapping[str, Any], step: Step) -> torch.Tensor:
    """Of prompts of one length, by the first reward alone, which takes no column."""
    samples, epsilon, reward = options["num_generations"], options["epsilon"], options["rewards"][0]
    prompt_PT = torch.tensor(step.rows["input_ids"].to_pylist()).to(network.device)
    keys = [step.key(number, sample) for number in step.numbers for sample in range(samples)]
    new_BC, real_BC = _sampled(network, tokenizer, prompt_PT, keys, options["max_completion_length"])
    kept = [ids[real].tolist() for ids, real in zip(new_BC.cpu(), real_BC.cpu(), strict=True)]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    reward_PG = torch.tensor([reward.score("", text, {}) for text in texts], device=network.device).view(-1, samples)
    centered_PG = reward_PG - reward_PG.mean(1, keepdim=True)
    advantage_B1 = (centered_PG / (reward_PG.std(1, keepdim=True) + 1e-4)).view(-1, 1)
    ids_BT = torch.cat([prompt_PT.repeat_interleave(samples, 0), new_BC], 1)
    logits = network(ids_BT, use_cache=False, logits_to_keep=new_BC.shape[1] + 1).logits
    logp_BC = logits[:, :-1].log_softmax(2).gather(2, new_BC[:, :, None])[:, :, 0]
    ratio_BC = (logp_BC - logp_BC.detach()).exp()
    bounded_BC = ratio_BC.clamp(1 - epsilon, 1 + epsilon)
    loss_BC = -torch.min(ratio_BC * advantage_B1, bounded_BC * advantage_B1)
    loss: torch.Tensor = (loss_BC * real_BC).sum() / real_BC.sum()
    return loss


@torch.no_grad()
def _sampled(
    network: Any, tokenizer: Any, prompt_PT: torch.Tensor, keys: list[bytes], tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples with transformers' cache; returns the new tokens (B, C), and which of them come before or are the end."""
    draw_BC = torch.tensor(np.stack([keyed_rng(key).random(tokens) for key in keys]), device=prompt_PT.device)
    network.eval()
    ids, cache, new, real = prompt_PT, None, list[torch.Tensor](), list[torch.Tensor]()
    ends = torch.tensor([tokenizer.eos_token_id, network.generation_config.eos_token_id], device=prompt_PT.device)
    going_B = torch.ones(len(keys), dtype=torch.bool, device=prompt_PT.device)
    for place in range(tokens):
        out = network(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits, cache = out.logits[:, -1], out.past_key_values
        if not place:  # a prompt is read once for all its samples
            logits = logits.repeat_interleave(len(keys) // len(prompt_PT), 0)
            cache.batch_repeat_interleave(len(keys) // len(prompt_PT))
        share_BV = logits.double().softmax(1).cumsum(1)
        chosen_B = torch.searchsorted(share_BV, draw_BC[:, place, None].contiguous(), right=True)[:, 0].clamp(
            max=len(tokenizer) - 1
        )
        new.append(chosen_B)
        real.append(going_B)
        going_B = going_B & ~torch.isin(chosen_B, ends)
        ids = chosen_B[:, None]
    network.train()
    return torch.stack(new, 1), torch.stack(real, 1)
