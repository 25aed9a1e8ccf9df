"""`fedpost plan`: the memory and the space in Ray's object store that a recipe needs, estimated without running it.

Parameters are counted on the meta device, activations by a forward pass there: weights are not needed. P: trained ones.
"""

import os
import warnings
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from rich.table import Table
from torch.autograd.graph import saved_tensors_hooks
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from engine.config.sections import Clients, Model, Zero
from engine.messages.errors import RunError
from engine.models.adapters import refuse_other_adapters, with_adapters
from engine.models.base_model import empty_network
from engine.models.deepspeed_config import BUCKET, LIVE
from engine.models.ends import emulator_skeleton
from engine.models.quantized import quantized_bytes
from engine.scheduling.placement import slot_counts
from engine.training.optimizers import state_vectors
from experiments.config.recipe import Recipe
from experiments.preflight.processes import in_fresh_process, memory
from experiments.report.terminal import console

GIB, FLOAT, GRID = 2**30, 4, 8
SPARE = 0.9  # the share of a device's memory that is planned with
HEAP = 1.5  # memory that the allocator holds over the live tensors of a step, measured with glibc
RAY = 20 * 2**20  # bytes that Ray adds to a process
MOST_RANKS = 1024
ANY_CPUS = 10**9  # for a given number of slots, which a plan takes as it is
EVEN_EXPERTS = "even"
STAGES: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)


class Sizes(NamedTuple):
    """Elements of a model, its trained part and largest tensor; bytes of an element, and of a sequence for its passes.

    In a quantized base an element's bytes are the mean.
    """

    parameters: int
    trained: int
    largest: int
    itemsize: float
    activations: int  # which the backward pass of a sequence of the recipe's length needs
    logits: int  # of its loss
    copies: int = 0  # bytes of experts' weights with their adapters, which a backward pass needs beside the base's
    frozen: float = 0.0  # bytes of the objective's frozen models, which processes share as they share the base

    @property
    def shared(self) -> float:
        """Bytes that slots on a device share."""
        return self.parameters * self.itemsize + self.frozen


class Need(NamedTuple):
    """Bytes of one process, a slot or a rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    updates: float
    process: float

    @property
    def total(self) -> float:
        """Their sum."""
        return float(sum(self))


def meta_network(model: Model, *, scores: bool = False) -> Any:
    """The model with its adapters on the meta device, from its configuration; RunError if there is none.

    Its layers are not quantized: bitsandbytes computes nothing on meta, and what the backward pass needs is the same.
    """
    model = replace(model, peft=model.peft.injected)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses an old name of transformers
        plain = replace(model, quantize=None, attention="auto")
        network = emulator_skeleton(plain) if model.peft.plugs_in else empty_network(plain, scores=scores)
        return with_adapters(network, model)


def on_meta(network: Any, length: int) -> torch.Tensor:
    """The logits of a row of `length` tokens; RunError if the model reads values, which meta tensors do not have."""
    ids_BT = torch.zeros((1, length), dtype=torch.long, device="meta")
    # With a mask of its own, transformers would read its values; the families that take no such mask do not.
    masks = torch.zeros((1, 1, length, length), dtype=network.dtype, device="meta"), None
    network.config._experts_implementation = EVEN_EXPERTS
    ALL_EXPERTS_FUNCTIONS.register(EVEN_EXPERTS, even_experts)
    for mask in masks:
        try:
            logits: torch.Tensor = network(input_ids=ids_BT, attention_mask=mask, use_cache=False).logits
            return logits
        except (ValueError, RuntimeError):
            continue
    raise RunError(
        f"the memory of {network.config.architectures[0]} cannot be planned, since its layers read values: "
        f"measure it with a few steps of a run, such as --set rounds=1"
    )


def even_experts(
    self: Any, hidden_NI: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts as transformers computes them, as to shapes: one for all tokens, as often as a token has experts."""
    up_weight, down_weight = (self.gate_up_proj if self.has_gate else self.up_proj)[0], self.down_proj[0]
    if not self.is_transposed:
        up_weight, down_weight = up_weight.T, down_weight.T
    chosen = top_k_index.shape[-1]
    up = hidden_NI.repeat_interleave(chosen, 0) @ up_weight
    out = (self._apply_gate(up) if self.has_gate else self.act_fn(up)) @ down_weight
    weighted = out * top_k_weights.reshape(-1, 1)
    summed: torch.Tensor = weighted.view(len(hidden_NI), chosen, -1).sum(1).to(hidden_NI.dtype)
    return summed


def sizes(model: Model, max_length: int) -> Sizes:
    """Counts a model from its configuration; RunError if there is none."""
    return sizes_of(meta_network(model), model, max_length)


def sizes_of(network: Any, model: Model, max_length: int) -> Sizes:
    """Counts a network on the meta device."""
    parameters = list(network.parameters())
    known, saved = set(map(id, parameters)), dict[int, int]()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if known.isdisjoint((id(tensor), id(tensor._base))):
            storage = tensor.untyped_storage()
            saved[storage._cdata] = storage.nbytes()
        return tensor

    counts = [parameter.numel() for parameter in parameters]
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    copies = _without_expert_adapters(network) * getattr(torch, model.dtype).itemsize
    with saved_tensors_hooks(note, lambda tensor: tensor):
        logits = on_meta(network.train(), max_length)
    logits_bytes = 3 * logits.numel() * FLOAT
    return Sizes(sum(counts), trained, max(counts), _itemsize(model), sum(saved.values()), logits_bytes, copies)


def with_frozen(counts: Sizes, recipe: Recipe) -> Sizes:
    """Adds the objective's frozen models: their weights, and the logits of those that give any."""
    nbytes, teachers = 0, 0
    for frozen in recipe.train.objective.models:
        model = replace(recipe.model, base=frozen.base or frozen.model, revision=frozen.revision, quantize=None)
        with torch.device("meta"):
            network = empty_network(replace(model, attention="auto"), scores=frozen.scores)
        nbytes += sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
        teachers += not frozen.scores
    # A distribution, its logarithm and what compares them are there for both.
    return counts._replace(frozen=float(nbytes), logits=counts.logits * (1 + 2 * teachers))


def _without_expert_adapters(network: Any) -> int:
    """Takes off the adapters of experts' weights, which cannot compute on the meta device; returns the elements."""
    from peft.tuners.lora.layer import ParamWrapper

    elements = 0
    for owner in list(network.modules()):
        for name, wrapper in list(owner.named_children()):
            if isinstance(wrapper, ParamWrapper):
                elements += wrapper.get_param().numel()
                if not isinstance(owner, ParamWrapper):  # a wrapper of one parameter may hold that of another
                    setattr(owner, name, wrapper.get_base_layer())
    return elements


def _itemsize(model: Model) -> float:
    """Bytes of an element of the base, with its share of the scales of quantized weights."""
    if model.quantize is None:
        return float(getattr(torch, model.dtype).itemsize)
    with torch.device("meta"):
        base = empty_network(model)
    elements: int = sum(parameter.numel() for parameter in base.parameters())
    return quantized_bytes(base, model.quantize) / elements


def slot_need(counts: Sizes, recipe: Recipe, process: float) -> Need:
    """A plain slot: the base, and vectors of the trained parameters in float32; more for each lane ("auto": one)."""
    if recipe.model.peft.replays:  # weights begun and reached, those of the network, and a direction
        rows = max(recipe.train.batch, recipe.evaluate.batch)
        weights, direction = counts.shared + 3 * counts.trained * FLOAT, counts.trained * FLOAT
        return Need(weights, 0.0, 0.0, HEAP * counts.logits * rows, direction, process)
    lanes = 1 if recipe.clients.lanes == "auto" else recipe.clients.lanes
    rows, judged = (batch * recipe.train.objective.sequences for batch in (recipe.train.batch, recipe.evaluate.batch))
    trained, vectors = counts.trained * FLOAT, 1 if lanes == 1 else 1 + lanes
    return Need(
        counts.shared + vectors * trained,
        vectors * trained,
        vectors * state_vectors(recipe.train.optimizer) * trained,
        HEAP * max((counts.activations + counts.logits) * rows * lanes, counts.logits * judged) + counts.copies,
        counts.trained * ((1 + 2 * lanes) * FLOAT + GRID),  # start, each lane's end and delta, and the sum
        process,
    )


def rank_need(counts: Sizes, recipe: Recipe, zero: Zero, process: float) -> Need:
    """A rank of a gang: ZeRO (arXiv 1910.02054) shards optimizer (1), gradients (2) and weights (3) over the ranks.

    Shards of state and sums in the object store do not count, nor what is offloaded from a GPU.
    """
    ranks, trained = zero.ranks, counts.trained * FLOAT
    # Of the master weights, their gradient and each moment: float32, even if the weights are float32 too.
    shard = 0.0 if zero.offload == "cpu" and recipe.clients.num_gpus else trained / ranks
    elements = counts.parameters / ranks + counts.largest + LIVE if zero.stage == 3 else counts.parameters
    gradients = (trained if zero.stage == 1 else shard) + min(BUCKET, counts.trained) * FLOAT
    activations = counts.activations // 4 if zero.checkpointing else counts.activations
    return Need(
        elements * counts.itemsize + counts.frozen + shard,
        gradients + shard,  # DeepSpeed's, and a flat copy for the optimizer
        state_vectors(recipe.train.optimizer) * shard,
        HEAP * (activations + counts.logits) * -(-recipe.train.batch // ranks) * recipe.train.objective.sequences
        + counts.copies,
        counts.trained * (FLOAT + GRID) / ranks,  # a client's delta, and the sum
        process,
    )


def smallest(counts: Sizes, recipe: Recipe, device: float, process: float) -> Zero | None:
    """The gang with the fewest ranks, and then the lowest stage, that fits the device; None if none does."""
    given = recipe.clients.zero or Zero()
    gangs = (replace(given, stage=stage, ranks=ranks) for ranks in range(1, MOST_RANKS + 1) for stage in STAGES)
    return next((gang for gang in gangs if rank_need(counts, recipe, gang, process).total <= SPARE * device), None)


def counted(clients: Clients, devices: int, cpus: int) -> tuple[int, int]:
    """The numbers of plain slots and gangs of a run; devices have a GPU each, or `cpus` CPUs; RunError without room."""
    nodes = [{"CPU": float(cpus if clients.slots == "auto" else ANY_CPUS)}] * devices
    if clients.num_gpus:  # the number of CPUs beside the GPUs is unknown here
        clients, nodes = replace(clients, num_cpus=0.0), [{"GPU": float(devices)}]
    try:
        gangs, slots = slot_counts(clients, nodes)
    except RunError as error:
        raise RunError(f"{error}, or give more --devices") from error
    return slots, gangs


def on_fullest(clients: Clients, plain: int, ranks: int, devices: int, slot: float, rank: float, base: float) -> float:
    """Bytes on the fullest device in the worst placement; plain slots of `slot` bytes each share the `base`."""
    if clients.num_gpus:  # Ray fills a GPU before it uses the next
        most = min(plain + ranks, max(1, int(1 / clients.num_gpus + 1e-6)))
    else:
        most = -(-(plain + ranks) // devices)
    return max(
        here * slot - max(0, here - 1) * base + (most - here) * rank
        for here in range(max(0, most - ranks), min(plain, most) + 1)
    )


def process_bytes() -> tuple[float, float]:
    """Bytes of a slot and of a rank before they have a model, measured in a fresh process."""
    plain, gang = (mb * 2**20 + RAY for mb in in_fresh_process(_imported))
    return plain, gang


def _imported() -> tuple[float, float]:
    import peft  # noqa: F401
    from transformers import PreTrainedModel  # noqa: F401

    import engine.workers.worker  # noqa: F401

    plain = memory().get("VmRSS", 0.0)
    import deepspeed  # noqa: F401

    return plain, memory().get("VmRSS", 0.0)


def show_plan(recipe: Recipe, device_gib: float | None, devices: int) -> bool:
    """Prints the plan for devices of `device_gib` GiB; returns whether the recipe fits."""
    screen = console(soft_wrap=False)
    network = meta_network(recipe.model, scores=recipe.scores)
    refuse_other_adapters(network, recipe)
    counts = with_frozen(sizes_of(network, recipe.model, recipe.train.max_length), recipe)
    clients, zero = recipe.clients, recipe.clients.zero or Zero()
    device = (device_gib or _this_machine()) * GIB
    plain, gang = process_bytes()
    screen.print(
        f"{counts.parameters:,} parameters of {counts.itemsize:.3g} bytes, {counts.trained:,} of them trained; "
        f"devices of {device / GIB:,.1f} GiB, {SPARE:.0%} of which may be used"
    )
    heads = ("weights", "gradients", "optimizer", "activations", "updates", "itself", "GiB", "fits")
    table, needs, home = Table("a process of", *heads), {}, recipe.model.access.home
    needs["a plain slot" if home else "the provider, for each slot"] = slot_need(counts, recipe, plain)
    if not home:
        needs["a slot without the base"] = slot_need(counts, recipe, plain)._replace(weights=0.0, activations=0.0)
    for stage in STAGES if recipe.model.quantize is None and home else ():  # which gangs do not take
        needs[f"stage {stage}, {zero.ranks} ranks"] = rank_need(counts, recipe, replace(zero, stage=stage), gang)
    for name, need in needs.items():
        amounts = [f"{value / GIB:,.2f}" for value in (*need, need.total)]
        table.add_row(name, *amounts, "yes" if need.total <= SPARE * device else "no")
    screen.print(table)
    if not home:
        screen.print(f'no gang works at model.access.level = "{recipe.model.access.level}"')
    elif recipe.model.quantize is not None:
        screen.print("no gang takes a quantized base (model.quantize)")
    elif least := smallest(counts, recipe, device, gang):
        fitting = f"stage = {least.stage}, ranks = {least.ranks} in clients.zero"
        screen.print(f"smallest gang with a device for each rank: {fitting}")
    else:
        screen.print(f"no gang of up to {MOST_RANKS:,} ranks fits such a device")
    slots, gangs = counted(clients, devices, os.cpu_count() or 1)
    base, moved = counts.shared, counts.trained * (FLOAT + GRID * (slots + gangs))
    whose = "those of base and objective, " if counts.frozen else "the base's "
    once = f", and {whose}{base / GIB:,.3f} GiB once" if slots else ""
    screen.print(f"object store: {moved / GIB:,.3f} GiB a round with {slots + gangs} slots, P (4 + 8 slots){once}")
    slot = sum(need.total for name, need in needs.items() if "slot" in name)
    rank = rank_need(counts, recipe, zero, gang).total
    fullest = on_fullest(clients, slots, gangs * zero.ranks, devices, slot, rank, base)
    verdict = "it fits" if (fits := fullest <= SPARE * device) else "it does not fit"
    screen.print(f"as the recipe is: {fullest / GIB:,.2f} GiB on the fullest of {devices} devices: {verdict}")
    return fits


def _this_machine() -> float:
    """The memory of the first GPU, or without one of this machine, in GiB."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory) / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
