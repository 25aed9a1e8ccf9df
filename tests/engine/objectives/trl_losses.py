"""What TRL's own trainers make of the same rows with the same network: tokens, loss, metrics and gradient.

Each function takes a network, a tokenizer, rows and the options of TRL's configuration, and treats all rows as one
micro-batch. It works on copies: the network and the tokenizer stay as they are. A network of adapters is compared with
itself without them, unless `reference` is given; other networks need `reference` in DPO and KTO.

What TRL 1.16.0 does with tokens, for DPO and KTO:
- Prompt and completion are tokenized together. The completion starts where these tokens first differ from those of the
  prompt alone; for a pair, at the earlier of both places, on both sides. So a merge over the border moves the prompt's
  last tokens into the completion.
- Of text, the end token's string is appended to a completion that does not end with it, and is scored. Conversations
  get no end token: their template ends them, and what follows it (such as a newline) is scored too.
- A prompt that is empty has no tokens (with a tokenizer that begins texts with a token: that one). Then nothing
  predicts the completion's first token: it is not scored, yet "ipo" and "sigmoid_norm" count it among the tokens that
  they divide by.
- An empty completion is the end token alone.
- Rows whose prompt has max_length tokens or more are dropped; others are cut at their end, where they may lose the end
  token. A cut may make both sides of a pair equal: the row stays.
KTO:
- Pairs become two rows, all chosen ones before all rejected ones, in blocks of 1000 pairs, and only then are rows
  dropped: one side of a pair may stay alone.
- The mismatched sequence of a row is its prompt's tokens and then the completion's tokens of the row before (of the
  first row: of the last), which are neither tokenized anew nor cut before they are joined, then cut at max_length. Rows
  are shifted after some are dropped. A micro-batch of one row is paired with itself.
- z0 is the mean over all rows of the micro-batch, at least 0, and has no gradient.
ORPO and CPO:
- Tokenized together without the tokenizer's own special tokens; the completion starts after as many tokens as the
  prompt alone has, or one earlier if any of these differ. A merge over the border that leaves the whole with fewer
  tokens than the prompt alone raises ValueError, as do sides whose prompts differ in more than one token.
- Each side has its own start: where a merge moves only one of them, the other keeps a token more in its prompt than in
  DPO, so log-probabilities differ from DPO's for such rows.
- The token of the beginning is put before the prompt, if there is one and it is not there; the end token after the
  completion, if it is not there.
- Completions are cut at max_length, prompts are not, and no row is dropped: a prompt of max_length tokens leaves an
  empty completion, whose mean log-probability is NaN (its sum, in CPO's sigmoid and hinge, is 0).
- Conversations become texts by the template, and get the end token after it (as an id), unless they end with it.
- ORPO's likelihood is of all tokens of the chosen side, CPO's of those of its completion.
Rewards:
- Prompt and completion are joined as texts, with the end token's string appended, or as turns, as above. Rows of which
  a side has more than max_length tokens are dropped, none is cut. The reward is at the last token that is not the
  padding token: where the end token is also the padding token, it is the token before the end.
Precision: DPO and KTO compute log-probabilities in float32 even where the network is in float64, ORPO its odds; the
gradient of "discopop", whose modulation is steep, is therefore off by 1e-5 of its norm.
"""

import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

Row = Mapping[str, Any]
NUMBER = "number"  # the column that tells rows apart when some were dropped

disable_progress_bars()


class Tokens(NamedTuple):
    """A sequence without padding, and which of its tokens belong to the completion."""

    ids: list[int]
    completion: list[bool]


class Expected(NamedTuple):
    """The loss, what is logged, the loss's gradient (P,) and the names and numbers of the parameters in its order.

    `sequences` holds the tokens by side, `rows` the number of the row that each of a side's sequences is of.
    """

    loss: float
    metrics: dict[str, float]
    gradient: torch.Tensor
    parameters: dict[str, int]
    sequences: dict[str, list[Tokens]]
    rows: list[int]


def dpo(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    reference: nn.Module | None = None,
    max_length: int = 64,
    **options: Any,
) -> Expected:
    """Takes rows of prompt, chosen and rejected; sides "chosen" and "rejected"."""
    trainer = _trainer(DPOTrainer, DPOConfig, network, tokenizer, rows, max_length, options, reference)
    batch = _collated(trainer)
    loss = trainer._compute_loss(trainer.model, batch, False)
    sides = _tokens(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    return _expected(trainer, loss, _logged(trainer), _halves(sides))


def kto(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    reference: nn.Module | None = None,
    max_length: int = 64,
    **options: Any,
) -> Expected:
    """Takes rows of prompt, completion and label, or pairs; sides "completion" and, if z0 is measured, "kl"."""
    # All rows are one micro-batch, within which completions are shifted; shuffling and a size of 1 are refused.
    options = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": max(2, 2 * len(rows)), **options}
    trainer = _trainer(KTOTrainer, KTOConfig, network, tokenizer, rows, max_length, options, reference)
    batch = _collated(trainer)
    loss = trainer._compute_loss(trainer.model, batch, False)
    sides = {
        name: _tokens(*(batch[f"{prefix}{column}"] for column in ("input_ids", "attention_mask", "completion_mask")))
        for name, prefix in (("completion", ""), ("kl", "KL_"))
        if f"{prefix}input_ids" in batch
    }
    return _expected(trainer, loss, _logged(trainer), sides)


def orpo(
    network: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, max_length: int = 64, **options: Any
) -> Expected:
    """Takes rows of prompt, chosen and rejected; sides "chosen" and "rejected"."""
    trainer = _trainer(ORPOTrainer, ORPOConfig, network, tokenizer, rows, max_length, options)
    return _without_reference(trainer)


def cpo(
    network: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, max_length: int = 64, **options: Any
) -> Expected:
    """Takes rows of prompt, chosen and rejected; sides "chosen" and "rejected".

    SimPO is loss_type="simpo" with cpo_alpha=0; its margin is `simpo_gamma`.
    """
    trainer = _trainer(CPOTrainer, CPOConfig, network, tokenizer, rows, max_length, options)
    return _without_reference(trainer)


def reward(
    network: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, max_length: int = 64, **options: Any
) -> Expected:
    """Takes a network with one label, and rows of prompt, chosen, rejected and perhaps margin.

    The sides are "chosen" and "rejected", whose tokens are all marked as a completion's.
    """
    trainer = _trainer(RewardTrainer, RewardConfig, network, tokenizer, rows, max_length, options)
    batch = _collated(trainer)
    sides = _halves(_tokens(batch["input_ids"], batch["attention_mask"], batch["attention_mask"]))
    return _expected(trainer, trainer.compute_loss(trainer.model, batch), _logged(trainer), sides)


def _trainer(
    trainer: Any,
    config: Any,
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int,
    options: Mapping[str, Any],
    reference: nn.Module | None = None,
) -> Any:
    """Builds a TRL trainer over a copy of the network, in its precision and without dropout."""
    network = deepcopy(network)
    models: dict[str, Any] = {"model": network}
    if trainer in (DPOTrainer, KTOTrainer):
        # Given a network of adapters alone, TRL would compare with a copy of the adapters as they are now.
        models["ref_model"] = _unwrapped(reference) if reference is not None else _without_adapters(network)
    with tempfile.TemporaryDirectory() as folder:
        arguments = config(
            output_dir=folder,
            max_length=max_length,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            **options,
        )
        return trainer(
            **models,
            args=arguments,
            train_dataset=Dataset.from_list([{**row, NUMBER: number} for number, row in enumerate(rows)]),
            processing_class=deepcopy(tokenizer),
        )


def _without_adapters(network: nn.Module) -> Any:
    """Returns the base of a copy of a network of adapters, which computes as if it had none."""
    copied: Any = deepcopy(network)
    copied.base_model.disable_adapter_layers()
    return copied.get_base_model()


def _unwrapped(network: nn.Module) -> Any:
    """Returns a copy of a network, with its adapters but without PEFT's wrapper, whose forward pass TRL cannot use."""
    copied = deepcopy(network)
    return copied.get_base_model() if isinstance(copied, PeftModel) else copied


def _collated(trainer: Any) -> Any:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])


def _without_reference(trainer: Any) -> Expected:
    batch = _collated(trainer)
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    sides = {
        side: _tokens(batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], batch[f"{side}_labels"] != -100)
        for side in ("chosen", "rejected")
    }
    return _expected(trainer, loss, metrics, sides)


def _logged(trainer: Any) -> dict[str, float]:
    mode = "train" if trainer.model.training else "eval"
    return {name: values[-1] for name, values in trainer._metrics[mode].items()}


def _tokens(ids_BT: torch.Tensor, attention_BT: torch.Tensor, completion_BT: torch.Tensor) -> list[Tokens]:
    return [
        Tokens(ids_T[real_T].tolist(), completion_T[real_T].bool().tolist())
        for ids_T, real_T, completion_T in zip(ids_BT, attention_BT.bool(), completion_BT, strict=True)
    ]


def _halves(tokens: list[Tokens]) -> dict[str, list[Tokens]]:
    half = len(tokens) // 2
    return {"chosen": tokens[:half], "rejected": tokens[half:]}


def _expected(
    trainer: Any, loss: torch.Tensor, metrics: dict[str, float], sequences: dict[str, list[Tokens]]
) -> Expected:
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, [*trained.values()], allow_unused=True, materialize_grads=True)
    return Expected(
        loss.item(),
        metrics,
        torch.cat([grad.reshape(-1) for grad in grads]),
        {name: p.numel() for name, p in trained.items()},
        sequences,
        list(trainer.train_dataset[NUMBER]),
    )
