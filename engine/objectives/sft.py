"""Supervised fine-tuning: next-token loss on completions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from torch import nn

from datasets_partition.core.turns import Conversation, conversation_of, conversations, words
from datasets_partition.core.types import MESSAGES, OPTIONS, PROMPT_COMPLETION, format_of
from engine.objectives.base import NATS, BaseObjective, Context, Prompt, Term, Tokenizer
from engine.objectives.chat_template import encode_conversations
from engine.objectives.completions import encode_completions
from engine.objectives.token_batch import Batch, flattened, lengths, token_losses

NLL = "nll"


@dataclass(frozen=True)
class Sft(BaseObjective):
    """Trains on the completion's tokens and an end token; a row with an empty prompt is trained whole.

    Of a conversation it trains on the assistant's turns. Tokens and masks equal those of TRL's SFTTrainer: prompt and
    completion are tokenized together, the completion starts where their tokens first differ from the prompt's, and rows
    are cut at their end. With `packing` nothing is cut off: all rows of a client's split, one after another, are cut
    into blocks of `train.max_length` tokens, which are then the rows, as by TRL's packing strategy "wrapped".
    """

    kind: Literal["sft"] = "sft"
    packing: bool = False
    formats: ClassVar[tuple[str, ...]] = (PROMPT_COMPLETION, MESSAGES)
    losses: ClassVar[Mapping[str, float]] = {NLL: NATS}
    units: ClassVar[Mapping[str, str]] = {NLL: "nats per token"}
    heldout: ClassVar[str] = NLL

    def encode(self, rows: pa.Table, tokenizer: Tokenizer, max_length: int) -> pa.Table:
        """Makes `input_ids` and `mask` (1 = learned), null if nothing is learned."""
        if format_of(rows) == MESSAGES:
            ids, masks = encode_conversations(conversations(rows, "messages"), tokenizer)
        else:
            encoded = encode_completions(rows, "completion", tokenizer)
            ids = [completion.ids for completion in encoded]
            masks = [[0] * start + [1] * (len(whole) - start) for whole, start in encoded]
        length = None if self.packing else max_length
        cut = [  # nothing predicts the first token
            (row[:length], mask[:length]) if any(mask[1:length]) else (None, None)
            for row, mask in zip(ids, masks, strict=True)
        ]
        return token_table([row for row, _ in cut], [mask for _, mask in cut])

    @property
    def regroups(self) -> bool:
        """Rows become blocks."""
        return self.packing

    def regroup(self, rows: pa.Table, max_length: int) -> pa.Table:
        """Cuts the rows, one after another, into blocks; one without anything to learn is left out."""
        ids, mask = (
            np.concatenate([[], *map(flattened, rows[name].chunks)]).astype(int) for name in ("input_ids", "mask")
        )
        starts = [start for start in range(0, len(ids), max_length) if mask[start + 1 : start + max_length].any()]
        return token_table(*([each[start : start + max_length] for start in starts] for each in (ids, mask)))

    def collate(self, rows: pa.RecordBatch, pad: int) -> Batch:
        """Makes a batch of encoded rows, padded on the right with `pad` to the longest."""
        return Batch.padded(flattened(rows["input_ids"]), flattened(rows["mask"]) != 0, lengths(rows), pad)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the number of learned tokens."""
        return {NLL: batch.learned}

    def terms(self, network: nn.Module, batch: Batch, context: Context) -> dict[str, Term]:
        """Computes the learned tokens' negative log-likelihood in nats."""
        return {NLL: Term(token_losses(network, batch, every_logit=context.every_logit), batch.row_N)}

    def sample(self, row: Mapping[str, Any]) -> tuple[Prompt, str]:
        """Returns the prompt and the completion; of a conversation the turns before the assistant's last, and that."""
        if "messages" not in row:
            return row["prompt"], row["completion"]
        turns, learned, options = conversation_of(row["messages"], row.get(OPTIONS))
        # The last words of the assistant; after a conversation without any, those that the model adds.
        last = max((number for number, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
        prompt = Conversation(turns[:last], learned[:last], options) if last else ""
        return prompt, "".join(words(turn) for turn in turns[last : last + 1])


def token_table(ids: Sequence[Any], masks: Sequence[Any]) -> pa.Table:
    """Makes the columns of rows' token ids, and of masks that are 1 where a token is learned."""
    return pa.table({"input_ids": pa.array(ids, pa.list_(pa.int32())), "mask": pa.array(masks, pa.list_(pa.int8()))})
