"""A client's local training over the ranks of a gang: one DeepSpeed engine that becomes client after client, in place.

Making an engine anew for each client leaks and takes seconds (deepspeed issues 5143, 5674, 7204); resetting one takes
milliseconds. The reset touches private fields of deepspeed, so its version is pinned, and a test compares each client
with the same client in a fresh gang, bit for bit. Legend: S of a rank's shard, B rows, K of correct's clients (1).
"""

import math
from typing import Any

import deepspeed
import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from engine.aggregation.exact_sum import NonFiniteUpdate
from engine.config.sections import Model, Zero
from engine.config.train import Train
from engine.models.deepspeed_model import ds_config, shape_of, trained_layout
from engine.objectives import Objectives
from engine.training.batching import batches, steps_of
from engine.training.judging import Prompt, continuations
from engine.training.local_training import Correct, Trainer
from engine.training.optimizers import make_optimizer, reset
from strategies.core.seeds import seed_torch
from strategies.core.sharding import Partition


class ZeroTrainer(Trainer):
    """One rank of a gang. All ranks must call the same methods with the same arguments, but for their own shards.

    A step's rows are dealt to the ranks in turn; the gradient is that of the whole step.
    """

    def __init__(
        self, network: torch.nn.Module, objective: Objectives, pad: int, model: Model, zero: Zero, train: Train
    ) -> None:
        self.rank, self.ranks, self.stage = dist.get_rank(), dist.get_world_size(), zero.stage
        self.offload = zero.offload == "cpu"
        self.network, self.objective, self.pad = network, objective, pad
        self.layout = trained_layout(network, model)
        self.nbytes = sum(math.prod(shape_of(p)) * p.element_size() for p in network.parameters())
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(trained, train.optimizer)
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        self.engine: Any = deepspeed.initialize(
            model=network, optimizer=optimizer, model_parameters=trained, config=ds_config(model, zero)
        )[0]
        for name, buffer in network.named_buffers():
            buffer.data = buffers[name].to(buffer.device)  # deepspeed rounds rotary tables too where it trains in bf16
        self.zero: Any = self.engine.optimizer
        self.optimizer: torch.optim.Optimizer = self.zero.optimizer
        self.optimizer.register_step_pre_hook(self._before_step)
        if self.stage == 3:
            (self.master,) = self.zero.fp32_partitioned_groups_flat
            self.partition = Partition.by_tensor(self.layout, self.ranks)
            padded = [p.partition_numel() for p in self.zero.fp16_groups[0]]
        else:
            (self.master,) = self.zero.single_partition_of_fp32_groups
            unit = self.zero.nccl_start_alignment_factor
            self.partition = Partition.contiguous(self.layout.size, self.ranks, unit)
            padded = [int(self.zero.partition_size[0])]
        own = [last - first for first, last in self.partition.parts[self.rank]]
        starts = np.cumsum([0, *padded[:-1]]).tolist()
        self.pieces = [(start, length) for start, length in zip(starts, own, strict=True)]
        assert sum(padded) == self.master.numel(), "deepspeed cuts parameters in another way"
        self.correct: Correct | None = None
        self.clip = 0.0

    def shard(self, flat: torch.Tensor) -> torch.Tensor:
        """A copy of this rank's shard (S,) of what lies in `flat` as deepspeed has it, padding between."""
        return torch.cat([flat[start : start + length] for start, length in self.pieces])

    @property
    def device(self) -> torch.device:
        """Where the shard lies: on the CPU if that is where the optimizer is."""
        found: torch.device = self.master.device
        return found

    @property
    def works_on(self) -> torch.device:
        """Where the network computes, and what batches and collectives must lie on."""
        return torch.device(deepspeed.get_accelerator().current_device_name())

    def weights(self, less: torch.Tensor | None = None) -> torch.Tensor:
        """A copy of this rank's shard (S,) of the present vector, or what it is `less` another."""
        weights_S = self.shard(self.master.data)
        return weights_S if less is None else weights_S.sub_(less)

    def set_rank(self, rank: int | None) -> None:
        """All clients of a gang have the recipe's rank."""
        assert rank is None

    def _put(self, flat: torch.Tensor, shard_S: torch.Tensor) -> None:
        lengths = [length for _, length in self.pieces]
        for (start, length), values in zip(self.pieces, shard_S.split(lengths), strict=True):
            flat[start : start + length] = values

    @torch.no_grad()
    def become(self, start_S: torch.Tensor) -> None:
        """All ranks have the weights of their shards `start_S`, and nothing is left of what was before."""
        self._reset()
        self._put(self.master.data, start_S.to(self.master.device))
        if self.stage == 3:
            self.zero._partition_all_parameters()
            self.zero._reassign_or_swap_out_partitioned_parameters(0)
            persistent = self.zero.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)
        else:
            self.zero.update_lp_params()
            self.zero._update_model_bit16_weights(0)

    def _reset(self) -> None:
        engine, zero = self.engine, self.zero
        reset(self.optimizer)
        zero.zero_grad(set_to_none=True)
        zero.clear_backward_seen_flag()
        zero.overflow, zero._global_grad_norm = False, 0.0
        engine.micro_steps = engine.global_steps = engine.global_samples = engine.skipped_steps = 0
        engine._unmanaged_backward_count, engine.losses, engine._step_applied = 0, None, False
        engine._is_gradient_accumulation_boundary = None
        for parameter in engine.module.parameters():
            parameter.grad = None
        if self.offload:  # deepspeed copies gradients into what it made for them once
            zero.reset_cpu_buffers()
            if self.master.grad is not None:
                self.master.grad.zero_()
        else:
            self.master.grad = None
        for bucket in zero.ipg_buckets.values():
            bucket.clear_params() if self.stage == 3 else bucket.clear()
        if self.stage == 3:
            zero.averaged_gradients = {}
            zero.grad_partitions_flat_buffer.zero_()
            zero._offload_boundary_param_ids = set()
            zero._get_param_coordinator().hierarchy = 0
            zero.micro_step_id = 0
            zero.params_already_reduced = dict.fromkeys(zero.params_already_reduced, False)
        else:
            if self.offload:
                zero.accumulated_grads_in_cpu = {}
                zero._offload_accumulated_param_ids = set()
            zero._release_preflattened_grad_buffers()
            for group in zero.averaged_gradients:
                zero.averaged_gradients[group] = None
            for group in zero.all_grad_tensors:
                zero.all_grad_tensors[group] = None
            zero.previous_reduced_grads.clear()
            zero.extra_large_param_to_reduce.clear()
            zero.params_already_reduced = [False] * len(zero.params_already_reduced)
            zero.reset_partition_gradient_structures()
            zero.micro_step_id = -1

    def _before_step(self, *_: Any) -> None:
        """What comes between backward and step: the strategy's correction, then clipping by the norm over all ranks."""
        grad = self.master.grad
        assert grad is not None
        if self.correct is not None:
            grad_S = self.shard(grad)
            self.correct(grad_S[None], self.weights()[None])
            self._put(grad, grad_S)
        if self.clip > 0:
            own = [grad[start : start + length] for start, length in self.pieces]
            squares = torch.stack([torch.linalg.vector_norm(one, dtype=torch.float64).square() for one in own]).sum()
            grad *= min(1.0, self.clip / (math.sqrt(self.summed(squares.item())) + 1e-6))

    def steps(
        self,
        rows: pa.RecordBatch,
        start_S: torch.Tensor,
        train: Train,
        stream: np.random.Generator,
        correct: Correct | None = None,
        rate: float = 1.0,
    ) -> dict[str, float]:
        """Local optimizer steps from `start_S`; returns the metrics, of all ranks together: see LocalTrainer.steps.

        NonFiniteUpdate on all ranks where deepspeed skipped a step because the gradient holds NaN or infinity.
        """
        self.become(start_S)
        self.engine.train()
        self.correct, self.clip = correct, train.clip
        seed_torch(torch.initial_seed() + self.rank)  # each rank has rows of its own, and dropout too
        nll_total, learnt_total, tokens, steps, rates = 0.0, 0, 0, 0, 0.0
        total = steps_of(rows.num_rows, train)
        for picked in batches(rows.num_rows, train, stream):
            pieces = self._dealt(rows, picked, train.batch)
            learnt = self.summed(sum(piece.learnt for piece, share in pieces if share))
            for piece, share in pieces:
                nll, _ = self.objective.loss(self.engine, piece)
                # Deepspeed takes the mean over the ranks.
                self.engine.backward(nll * (share * self.ranks / learnt), scale_wrt_gas=False)
                nll_total += nll.item() * share
                tokens += piece.tokens * share
            lr = train.optimizer.lr * rate * train.over_steps.factor(steps, total)
            self.optimizer.param_groups[0]["lr"] = lr
            self.engine.step()
            if self.zero.overflow:
                raise NonFiniteUpdate("its gradient holds NaN or infinity")
            learnt_total, steps, rates = learnt_total + int(learnt), steps + 1, rates + lr
        return {
            "loss": self.summed(nll_total) / learnt_total,
            "rows": float(rows.num_rows),
            "steps": float(steps),
            "tokens": self.summed(tokens),
            "learnt": float(learnt_total),
            "rates": rates,
        }

    def mean_loss(self, rows: pa.RecordBatch, vector: torch.Tensor, batch: int) -> float:
        """The mean loss of the vector that `vector` (S,) is a shard of over all rows, in nats per token."""
        self.become(vector)
        nll, learnt = self.nll(rows, batch)
        return nll / learnt

    @torch.no_grad()
    def nll(self, rows: pa.RecordBatch, batch: int) -> tuple[float, int]:
        """The summed loss in nats of the present weights over all rows, and over how many tokens."""
        self.engine.eval()
        nll_total, learnt_total = 0.0, 0
        for first in range(0, rows.num_rows, batch):
            for piece, share in self._dealt(rows, np.arange(first, min(first + batch, rows.num_rows)), batch):
                nll, learnt = self.objective.loss(self.engine, piece)
                nll_total, learnt_total = nll_total + nll.item() * share, learnt_total + learnt * share
        return self.summed(nll_total), int(self.summed(learnt_total))

    @torch.no_grad()
    def generate(self, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], tokens: int) -> list[str]:
        """Greedy continuations of at most `tokens` tokens by the present weights, the same in all ranks."""
        self.engine.eval()
        return continuations(self.network, self.pad, self.works_on, tokenizer, prompts, tokens)

    def _dealt(self, rows: pa.RecordBatch, picked: np.ndarray, batch: int) -> list[tuple[Any, int]]:
        """What is this rank's of `batch` rows at once: batches with 1, or 0 where a rank without rows keeps step."""
        micro = -(-batch // self.ranks)
        mine, most = picked[self.rank :: self.ranks], -(-len(picked) // self.ranks)
        chosen = [mine[first : first + micro] for first in range(0, most, micro)]
        return [
            (
                self.objective.collate(rows.take(some if len(some) else picked[:1]), self.pad).to(self.works_on),
                int(len(some) > 0),
            )
            for some in chosen
        ]

    def summed(self, value: float) -> float:
        """The sum over all ranks, in float64."""
        total = torch.tensor(value, dtype=torch.float64, device=self.works_on)
        dist.all_reduce(total)
        return total.item()
