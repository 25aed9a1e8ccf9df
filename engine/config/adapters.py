"""What of the base is trained: kinds of adapters under PEFT's names and options, importable without peft.

The server averages vectors coordinate by coordinate; a kind's docstring says what that mean is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import ClassVar, Literal

from engine.config.ends import Ends
from engine.config.prefixes import Prefix, Projected, Prompt, PromptWords
from engine.config.seeds import Seeds
from engine.config.tuning import RankShare, Targets, Tuning, check_layers
from engine.messages.checks import at_least, below_one
from engine.messages.errors import RunError
from strategies.core.seeds import rng

# Methods of PEFT that clients cannot share: why, and what to use instead.
REFUSED_KINDS = {
    "adalora": "prunes directions by each client's own gradients, so that clients' vectors have no common mean: use "
    '"lora" with rank_pattern, or with the strategy "hetlora"',
    "boft": "multiplies a chain of rotations, and the product of mean factors is not a mean of the products: use "
    '"oft", which has one rotation for each layer',
    "eva": 'is a way to start "lora" that is computed from clients\' rows, which must not leave them: use "lora"',
}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights, or their beginnings
REFUSED_STARTS = {
    **dict.fromkeys(CHANGES_BASE, "changes the base's weights, which all slots share"),
    "eva": "is computed from clients' rows, which must not leave them",
}


@dataclass(frozen=True)
class FullTuning(Tuning):
    """Training of all parameters of the base. The mean is that of the models' weights."""

    kind: Literal["none"] = "none"

    @property
    def off_is_base(self) -> bool:
        """All of the base is trained."""
        return False

    @property
    def outside_gangs(self) -> str | None:
        """Gangs are made for it."""
        return None

    @property
    def outside_row_gradients(self) -> str | None:
        """Tied weights are found when the base is there."""
        return None

    @property
    def trains_base(self) -> str | None:
        """All of it."""
        return 'model.peft = "none"'


@dataclass(frozen=True)
class Lora(Tuning):
    """Low-rank adapters on a frozen base (arXiv 2106.09685): the weight changes by alpha / r * B A.

    `targets` is "all-linear" (without the layers where no adapter works, docs/models.md), a list of module names (their
    last parts) or a regular expression of whole names; `target_parameters` adapts weights that are no modules, such as
    those of experts. `use_rslora` scales by alpha / sqrt(r), `use_dora` (arXiv 2402.09353) also trains each output's
    magnitude. `rank_pattern` and `alpha_pattern` give layers their own r and alpha, by expressions. `bias` and
    `modules_to_save` train weights of the base, or whole modules, beside the adapter. `ranks` gives clients different
    ranks, by shares that sum to 1, where the strategy allows it; the largest is `r`, and a client's scale is alpha /
    its rank.

    The mean is that of the matrices A and of the matrices B, whose product is not the mean of the products: the rules
    in strategies/lora correct that. Magnitudes, biases and saved modules are averaged as weights are.
    """

    kind: Literal["lora"] = "lora"
    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: Targets = "all-linear"
    target_parameters: tuple[str, ...] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: str | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: tuple[str, ...] | None = None
    ranks: tuple[RankShare, ...] = ()

    peft_class: ClassVar[str] = "LoraConfig"
    title: ClassVar[str] = "A LoRA adapter"
    peft_names: ClassVar[Mapping[str, str]] = {**Tuning.peft_names, "alpha": "lora_alpha", "dropout": "lora_dropout"}

    def __post_init__(self) -> None:
        at_least("model.peft", 1, r=self.r)
        at_least("model.peft", 0, alpha=self.alpha)
        below_one("model.peft", dropout=self.dropout)
        at_least("model.peft.rank_pattern", 1, **self.rank_pattern)
        at_least("model.peft.alpha_pattern", 0, **self.alpha_pattern)
        if not self.targets and not self.target_parameters:
            raise RunError('model.peft.targets is empty: name the layers to adapt, or write "all-linear"')
        if self.ranks and (max(s.r for s in self.ranks) != self.r or abs(sum(s.share for s in self.ranks) - 1) > 1e-6):
            raise RunError(f"model.peft.ranks must have shares that sum to 1, and {self.r} (model.peft.r) as largest r")
        check_layers(self.layers_to_transform, self.targets)
        self._check_start()
        several = {
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "target_parameters": self.target_parameters,
        }
        beside = next((name for name, is_set in several.items() if is_set), None)
        if self.ranks and beside:
            raise RunError(
                f"model.peft.ranks scales each client's product by alpha / its rank, and model.peft.{beside} does not "
                f"go with that: leave one of them out"
            )

    def _check_start(self) -> None:
        start = self.init_lora_weights
        if start is True or start == "gaussian":
            return
        why = "is not known here"
        if isinstance(start, str):
            why = REFUSED_STARTS.get(start.split("_niter_")[0].lower(), why)
        elif not start:
            why = "starts with a product that is not zero, which PEFT has for its own tests"
        raise RunError(f'model.peft.init_lora_weights = {start!r} {why}: leave it out, or set it to "gaussian"')

    @property
    def lora_rank(self) -> int | None:
        """The largest client's."""
        return self.r

    @property
    def off_is_base(self) -> bool:
        """Biases that are trained are the base's."""
        return self.bias == "none"

    @property
    def outside_lanes(self) -> str | None:
        """Weights of the base and of experts have no batched form."""
        beside = {"bias": self.bias != "none", "modules_to_save": self.modules_to_save}
        keys = beside | {"target_parameters": self.target_parameters}
        return next((f"model.peft.{key}" for key, is_set in keys.items() if is_set), None)

    @property
    def outside_row_gradients(self) -> str | None:
        """Magnitudes and experts are no layers that Opacus knows."""
        keys = {"use_dora": self.use_dora, "target_parameters": self.target_parameters}
        return next((f"model.peft.{key}" for key, is_set in keys.items() if is_set), None)

    @property
    def outside_gangs(self) -> str | None:
        """The keys that have not been tried under ZeRO."""
        keys = {"ranks": self.ranks, "use_dora": self.use_dora, "target_parameters": self.target_parameters}
        keys |= {"bias": self.bias != "none", "modules_to_save": self.modules_to_save}
        return next((f"model.peft.{key}" for key, is_set in keys.items() if is_set), None)

    @property
    def trains_base(self) -> str | None:
        """Biases too."""
        return "model.peft.bias" if self.bias != "none" else super().trains_base

    def lora_rank_of(self, client: int, seed: int) -> int | None:
        """The rank of a client; None where all have the recipe's."""
        if not self.ranks:
            return None
        drawn = rng(seed, 0, client, "rank").random()
        edges = accumulate(share.share for share in self.ranks)
        return next((s.r for s, edge in zip(self.ranks, edges, strict=True) if drawn < edge), self.ranks[-1].r)


@dataclass(frozen=True)
class IA3(Tuning):
    """A learned factor for each output of a layer, or input of a feed-forward one (arXiv 2205.05638).

    Without `targets` and `feedforward_modules` PEFT's own table by model type decides.

    The effect is linear in the factors, so the mean of the factors is the mean of the layers.
    """

    kind: Literal["ia3"] = "ia3"
    targets: Targets | None = None
    feedforward_modules: Targets | None = None
    modules_to_save: tuple[str, ...] | None = None

    peft_class: ClassVar[str] = "IA3Config"
    title: ClassVar[str] = "An IA3 adapter"

    @property
    def outside_lanes(self) -> str | None:
        """Saved modules have no batched form."""
        return self.trains_base


@dataclass(frozen=True)
class Vera(Tuning):
    """Two vectors for each layer around random matrices that all layers and clients share (arXiv 2310.11454).

    `projection_prng_key` draws the matrices; the weight changes by diag(b) B diag(d) A.

    The mean is that of the vectors b and of the vectors d. As with LoRA, the change of the weights, their product, is
    not averaged exactly; all clients have the same matrices.
    """

    kind: Literal["vera"] = "vera"
    r: int = 256
    targets: Targets = "all-linear"
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None

    peft_class: ClassVar[str] = "VeraConfig"
    title: ClassVar[str] = "A VeRA adapter"

    def __post_init__(self) -> None:
        at_least("model.peft", 1, r=self.r)
        below_one("model.peft", vera_dropout=self.vera_dropout)
        check_layers(self.layers_to_transform, self.targets)


@dataclass(frozen=True)
class LNTuning(Tuning):
    """Training of the norm layers alone (arXiv 2312.11420). Without `targets` PEFT's table by model type names them.

    The mean is that of the norms' weights.
    """

    kind: Literal["ln_tuning"] = "ln_tuning"
    targets: Targets | None = None
    modules_to_save: tuple[str, ...] | None = None

    peft_class: ClassVar[str] = "LNTuningConfig"
    title: ClassVar[str] = "An LN tuning adapter"
    adapts: ClassVar[str] = "norm"

    @property
    def outside_row_gradients(self) -> str | None:
        """Opacus knows norms."""
        return None

    @property
    def trains_base(self) -> str | None:
        """The norms are copies of the base's."""
        return 'model.peft.kind = "ln_tuning"'


@dataclass(frozen=True)
class Oft(Tuning):
    """A rotation of each layer's inputs, in blocks of `oft_block_size`, or `r` blocks (arXiv 2306.07280).

    Clients train the entries of skew-symmetric matrices, from which Cayley's transform makes the rotations. The mean
    of skew-symmetric matrices is skew-symmetric, so the mean model's layers are rotated too.
    """

    kind: Literal["oft"] = "oft"
    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    targets: Targets = "all-linear"
    block_share: bool = False
    use_cayley_neumann: bool = True
    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None

    peft_class: ClassVar[str] = "OFTConfig"
    title: ClassVar[str] = "An OFT adapter"

    def __post_init__(self) -> None:
        at_least("model.peft", 0, r=self.r, oft_block_size=self.oft_block_size)
        below_one("model.peft", module_dropout=self.module_dropout)
        check_layers(self.layers_to_transform, self.targets)
        if (self.r > 0) == (self.oft_block_size > 0):
            raise RunError("model.peft needs r (blocks of a layer) or oft_block_size above 0, and the other one at 0")


Adapters = Lora | IA3 | Vera | LNTuning | Oft | Prompt | Prefix | PromptWords | Projected | Seeds | Ends | FullTuning
