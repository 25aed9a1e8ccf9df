"""How a frozen base is held in few bits: transformers' options of two libraries, importable without either."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from engine.messages.errors import RunError

KEY = "model.quantize"
BLOCK, NESTED = 64, 256  # weights that share a scale in 4 bits, and scales that share theirs where they have 8
TABLES, NESTED_TABLES = 192, 1344  # bytes of a layer's tables and description, without and with such scales


def not_installed(library: str) -> RunError:
    """Makes the error that says how to get the library."""
    return RunError(f'{KEY} needs the library {library}, which is not installed: pip install "fedpost[{library}]"')


@dataclass(frozen=True)
class BitsAndBytes:
    """Linear layers in 4 bits (QLoRA, arXiv 2305.14314) or 8 (LLM.int8(), arXiv 2208.07339), by bitsandbytes.

    The keys and defaults are those of transformers' BitsAndBytesConfig; one of the `load_in` keys must be true. Without
    `llm_int8_skip_modules` all linear layers but the head are quantized.
    """

    kind: Literal["bitsandbytes"] = "bitsandbytes"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["fp4", "nf4"] = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: tuple[str, ...] | None = None

    config_class: ClassVar[str] = "BitsAndBytesConfig"

    def __post_init__(self) -> None:
        if self.load_in_4bit == self.load_in_8bit:
            raise RunError(f"{KEY} holds the base in 4 or in 8 bits: set one of load_in_4bit and load_in_8bit to true")
        bits, other = (4, "llm_int8_threshold") if self.load_in_4bit else (8, "bnb_4bit")
        for each in fields(self):
            if each.name.startswith(other) and getattr(self, each.name) != each.default:
                raise RunError(f"{KEY}.{each.name} means nothing with load_in_{bits}bit: leave it out")

    @property
    def outside_lanes(self) -> str | None:
        """LLM.int8() takes the columns that it does not quantize from the whole batch, which lanes share."""
        return f"{KEY}.load_in_8bit" if self.load_in_8bit else None

    def scale_bytes(self, weights: int, rows: int) -> float:
        """The bytes beside a layer's weights in 8 bits: a float32 for each row. In 4 bits, for each BLOCK of weights.

        With `bnb_4bit_use_double_quant` these have 8 bits, and a float32 for each NESTED of them.
        """
        if self.load_in_8bit:
            return 4 * rows
        scales = weights / BLOCK
        return scales + 4 * scales / NESTED + NESTED_TABLES if self.bnb_4bit_use_double_quant else 4 * scales + TABLES

    def options(self) -> dict[str, Any]:
        """The keyword arguments of transformers' configuration."""
        skipped = self.llm_int8_skip_modules
        values = vars(self) | {"llm_int8_skip_modules": None if skipped is None else list(skipped)}
        return {key: value for key, value in values.items() if key != "kind"}


@dataclass(frozen=True)
class TorchAo:
    """Linear layers in 8 bits, by torchao.

    `quant_type` names one of torchao's configurations. Without `modules_to_not_convert` all linear layers but the head
    are quantized.
    """

    kind: Literal["torchao"] = "torchao"
    quant_type: str = "Int8WeightOnlyConfig"
    modules_to_not_convert: tuple[str, ...] | None = None

    config_class: ClassVar[str] = "TorchAoConfig"
    outside_lanes: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        able = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig")
        if self.quant_type not in able:
            raise RunError(
                f"{KEY}.quant_type = {self.quant_type!r} is none on which adapters train here ({', '.join(able)}): "
                f'take one of them, or for 4 bits kind = "bitsandbytes" with load_in_4bit = true'
            )

    def scale_bytes(self, weights: int, rows: int) -> float:
        """The bytes beside a layer's weights: a float32 for each row."""
        return 4 * rows

    def options(self) -> dict[str, Any]:
        """The keyword arguments of transformers' configuration."""
        import torchao.quantization

        skipped = self.modules_to_not_convert
        quant_type = getattr(torchao.quantization, self.quant_type)()
        return {"quant_type": quant_type, "modules_to_not_convert": None if skipped is None else list(skipped)}


Quantize = BitsAndBytes | TorchAo
