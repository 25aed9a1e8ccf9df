"""What TRL's own trainers make of rows: token ids, loss, gradient and metrics. Legend: P trained parameters."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

TRAINERS: dict[str, tuple[Any, Any]] = {
    "dpo": (DPOConfig, DPOTrainer),
    "kto": (KTOConfig, KTOTrainer),
    "cpo": (CPOConfig, CPOTrainer),
    "orpo": (ORPOConfig, ORPOTrainer),
    "reward": (RewardConfig, RewardTrainer),
}


class Sequence(NamedTuple):
    """The token ids of a sequence, without padding, and whether each token is scored."""

    ids: list[int]
    scored: list[bool]


class Step(NamedTuple):
    """TRL's loss of a batch, its gradient (P,) by the parameters' order in the network, and what it logs."""

    loss: float
    grad_P: torch.Tensor
    metrics: dict[str, float]


def trl_trainer(
    kind: str,
    network: Any,
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    **options: Any,
) -> Any:
    """Makes TRL's trainer of a base model and rows; with `peft_config` on an adapter, whose base is the reference."""
    config, trainer = TRAINERS[kind]
    peft_config = options.pop("peft_config", None)
    if kind == "kto":
        # Mismatched completions are taken from a block of this many rows: here from all.
        options = {"train_sampling_strategy": "sequential", **options}
    arguments = config(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        per_device_train_batch_size=len(rows),
        **options,
    )
    return trainer(
        model=network,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def trl_batch(trainer: Any) -> dict[str, torch.Tensor]:
    """Returns all rows that the trainer has kept, as its collator makes a batch of them."""
    batch: dict[str, torch.Tensor] = trainer.data_collator(list(trainer.train_dataset))
    return batch


def trl_step(trainer: Any, vector_P: torch.Tensor | None = None) -> Step:
    """Computes the loss of all rows, by the trained parameters in `vector_P` or as they are."""
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    if vector_P is not None:
        parts = vector_P.split([parameter.numel() for parameter in trained])
        for parameter, part in zip(trained, parts, strict=True):
            parameter.data.copy_(part.view_as(parameter))
    trainer.model.train()
    trainer.model.zero_grad()
    if isinstance(trainer, CPOTrainer | ORPOTrainer):
        loss, metrics = trainer.get_batch_loss_metrics(trainer.model, trl_batch(trainer))
    else:
        loss = trainer.compute_loss(trainer.model, trl_batch(trainer))
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    loss.backward()
    return Step(loss.item(), torch.cat([parameter.grad.reshape(-1) for parameter in trained]), metrics)


def trl_sequences(trainer: Any) -> dict[str, list[Sequence]]:
    """Returns the sequences of each kind: those "chosen" and "rejected", or KTO's "" and the mismatched "KL_".

    Of a reward model's sequences all tokens count as scored.
    """
    batch = trl_batch(trainer)
    if isinstance(trainer, CPOTrainer | ORPOTrainer):
        return {
            side: unpadded(batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], batch[f"{side}_labels"] != -100)
            for side in ("chosen", "rejected")
        }
    if isinstance(trainer, KTOTrainer):
        names = [name.removesuffix("completion_mask") for name in batch if name.endswith("completion_mask")]
        return {
            name: unpadded(*(batch[f"{name}{key}"] for key in ("input_ids", "attention_mask", "completion_mask")))
            for name in names
        }
    real_BT = batch["attention_mask"]
    halves = [ids.chunk(2) for ids in (batch["input_ids"], real_BT, batch.get("completion_mask", real_BT))]
    return {side: unpadded(*(half[place] for half in halves)) for place, side in enumerate(("chosen", "rejected"))}


def unpadded(ids_BT: torch.Tensor, real_BT: torch.Tensor, scored_BT: torch.Tensor) -> list[Sequence]:
    """Returns the sequences of a padded batch."""
    return [
        Sequence(ids[real == 1].tolist(), scored[real == 1].bool().tolist())
        for ids, real, scored in zip(ids_BT, real_BT, scored_BT, strict=True)
    ]
