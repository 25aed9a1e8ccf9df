"""The engine's sections of a recipe: plain values with defaults, importable without ray, transformers or peft."""

from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from engine.config.access import Access
from engine.config.adapters import Adapters, Lora
from engine.config.availability import Availability
from engine.config.privacy import Privacy
from engine.config.quantize import Quantize
from engine.config.train import Train
from engine.messages.checks import at_least
from engine.messages.errors import RunError
from strategies import Cohorts, Strategies, Transforms
from strategies.averaging.fedavg import FedAvg
from strategies.core.cohort import UniformCohort


@dataclass(frozen=True)
class Model:
    """The base model ("tiny", which is shipped, a Hugging Face name, or a folder), and the part of it that is trained.

    `dtype` is how the base is held; with `quantize` its linear layers are held in 4 or 8 bits, and the rest in `dtype`.
    With `start` rounds begin from what an earlier run has trained: its folder, any PEFT adapter's, or a URI of either.
    `attention` is transformers' name for the kernel; "auto" is "sdpa" where the model has it, else "eager". `compile`
    lets torch compile the layers, which takes up to a minute for each slot and pays off in long runs.
    `trust_remote_code` runs Python code that comes with the base.

    `chat_template` renders conversations in place of the tokenizer's: a file, the name of one of several that the
    tokenizer has, or of one that the package trl ships ("qwen3_training"). Templates that write today's date write
    `template_date` ("2026-01-31"), by default the day on which the run begins.
    """

    base: str = "tiny"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Annotated[Quantize, Field(discriminator="kind")] | None = None
    start: str | None = None
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    compile: bool = False
    trust_remote_code: bool = False
    chat_template: str | None = None
    template_date: str | None = None
    access: Access = field(default_factory=Access)
    peft: Annotated[Adapters, Field(discriminator="kind")] = field(default_factory=Lora)

    def __post_init__(self) -> None:
        if self.template_date is not None:
            try:
                date.fromisoformat(self.template_date)
            except ValueError:
                raise RunError(
                    f'model.template_date is {self.template_date!r}: write a day as "2026-01-31", or leave the key out '
                    f"to take the day on which the run begins"
                ) from None

    @property
    def public_base(self) -> str:
        """The base's name for what is published with the model: of a local folder its last name alone."""
        return Path(self.base).name if Path(self.base).is_absolute() else self.base

    @property
    def has_owner(self) -> bool:
        """Whether a party of its own answers for the base: it alone has it, or plugs into it what clients train."""
        return not self.access.home or self.peft.plugs_in

    @property
    def weights(self) -> "Model":
        """The model whose weights are read: where all are trained and there is a start, that."""
        if self.start is None or self.peft.peft_class is not None:
            return self
        return replace(self, base=self.start, start=None, revision=None)


@dataclass(frozen=True)
class Zero:
    """Slots that are gangs: `ranks` processes share one client by DeepSpeed ZeRO (arXiv 1910.02054) of a `stage`.

    Each rank takes a slot's share of Ray's resources. `offload` keeps the optimizer's state on the CPU, `checkpointing`
    recomputes activations in the backward pass. A rank that is silent for `timeout_s` ends its gang. With `from_rows`,
    that number of `gangs` takes the clients with at least `from_rows` training rows, and clients.slots plain slots take
    the others; without it all slots are gangs.
    """

    stage: Literal[1, 2, 3] = 3
    ranks: int = 2
    offload: Literal["none", "cpu"] = "none"
    checkpointing: bool = False
    timeout_s: float = 120.0
    from_rows: int = 0
    gangs: int = 1

    def __post_init__(self) -> None:
        at_least("clients.zero", 1, ranks=self.ranks, timeout_s=self.timeout_s, gangs=self.gangs)
        at_least("clients.zero", 0, from_rows=self.from_rows)


@dataclass(frozen=True)
class Clients:
    """The slots that host clients: their number, and each slot's share of Ray's resources (0.25 of a GPU: four on one).

    `threads` is the number of torch's threads in a slot, and part of the result's identity. So is `lanes`: a slot
    trains that many clients' adapters at once over one base; "auto" measures at the start which number is fastest.

    A client that raises, or kills its slot, is tried `retries` times more before it counts as failed; one with an
    unusable update (NaN) fails too. When more than `max_failed` of the clients that answer have failed, or fewer than
    `min_share` of the cohort give an update, the run ends with an error, or with `on_too_few = "skip"` the model stays
    as it is and the next round begins. A slot that does not answer for `timeout_s` is ended and replaced.
    """

    slots: int | Literal["auto"] = "auto"
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    threads: int = 1
    lanes: int | Literal["auto"] = 1
    retries: int = 2
    timeout_s: float | None = None
    max_failed: float = 0.2
    min_share: float = 0.0
    on_too_few: Literal["end", "skip"] = "end"
    availability: Availability = field(default_factory=Availability)
    zero: Zero | None = None

    def __post_init__(self) -> None:
        slots, lanes = (None if count == "auto" else count for count in (self.slots, self.lanes))
        at_least("clients", 1, slots=slots, threads=self.threads, lanes=lanes)
        at_least("clients", 0, num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_failed=self.max_failed)
        at_least("clients", 0, retries=self.retries, min_share=self.min_share)
        if self.min_share > 1:
            raise RunError(f"clients.min_share is a share of the cohort, at most 1, not {self.min_share:g}")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise RunError(f"clients.timeout_s must be above 0, not {self.timeout_s:g}")
        if self.num_cpus + self.num_gpus == 0:
            raise RunError("clients.num_cpus and clients.num_gpus are both 0, but a slot needs something to run on")
        if self.num_gpus > 1 and self.num_gpus % 1:
            raise RunError(f"clients.num_gpus is {self.num_gpus:g}: give a fraction of one GPU, or whole GPUs")


@dataclass(frozen=True)
class Evaluate:
    """Held-out loss at round 0, after each `every` rounds, and at the end (0: only then).

    At most `rows` rows of each client count, and `server_rows` of the server's own, drawn once by the seed. With
    `finetune`, each client trains the final model for that many steps on its own rows and is evaluated once more.
    `without_privacy` plays all rounds once more without noise and secure aggregation, which shows what privacy costs.
    With `overlap`, idle slots evaluate while the next round runs. At the end `samples` held-out rows are shown with
    what the model writes in their place; without the key 3, and none under `privacy`.
    """

    every: int = 5
    overlap: bool = False
    rows: int = 16
    finetune: int = 0
    without_privacy: bool = False
    server_rows: int = 256
    batch: int = 16
    samples: int | None = None

    def __post_init__(self) -> None:
        at_least("evaluate", 0, every=self.every, finetune=self.finetune, samples=self.samples)
        at_least("evaluate", 1, rows=self.rows, server_rows=self.server_rows, batch=self.batch)


@dataclass(frozen=True)
class Checkpoint:
    """Writes the state to disk after each `every` rounds and at the end, and keeps the last `keep`."""

    every: int = 1
    keep: int = 2

    def __post_init__(self) -> None:
        at_least("checkpoint", 1, every=self.every, keep=self.keep)


@dataclass(frozen=True, kw_only=True)
class Sections:
    """All sections that the engine runs, each of them valid by itself."""

    name: str
    seed: int
    rounds: int
    model: Model
    clients: Clients = field(default_factory=Clients)
    cohort: Annotated[Cohorts, Field(discriminator="kind")] = field(default_factory=UniformCohort)
    train: Train
    strategy: Annotated[Strategies, Field(discriminator="kind")] = field(default_factory=FedAvg)
    transforms: tuple[Annotated[Transforms, Field(discriminator="kind")], ...] = ()
    privacy: Privacy = field(default_factory=Privacy)
    evaluate: Evaluate = field(default_factory=Evaluate)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    @property
    def keeps_state(self) -> bool:
        """Whether clients keep anything from round to round."""
        kept = self.train.state == "keep" or any(transform.keeps_state for transform in self.transforms)
        return kept or self.strategy.keeps_state

    @property
    def scores(self) -> bool:
        """Whether the model gives a text one score, and writes none itself."""
        return "head" in self.train.objective.needs

    @property
    def samples(self) -> int:
        """How many held-out rows the run shows at its end: under privacy none, unless the recipe asks for them."""
        if self.scores:
            return 0
        default = 0 if self.privacy.on else 3
        return default if self.evaluate.samples is None else self.evaluate.samples

    @property
    def shown_rows(self) -> str | None:
        """What the run shows of rows although it has privacy, in words; None if nothing."""
        rows = f"{self.samples} held-out rows are shown word for word (evaluate.samples)"
        return rows if self.privacy.on and self.samples else None
