"""What a codec is: how stored tensors hold one tensor.

It has two halves. Every format can be read: `Codec` says what its parts are, which rows of them hold which
rows of the tensor, and what numbers they mean. A format that can be written, too, is a `TargetCodec`. Only
a format's own file knows which format it handles.

The parts of a tensor are named by what has to be done to its name to find them: "weight" is the
tensor's own name, "_scale_inv" is appended to it, and any other word takes the place of its last
component. So the parts of `x.weight` are `x.weight`, `x.weight_scale_inv` and `x.scales`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mla_tools.errors import MlaToolsError
from mla_tools.quantization import QuantSpec
from mla_tools.spec import DType, Spec

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = [
    "GLOBAL_SCALE",
    "NEUTRAL",
    "Claim",
    "Codec",
    "Module",
    "Native",
    "Quantized",
    "Rows",
    "Sample",
    "TargetCodec",
    "part_name",
    "recast",
    "refuse",
]

Rows = tuple[int, int]
Parts = Mapping[str, "mx.array"]

# The part of MLX's nvfp4 with one float32 number for each expert; layers of experts alone have it.
GLOBAL_SCALE = "global_scale"

# MLX multiplies nvfp4 codes and scales with global_scale / 2688, the largest E2M1 times the largest E4M3.
NEUTRAL = 6.0 * 448.0


@dataclass(frozen=True)
class Native:
    """The form in which MLX holds the numbers of a tensor: its mode, and the dtype of affine scales.

    `global_scale`: with a float32 scale for the whole tensor beside those of the groups. In the
    block-float modes `dtype` is bfloat16, what MLX decodes them to.
    """

    spec: QuantSpec
    dtype: DType = DType.BF16
    global_scale: bool = False


class Codec(Protocol):
    """How a tensor is stored, for reading. Instances are values: equal codecs mean equal storage.

    Formats inherit from it for the members that most of them do not need to say anything about.
    """

    @property
    def name(self) -> str:
        """The name of the format for people: "bf16", "fp8 128x128", "affine 4-bit g64"."""
        ...

    @property
    def quantized(self) -> bool:
        """Whether the stored numbers are codes rather than floats."""
        ...

    @property
    def native(self) -> Native | None:
        """The form in which MLX holds exactly these numbers, or None where it has none.

        It is what a conversion without -q aims at, and `to_native` makes it.
        """
        return None

    @property
    def on_request(self) -> Native | None:
        """The form in which MLX holds these numbers exactly, on request: nothing promises that it can.

        It is `native` unless a format says more; then `to_native` looks at each number.
        """
        return self.native

    @property
    def computes_in(self) -> DType | None:
        """The dtype in which `decode` computes where that is asked for; None: float32, rounded once."""
        return None

    @property
    def is_mlx(self) -> bool:
        """Whether the parts are those of a quantized module of MLX."""
        return False

    @property
    def is_unpacked_by_mlx_lm(self) -> bool:
        """Whether mlx_lm.load makes the parts of a quantized module of these, if their names stay."""
        return False

    def stacked(self, spec: Spec) -> Codec | None:
        """Return the codec of a stack of tensors of this spec, whose parts are stacks of theirs.

        It gives the same numbers, bit for bit. None where there is no such codec.
        """
        del spec
        return None

    def encoded(self, spec: Spec) -> dict[str, Spec]:
        """Return the stored parts of a tensor of this spec; ValueError where it cannot be stored so."""
        ...

    def cut(self, start: int, stop: int) -> dict[str, Rows]:
        """Return which rows of each part hold rows start..stop of the tensor.

        Rows are counted with all axes but the last taken as one. A part that holds nothing to compute
        with is left out.
        """
        ...

    def decode(self, parts: Parts, start: int, stop: int, dtype: DType) -> mx.array:
        """Return rows start..stop as [rows, width] in a float dtype, from the rows that `cut` names."""
        ...

    def to_native(self, parts: Parts, start: int, stop: int) -> dict[str, mx.array]:
        """Return rows start..stop in the form `on_request`, from the rows that `cut` names, not decoded.

        A global scale comes as one for each row, [rows, 1], so that ops can treat it like any part;
        `TargetCodec.finish` makes of it what is stored.
        """
        raise TypeError(f"MLX has no form of {self.name}")

    def check(self, parts: Parts) -> None:
        """Raise MlaToolsError for a scale that nothing can be multiplied with: NaN, infinity.

        Evaluates the scales among the parts, so it is called where data has just been read, before
        `decode` and `to_native`. These refuse by themselves what they would take for another number.
        """
        del parts

    def declared(self, config: Mapping[str, Any]) -> Callable[[Sequence[str]], str | None] | None:
        """Return a function that compares config.json with a tensor in this format, or None.

        The function takes the names that the module may have in config.json. It returns what config.json says
        of the module, or None if that is this format. There is no function if config.json says nothing of it.
        """
        del config
        return None


@dataclass(frozen=True)
class Quantized:
    """What config.json has to say of an output: which module is stored how.

    `codecs`: by path, those of quantized weights. `asked`: the spec that the user gave for all, if any.
    `moved`: paths whose rows were taken over from the source. `named`: paths that are always named.
    `floats`: paths that could be quantized and are not. `copied`: names of stored tensors that were copied
    without a look into them. `source`: the section on quantization that MLX wrote into the source's config.
    """

    codecs: Mapping[str, TargetCodec]
    asked: QuantSpec | None = None
    moved: Collection[str] = ()
    named: Collection[str] = ()
    floats: Sequence[str] = ()
    copied: Collection[str] = ()
    source: Mapping[str, Any] = field(default_factory=dict)


class TargetCodec(Codec, Protocol):
    """How a tensor is stored, for writing too."""

    @property
    def rows_together(self) -> int:
        """How many rows share a scale: rows are encoded from a multiple of this on, and up to one."""
        return 1

    def encode(self, array: mx.array) -> dict[str, mx.array]:
        """Return the parts of rows [..., rows, width], whose dtype is the one to compute in."""
        ...

    def encode_now(self, array: mx.array) -> dict[str, mx.array]:
        """Return what `encode` does, perhaps evaluated, where that is sooner done."""
        return self.encode(array)

    def finish(self, parts: Parts, start: int, spec: Spec) -> dict[str, mx.array]:
        """Return the parts as they are stored, of rows from `start` on of a tensor of this spec."""
        del start, spec
        return dict(parts)

    def offset(self, part: str, start: int, stored: Spec) -> int:
        """Return the byte of a part, stored as this spec, at which the rows from `start` on begin."""
        rows = self.cut(start, start + 1).get(part)
        return rows[0] * stored.row_bytes if rows else 0

    def takes(self, native: Native) -> bool:
        """Return whether `from_native` can write numbers in this form, without loss."""
        del native
        return False

    def widens(self, native: Native) -> bool:
        """Return whether the float parts of a source should be float32 before `to_native` is called."""
        del native
        return False

    def from_native(self, parts: Parts, native: Native, rows: int) -> dict[str, mx.array]:
        """Return the parts of so many rows in MLX's form as parts of this format, not decoded."""
        raise TypeError(f"{self.name} does not take {native.spec}, {rows} rows of {', '.join(parts)}")

    def in_dtype(self, dtype: DType) -> TargetCodec:
        """Return the codec whose scales have this float dtype instead, where they are floats."""
        del dtype
        return self

    def working_bytes(self, elements: int, nbytes: int) -> int:
        """Return the memory that `encode_now` takes beyond its floats, of `nbytes` each, and the result."""
        del elements, nbytes
        return 0

    def config(self, found: Quantized) -> dict[str, Any]:
        """Return the keys of config.json that say how the modules of an output in this format are stored."""
        del found
        return {}


@dataclass(frozen=True)
class Sample:
    """A format as samples are written in it: the codec of the linear layers, the float dtype of the
    rest, the section that such checkpoints have in config.json, and the experts' codec if it is another."""

    codec: TargetCodec
    dtype: DType
    section: Mapping[str, object] | None = None
    experts: TargetCodec | None = None


@dataclass(frozen=True)
class Module:
    """What a codec sees: the stored tensors of one module, by the last component of their names.

    `width` is the last axis that the table expects of the module's weight, which is what tells 4 bits
    in groups of 64 from 8 bits in groups of 32. `quantization` is the config's own section on it.
    """

    leaves: Mapping[str, Spec]
    width: int | None
    quantization: Mapping[str, object]


class Claim(NamedTuple):
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


def recast(parts: Parts, dtype: DType) -> dict[str, mx.array]:
    """Return parts with those that are floats, scales and biases, in another float dtype."""
    import mlx.core as mx

    wanted = getattr(mx, dtype.mlx)
    return {
        part: array.astype(wanted) if mx.issubdtype(array.dtype, mx.floating) else array
        for part, array in parts.items()
    }


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
        f"{part_name('weight', part)} holds {found}, which is not a valid scale; the checkpoint is damaged"
    )
