"""Encode: how each tensor of the output is stored, and how exact it is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from mla_tools.codecs import Codec, Dense, Native, TargetCodec, part_name, repacking, stored_as
from mla_tools.errors import Problem
from mla_tools.names import short
from mla_tools.ops import Same
from mla_tools.options import EMBED_Q, Options
from mla_tools.plan.gathering import Group
from mla_tools.plan.matching import VisionTensor
from mla_tools.plan.steps import Exactness, Source, Step, Target
from mla_tools.quantization import QuantSpec, recipe_spec
from mla_tools.rules import Param
from mla_tools.spec import DType, Spec

__all__ = ["Encoded", "encode", "is_exempt"]


@dataclass
class Encoded:
    """The steps, and what config.json and the notes will say of them.

    `params`: what each target is in the model. `named`: the paths that config.json must name even where
    they are like the default. `overridden`: the overrides that decide on a module. `vision`: the names of
    copied vision tensors. `indivisible`: the paths that no group divides, by the group size and their width.
    """

    steps: list[Step] = field(default_factory=list)
    params: dict[str, Param] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)
    overridden: set[str] = field(default_factory=set)
    vision: set[str] = field(default_factory=set)
    indivisible: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class _Choice:
    """How a target is to be stored: as MLX quantizes it, in another format, or (None) in floats.

    `because`: the option that asks for it by name; then a group that does not divide is refused.
    """

    wanted: QuantSpec | TargetCodec | None
    because: str = ""
    named: bool = False


def encode(groups: Sequence[Group], vision: Sequence[VisionTensor], options: Options, layers: int) -> Encoded:
    """Return the steps that make the targets of complete applications, and of copied vision tensors.

    `layers` is their number in the model, by which predicates for single layers count.
    """
    made = Encoded()
    for each in vision:
        made.steps.append(_copied(each, made))
    for group in groups:
        made.steps.append(_step(group, options, layers, made))
    return made


def _copied(tensor: VisionTensor, made: Encoded) -> Step:
    """Return the step of a vision tensor: its bits, or its numbers where MLX has no such format."""
    source, name = tensor.source, tensor.name
    codec = Dense(source.spec.dtype)
    moved = source.codec == codec
    exactness = _exactness([source], {source.codec}, codec, source.spec.dtype, moved)
    if name in made.vision:
        cause = "The checkpoint mixes two layouts."
        made.problems.append(Problem(name, "duplicate", "one of them", cause=cause))
    made.vision.add(name)
    return Step(Same(), (source,), (Target(name, source.spec, codec, {"weight": name}, exactness, moved),))


def _step(group: Group, options: Options, layers: int, made: Encoded) -> Step:
    route, sources, op = group.route, group.sources, group.route.op
    specs = op.infer([source.spec for source in sources])
    codecs = {source.codec for source in sources}
    targets = []
    for output, (name, spec) in enumerate(zip(route.targets(group.key), specs, strict=True)):
        made.params[name] = route.param
        keeps = op.keeps_last_axis(output)
        codec, dtype = _choose(name, spec, route.param, keeps, codecs, options, layers, made)
        moved = keeps and all(one.quantized and repacking(one, codec) is not None for one in codecs)
        parts = {part: part_name(name, part) for part in codec.encoded(spec)}
        exactness = _exactness(sources, codecs, codec, dtype, moved)
        targets.append(Target(name, Spec(spec.shape, dtype), codec, parts, exactness, moved))
    return Step(op, sources, tuple(targets))


def _choose(
    name: str,
    spec: Spec,
    param: Param,
    keeps_last_axis: bool,
    codecs: Collection[Codec],
    options: Options,
    layers: int,
    made: Encoded,
) -> tuple[TargetCodec, DType]:
    """Return how a target is stored, and the float dtype in which it is computed.

    `codecs` are those of the tensors that it is made of.
    """
    dtype, path = spec.dtype, short(name)
    if dtype.kind == "float" and param.cast and options.dtype is not None:
        dtype = options.dtype
    choice = _choice(path, param, keeps_last_axis, codecs, options, layers, made)
    wanted = choice.wanted
    if isinstance(wanted, QuantSpec) and not _divides(wanted, spec.width, options, choice):
        if choice.because:
            made.problems.append(_indivisible(path, spec.width, wanted, choice.because))
        else:
            group = options.quantize.group_size if options.quantize else wanted.group_size
            made.indivisible.setdefault((group, spec.width), []).append(path)
        wanted = None
    if wanted is None:
        return Dense(dtype), dtype
    if not isinstance(wanted, QuantSpec):
        return _in_format(wanted, spec, dtype)
    if choice.named:
        made.named.add(path)
    rows = spec.shape[-2] if param.global_scale and keeps_last_axis else None
    return stored_as(wanted, dtype, list(codecs), rows)


def _divides(wanted: QuantSpec, width: int, options: Options, choice: _Choice) -> bool:
    # mlx_lm.convert asks for the group size of -q, whatever a module's own is.
    given = options.quantize
    return wanted.divides(width) and (choice.because != "" or given is None or given.divides(width))


def _choice(
    path: str,
    param: Param,
    keeps_last_axis: bool,
    codecs: Collection[Codec],
    options: Options,
    layers: int,
    made: Encoded,
) -> _Choice:
    """Return what the options say of a module."""
    if not param.quantizable:
        return _Choice(None)
    if override := options.overriding(path):
        made.overridden.add(override[0])
        return _Choice(override[1], f"The override {override[0]!r} asks for it.")
    if options.format is not None:
        return _Choice(options.format)
    if options.quantize is not None and not is_exempt(param, options):
        return _quantized(path, param, layers, options)
    native = None if param.raw or options.dequantize else _common(codecs, param)
    if native is None:
        return _Choice(None)
    if keeps_last_axis:
        return _Choice(native.spec)
    if options.embed_q is None:
        return _Choice(EMBED_Q)
    if options.embed_q == "float":
        return _Choice(None)
    wanted = native.spec if options.embed_q == "source" else options.embed_q
    return _Choice(wanted, "embed_q asks for it (--embed-q).")


def _common(codecs: Collection[Codec], param: Param) -> Native | None:
    """Return a form in which MLX holds the numbers of all these formats in one tensor, if it has one."""
    found = [codec.native for codec in codecs]
    first = found[0]
    if first is None or any(native is None or native.spec != first.spec for native in found):
        return None
    global_scale = any(native is not None and native.global_scale for native in found)
    return first if param.global_scale or not global_scale else None


def _quantized(path: str, param: Param, layers: int, options: Options) -> _Choice:
    """Return what -q says of a module, and whether config.json must name it even if it is the default."""
    assert options.quantize is not None
    if options.quant_predicate:
        group = options.quantize.group_size
        return _Choice(recipe_spec(options.quant_predicate, path, layers, group), named=True)
    if param.spec is not None:
        return _Choice(param.spec, named=True)
    return _Choice(options.quantize)


def is_exempt(param: Param, options: Options) -> bool:
    """Whether the model class leaves a module in floats; like the class's widths, predicates override it."""
    return param.unquantized and options.quant_predicate is None


def _in_format(codec: TargetCodec, spec: Spec, dtype: DType) -> tuple[TargetCodec, DType]:
    """Return the codec where it can store a tensor of this spec, and floats where it cannot."""
    try:
        codec.encoded(spec)
    except ValueError:
        return Dense(dtype), dtype
    return codec, dtype


def _exactness(
    sources: Sequence[Source], codecs: Collection[Codec], codec: Codec, dtype: DType, moved: bool
) -> Exactness:
    quantized = any(one.quantized for one in codecs)
    nominal = {source.spec.dtype for source in sources}
    if dtype.kind == "int":
        # An op has looked whether the numbers fit.
        return "copied" if nominal == {dtype} else "repacked"
    if moved:
        # The form that holds a source's numbers exactly can be wider than the dtype of its scales.
        exact = {native.dtype for one in codecs if (native := one.native) is not None}
        if any(_narrower(dtype, other) for other in exact):
            return "rounded"
        return "copied" if all(one == codec for one in codecs) else "repacked"
    if codec.quantized:
        return "requantized" if quantized else "encoded"
    if quantized:
        return "decoded"
    if nominal == {dtype}:
        return "copied"
    return "rounded" if any(_narrower(dtype, other) for other in nominal) else "repacked"


def _narrower(dtype: DType, other: DType) -> bool:
    """Whether not every number of `other` is one of `dtype`; bf16 and f16 do not hold each other."""
    return dtype is not other and dtype is not DType.F32


def _indivisible(path: str, width: int, spec: QuantSpec, because: str) -> Problem:
    return Problem(
        path,
        f"cannot be quantized as {spec}",
        needed=f"a last axis that is a multiple of {spec.group_size}",
        found=f"{width}",
        cause=because,
    )
