"""Reward models: a network with one score for each text learns which completion of a pair was chosen.

Legend: B sequences, U pairs. R is the score of a prompt with its completion, w the chosen and l the rejected one. The
loss equals that of TRL's RewardTrainer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import nn

from engine.messages.checks import at_least
from engine.objectives.base import NATS, Context, Need, Term, Tokenizer
from engine.objectives.pairs import PAIR, SIDES, PairObjective, encode_pairs, pair_term, reward_figures
from engine.objectives.token_batch import Batch

WHOLE = 2**31 - 1  # a length that cuts nothing


@dataclass(frozen=True, kw_only=True)
class Reward(PairObjective):
    """-log sigmoid(R_w - R_l) (arXiv 2203.02155, eq. 1) + center_rewards_coefficient (R_w + R_l)^2 (2312.09244).

    R is what transformers' sequence classifier of the base with one label gives: a linear head on the last token that
    is no padding. The head is new, unless the base or `model.start` has one, and is trained with the adapters, or with
    all weights. Pairs with a side above `train.max_length` are dropped, since a text that is cut has another reward.
    """

    kind: Literal["reward"] = "reward"
    center_rewards_coefficient: float = 0.0
    needs: ClassVar[frozenset[Need]] = frozenset({"head"})
    losses: ClassVar[Mapping[str, float]] = {PAIR: NATS}
    units: ClassVar[Mapping[str, str]] = {
        **PairObjective.units,
        "margin": "reward",
        "chosen": "reward",
        "rejected": "reward",
    }

    def __post_init__(self) -> None:
        at_least("train.objective", 0, center_rewards_coefficient=self.center_rewards_coefficient)

    @property
    def encoding(self) -> str:
        """The columns depend on no option."""
        return "whole pairs"

    def encode(self, rows: pa.Table, tokenizer: Tokenizer, max_length: int) -> pa.Table:
        """Makes the columns of `encode_pairs`, whole; null where a side is longer than `max_length`."""
        pairs = encode_pairs(rows, tokenizer, WHOLE)
        fits = pc.less_equal(pc.max_element_wise(*(pc.list_value_length(pairs[name]) for name in SIDES)), max_length)
        columns = {name: pc.if_else(fits, pairs[name], None) for name in pairs.column_names}
        return pa.table(columns)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the number of pairs."""
        return dict.fromkeys((PAIR, *self.figures), batch.units)

    def terms(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, Term]:
        """Computes the loss; "chosen" and "rejected" are the rewards, and "margin" is their difference."""
        reward_B = scores(network, batch)
        chosen_U, rejected_U = reward_B[::2], reward_B[1::2]
        loss_U = -F.logsigmoid(chosen_U - rejected_U)
        if self.center_rewards_coefficient:
            loss_U = loss_U + self.center_rewards_coefficient * (chosen_U + rejected_U).square()
        return {PAIR: pair_term(loss_U, batch), **reward_figures(reward_B, batch)}


def scores(network: nn.Module, batch: Batch) -> torch.Tensor:
    """Returns the network's score (B,) of each sequence."""
    # Without a mask, attention has a faster kernel.
    mask_BT = None if batch.tokens == batch.ids_BT.numel() else batch.attention_BT
    logits_B1 = network(input_ids=batch.ids_BT, attention_mask=mask_BT, use_cache=False).logits
    score_B: torch.Tensor = logits_B1[:, 0].to(torch.promote_types(logits_B1.dtype, torch.float32))
    return score_B
