"""Local training over the ranks of a gang, with one DeepSpeed engine that trains client after client.

A new engine for each client leaks memory and takes seconds (deepspeed issues 5143, 5674, 7204); a reset takes
milliseconds. The reset sets private fields of deepspeed, so its version is pinned, and a test compares each client with
the same client in a fresh gang, bit for bit. Legend: S elements of a rank's shard.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial, reduce
from itertools import chain
from operator import add
from typing import Any

import deepspeed
import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from engine.aggregation.exact_sum import NonFiniteUpdate
from engine.config.sections import Model, Zero
from engine.config.train import Train
from engine.models.deepspeed_config import ds_config
from engine.models.trainable import shape_of, trained_layout
from engine.objectives.base import Context, Objective, Prompt, Term, Tokenizer, term_sums
from engine.objectives.token_batch import Batch
from engine.training.generation import continuations
from engine.training.local_training import NO_KEYS, client_updates
from engine.training.optimizers import make_optimizer, reset
from engine.training.sampler import RowKeys
from engine.training.step_columns import constant, judging, with_columns, without_adapters
from engine.training.step_loop import Correct, Progress, Training, batches, take_steps
from strategies.core.protocol import Vector
from strategies.core.seeds import seed_torch
from strategies.core.sharding import Partition


class ZeroTrainer:
    """One rank of a gang. A backend of the step loop, and a Trainer, whose vectors are the rank's shards.

    All ranks must call the same methods with the same arguments, except for shards. A step's rows are dealt to the
    ranks in turn; the gradient is that of the whole step.
    """

    lanes = 1
    batches = staticmethod(batches)
    prepared: Any = staticmethod(nullcontext)
    train = take_steps
    updates = client_updates

    def __init__(
        self,
        network: torch.nn.Module,
        pad: int,
        model: Model,
        zero: Zero,
        train: Train,
        models: Sequence[Any] = (),
    ) -> None:
        """`models` are the objective's frozen ones, whole in each rank."""
        self.context = Context(models=tuple(models))
        self.rank, self.ranks, self.stage = dist.get_rank(), dist.get_world_size(), zero.stage
        self.offload = zero.offload == "cpu"
        self.network, self.pad = network, pad
        self.objective: Objective = train.objective
        if "head" in self.objective.needs:
            network.config.pad_token_id = pad  # type: ignore[union-attr]  # by which it finds a text's last token
        self.layout = trained_layout(network, model)
        self.nbytes = sum(math.prod(shape_of(p)) * p.element_size() for p in network.parameters())
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(trained, train.optimizer)
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        options = {"optimizer": optimizer, "model_parameters": trained, "config": ds_config(model, zero)}
        self.engine: Any = deepspeed.initialize(model=network, **options)[0]
        for name, buffer in network.named_buffers():
            buffer.data = buffers[name].to(buffer.device)  # with bf16 deepspeed rounds rotary tables too
        self.zero: Any = self.engine.optimizer
        self.optimizer: torch.optim.Optimizer = self.zero.optimizer
        self.optimizer.register_step_pre_hook(lambda *_: self._adjust())
        if self.stage == 3:
            (self.master,) = self.zero.fp32_partitioned_groups_flat
            self.partition = Partition.by_tensor(self.layout, self.ranks)
            padded = [p.partition_numel() for p in self.zero.fp16_groups[0]]
        else:
            (self.master,) = self.zero.single_partition_of_fp32_groups
            self.partition = Partition.contiguous(self.layout.size, self.ranks, self.zero.nccl_start_alignment_factor)
            padded = [int(self.zero.partition_size[0])]
        lengths = [last - first for first, last in self.partition.intervals[self.rank]]
        self.pieces = list(zip(np.cumsum([0, *padded[:-1]]).tolist(), lengths, strict=True))  # starts and lengths
        assert sum(padded) == self.master.numel(), "deepspeed partitions parameters in another way"
        self.device: torch.device = self.master.device  # of the shard: the CPU if the optimizer is offloaded
        # Where the network computes, and batches and the tensors of collectives must lie.
        self.works_on = torch.device(deepspeed.get_accelerator().current_device_name())
        self._adjust: Callable[[], None] = lambda: None

    def shard(self, flat: torch.Tensor) -> torch.Tensor:
        """Returns a copy of this rank's shard (S,) in `flat`, without deepspeed's padding."""
        return torch.cat([flat[start : start + length] for start, length in self.pieces])

    def weights(self, origin: torch.Tensor | None = None) -> torch.Tensor:
        """Returns a copy of this rank's shard (S,) of the present vector, minus `origin` if given."""
        weights_S = self.shard(self.master.data)
        return weights_S if origin is None else weights_S.sub_(origin)

    def _put(self, flat: torch.Tensor, shard_S: torch.Tensor) -> None:
        for (start, length), values in zip(self.pieces, shard_S.split([n for _, n in self.pieces]), strict=True):
            flat[start : start + length] = values

    @torch.no_grad()
    def become(self, vector: Vector, lora_rank: int | None = None) -> None:
        """Sets the weights from all ranks' shards `vector` (S,) and clears everything that earlier clients left."""
        assert lora_rank is None, "all clients of a gang have the recipe's LoRA rank"
        self._reset()
        self._load(vector)

    def _load(self, vector: Vector) -> None:
        self._put(self.master.data, vector.to(self.master.device))
        if self.stage == 3:
            self.zero._partition_all_parameters()
            self.zero._reassign_or_swap_out_partitioned_parameters(0)
            if persistent := self.zero.persistent_parameters:
                persistent[0].all_gather(persistent)
        else:
            self.zero.update_lp_params()
            self.zero._update_model_bit16_weights(0)

    @contextmanager
    def _as_reference(self, reference: Vector | None) -> Iterator[None]:
        """Lets the model compute as the reference, without gradients; it is as it was afterwards."""
        with judging(self.engine), ExitStack() as at_end:
            if reference is None:
                at_end.enter_context(without_adapters(self.network))
            else:
                at_end.callback(self._load, self.weights())
                self._load(reference)
            yield

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
        if self.offload:  # deepspeed copies gradients into buffers that it makes once
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
                zero.accumulated_grads_in_cpu, zero._offload_accumulated_param_ids = {}, set()
            zero._release_preflattened_grad_buffers()
            for gradients in (zero.averaged_gradients, zero.all_grad_tensors):
                gradients.update(dict.fromkeys(gradients))
            zero.previous_reduced_grads.clear()
            zero.extra_large_param_to_reduce.clear()
            zero.params_already_reduced = [False] * len(zero.params_already_reduced)
            zero.reset_partition_gradient_structures()
            zero.micro_step_id = -1

    def begin(self, lane: int, training: Training) -> None:
        """Puts the start into the model."""
        self.become(training.start, training.lora_rank)
        self.engine.train()
        seed_torch(training.dropout + self.rank)  # each rank draws dropout for its own rows

    def gradients(self, active: list[Progress], train: Train) -> None:
        """Computes the gradient of the client's next step, which deepspeed averages over the ranks."""
        (client,) = active
        pieces = self._dealt(client.next_rows(self.objective), train.batch)
        counts = self._counts(pieces)
        client.count({name: int(count) for name, count in counts.items()}, sum(p.tokens * share for p, share in pieces))
        for piece, share in self._with_columns(pieces, counts, client.training.reference, client.training.means):
            terms = self.objective.terms(self.engine, piece, self.context)
            totals = {name: term.total() for name, term in terms.items()}
            losses = self.objective.losses
            loss = reduce(add, (totals[name] * (share * self.ranks / max(1, counts[name])) for name in losses))
            self.engine.backward(loss, scale_wrt_gas=False)
            client.add({name: total * share for name, total in totals.items()})

    def _counts(self, pieces: list[tuple[Batch, int]]) -> dict[str, float]:
        """Returns the number of each term's units, over all ranks."""
        shares = [(self.objective.counts(piece), share) for piece, share in pieces]
        return {name: self.summed(sum(units[name] * share for units, share in shares)) for name in shares[0][0]}

    def _with_columns(
        self,
        pieces: list[tuple[Batch, int]],
        counts: dict[str, float],
        reference: Vector | None,
        means: Mapping[str, float] | None = None,
    ) -> list[tuple[Batch, int]]:
        """Returns the pieces of a step with the columns that the objective reads, the same means on all ranks."""
        shares = [share for _, share in pieces]

        def averages(name: str, terms: Sequence[Term], batches: Sequence[Batch]) -> list[torch.Tensor]:
            total = sum(term.total().item() * share for term, share in zip(terms, shares, strict=True))
            mean = torch.tensor(self.summed(total) / max(1, counts[name]), device=self.works_on)
            return [mean.expand(len(batch.ids_BT)) for batch in batches]

        batches, refer = [batch for batch, _ in pieces], partial(self._as_reference, reference)
        known = None if means is None else partial(constant, means)
        batches = with_columns(self.objective, self.engine, batches, self.context, refer, averages, known)
        return list(zip(batches, shares, strict=True))

    def correct(self, lane: int, correct: Correct) -> None:
        """Applies a correction to this rank's shard of the gradient."""
        grad_S = self.shard(self.master.grad)
        correct(grad_S[None], self.weights()[None])
        self._put(self.master.grad, grad_S)

    def clip(self, norm: float) -> None:
        """Clips the gradient to an L2 norm over all ranks; 0 leaves it alone."""
        if norm > 0:
            grad = self.master.grad
            pieces = [grad[start : start + length] for start, length in self.pieces]
            squares = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64).square() for x in pieces]).sum()
            grad *= min(1.0, norm / (math.sqrt(self.summed(squares.item())) + 1e-6))

    def step(self, adjust: Callable[[], None]) -> None:
        """Takes deepspeed's step; NonFiniteUpdate on all ranks if it skips the step for NaN or infinity."""
        self._adjust = adjust  # deepspeed completes the gradient inside its step, then calls the optimizer
        self.engine.step()
        if self.zero.overflow:
            raise NonFiniteUpdate("its gradient holds NaN or infinity")

    def end(self, lane: int, training: Training) -> Vector:
        """Returns this rank's shard of the vector, minus `training.origin` if given."""
        return self.weights(training.origin)

    def loss_terms(
        self, rows: pa.RecordBatch, batch: int, reference: Vector | None = None, keys: RowKeys = NO_KEYS
    ) -> dict[str, tuple[float, int]]:
        """Returns each term's sum and count over all rows, by the present weights; the same on all ranks."""
        self.engine.eval()
        pieces = self._judged(rows, batch, reference)
        sums = term_sums(self.objective, self.engine, pieces, self.context)
        return {name: (self.summed(total), int(self.summed(count))) for name, (total, count) in sums.items()}

    def step_means(self, rows: pa.RecordBatch, batch: int, reference: Vector | None) -> dict[str, float]:
        """Returns the objective's means over these rows, by the present weights; the same on all ranks."""
        (first, _), *_ = self._judged(rows, batch, reference)
        return {name: first.columns[name][0].item() for name in self.objective.means}

    def _judged(self, rows: pa.RecordBatch, batch: int, reference: Vector | None) -> list[tuple[Batch, int]]:
        """Returns this rank's pieces of all rows, as if they were one step."""
        rows = self.objective.step_rows(rows, np.arange(rows.num_rows))
        some = (rows.slice(first, batch) for first in range(0, rows.num_rows, batch))
        pieces = list(chain.from_iterable(self._dealt(few, batch) for few in some))
        return self._with_columns(pieces, self._counts(pieces), reference)

    @torch.no_grad()
    def generate(self, tokenizer: Tokenizer, prompts: list[Prompt], tokens: int) -> list[str]:
        """Returns greedy continuations of at most `tokens` tokens by the present weights, the same on all ranks."""
        self.engine.eval()
        return continuations(self.network, self.pad, self.works_on, tokenizer, prompts, tokens)

    def _dealt(self, rows: pa.RecordBatch, batch: int) -> list[tuple[Batch, int]]:
        """Cuts this rank's rows into batches; one that only keeps a rank without rows in step counts 0."""
        micro = -(-batch // self.ranks)
        numbers, most = np.arange(rows.num_rows), -(-rows.num_rows // self.ranks)
        mine = numbers[self.rank :: self.ranks]
        dealt = []
        for some in (mine[first : first + micro] for first in range(0, most, micro)):
            piece = self.objective.collate(rows.take(some if len(some) else numbers[:1]), self.pad)
            dealt.append((piece.to(self.works_on), int(len(some) > 0)))
        return dealt

    def summed(self, value: float) -> float:
        """Adds a figure up over all ranks, in float64."""
        total = torch.tensor(value, dtype=torch.float64, device=self.works_on)
        dist.all_reduce(total)
        return total.item()
