"""What a codec is: the way one tensor is spelled in stored tensors.

The parts of a tensor are named by what has to be done to its name to find them: "weight" is the
tensor's own name, "_scale_inv" is appended to it, and any other word takes the place of its last
component. So the parts of `x.weight` are `x.weight`, `x.weight_scale_inv` and `x.scales`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mla_tools.errors import MlaToolsError
from mla_tools.spec import DType, Spec

if TYPE_CHECKING:
    import mlx.core as mx

    from mla_tools.codecs.mlx_quantized import MlxQuantized

__all__ = ["Claim", "Codec", "Module", "Rows", "Sample", "part_name", "refuse"]

Rows = tuple[int, int]


class Codec(Protocol):
    """How a tensor is stored. Instances are values: equal codecs mean equal spelling.

    Formats inherit from it for the members that most of them do not need to say anything about.
    """

    @property
    def word(self) -> str:
        """The name of the format for people: "bf16", "fp8 128x128", "affine 4-bit g64"."""
        ...

    @property
    def quantized(self) -> bool:
        """Whether the stored numbers are codes rather than floats."""
        ...

    @property
    def kept(self) -> MlxQuantized | None:
        """The form in which MLX holds exactly these numbers, or None where it has none.

        It is what a conversion without -q aims at, and `keep` makes it.
        """
        ...

    @property
    def convertible(self) -> MlxQuantized | None:
        """The form in which MLX can hold these numbers if it is asked for; `kept`, or one more daring."""
        return self.kept

    def encoded(self, spec: Spec) -> dict[str, Spec]:
        """Return the stored parts of a tensor of this spec."""
        ...

    def cut(self, start: int, stop: int) -> dict[str, Rows]:
        """Return which rows of each part hold rows start..stop of the tensor.

        Rows are counted with all axes but the last taken as one. A part that holds nothing to compute
        with is left out.
        """
        ...

    def decode(self, parts: Mapping[str, mx.array], start: int, stop: int, dtype: DType) -> mx.array:
        """Return rows start..stop as [rows, width] in a float dtype, from the rows that `cut` names."""
        ...

    def keep(self, parts: Mapping[str, mx.array], start: int, stop: int) -> dict[str, mx.array]:
        """Return rows start..stop in the form `convertible`, from the rows that `cut` names, not decoded.

        A global scale comes as one for each row, [rows, 1], so that ops can treat it like any part;
        `MlxQuantized.joined` makes one for each expert of it.
        """
        ...

    def check(self, parts: Mapping[str, mx.array]) -> None:
        """Raise MlaToolsError for a scale that nothing can be multiplied with: NaN, infinity.

        Evaluates the scales among the parts, so it is called where data has just been read, before
        `decode` and `keep`. These refuse by themselves what they would take for another number.
        """
        del parts

    def encode(self, array: mx.array) -> dict[str, mx.array]:
        """Return the parts of an array, whose dtype is the one to compute in.

        For MLX's formats this is what a conversion writes; for the others it serves samples and tests,
        and simple rounding to the nearest code is enough.
        """
        ...

    def encode_now(self, array: mx.array) -> dict[str, mx.array]:
        """Return what `encode` does, perhaps evaluated, where that is sooner done."""
        return self.encode(array)


@dataclass(frozen=True)
class Sample:
    """A format as samples are written in it: the codec of the linear layers, the float dtype of the
    rest, the section that such checkpoints have in config.json, and the experts' codec if it is another."""

    codec: Codec
    dtype: DType
    section: Mapping[str, object] | None = None
    experts: Codec | None = None


@dataclass(frozen=True)
class Module:
    """What a codec sees: the stored tensors of one module, by the last component of their names.

    `width` is the last axis that the table expects of the module's weight, which is what tells 4 bits
    in groups of 64 from 8 bits in groups of 32. `quantization` is the config's own section on it.
    """

    leaves: Mapping[str, Spec]
    width: int | None
    quantization: Mapping[str, object]


@dataclass(frozen=True)
class Claim:
    """A codec's claim: these leaves together are this tensor."""

    leaf: str
    spec: Spec
    codec: Codec
    parts: Mapping[str, str]


def part_name(tensor: str, part: str) -> str:
    """Return the name under which a part of a tensor is stored."""
    if part == "weight":
        return tensor
    if part.startswith("_"):
        return tensor + part
    return tensor[: tensor.rfind(".") + 1] + part


def refuse(numbers: mx.array, part: str, stored: mx.array | None = None) -> None:
    """Raise MlaToolsError if one of the scales in a part is no finite number.

    `stored` are the scales as the checkpoint has them, where `numbers` are made from them. Evaluates both.
    """
    import mlx.core as mx

    if mx.all(mx.isfinite(numbers)).item():
        return
    first = mx.argmin(mx.isfinite(numbers).reshape(-1))
    found = (numbers if stored is None else stored).reshape(-1)[first].item()
    raise MlaToolsError(
        f"{part_name('weight', part)} holds {found}, which is no scale; the checkpoint is damaged"
    )
