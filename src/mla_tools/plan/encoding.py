"""Encode: how each tensor of the output is stored, and how exact it is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from mla_tools.codecs import Codec, Dense, Native, TargetCodec, stored_as
from mla_tools.errors import Problem
from mla_tools.names import short
from mla_tools.ops import Same
from mla_tools.options import EMBED_Q, Options
from mla_tools.plan.gathering import Group
from mla_tools.plan.matching import VisionTensor
from mla_tools.precision import expected_error
from mla_tools.quantization import QuantSpec, recipe_spec
from mla_tools.rules import Param
from mla_tools.spec import DType, Spec
from mla_tools.steps import Step, Target, exactness, made_by

__all__ = ["Encoded", "encode", "is_exempt"]


@dataclass
class Encoded:
    """The steps, and what config.json and the notes will say of them.

    `params`: what each target is in the model. `named`: the paths that config.json must name even where
    they are like the default. `overridden`: the overrides that decide on a module. `vision`: the names of
    copied vision tensors. `embed_q`: whether the choice for embed_q decided on a tensor. `indivisible`: the
    paths that no group divides, by the group size and their width.
    """

    steps: list[Step] = field(default_factory=list)
    params: dict[str, Param] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)
    overridden: set[str] = field(default_factory=set)
    vision: set[str] = field(default_factory=set)
    embed_q: bool = False
    indivisible: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class _Choice:
    """How a target is to be stored: as MLX quantizes it, in another format, or (None) in floats.

    `because`: the option that asks for it by name; then a group that does not divide is refused.
    `override` is the pattern of the override that decides, and `named` whether config.json must name it.
    `all`: what -q asks of all modules, where that is why this one is quantized; its group must divide too.
    `embed_q`: the choice for embed_q decides.
    """

    wanted: QuantSpec | TargetCodec | None
    because: str = ""
    override: str = ""
    named: bool = False
    all: QuantSpec | None = None
    embed_q: bool = False


@dataclass(frozen=True)
class _Stored:
    """How a target is stored, and the float dtype in which it is computed.

    `group` is the size of the groups that do not divide its rows, where it is in floats because of that.
    """

    codec: TargetCodec
    dtype: DType
    choice: _Choice
    group: int | None = None


def encode(
    groups: Sequence[Group],
    vision: Sequence[VisionTensor],
    options: Options,
    layers: int,
    *,
    packed: bool = True,
) -> Encoded:
    """Return the steps that make the targets of complete applications, and of copied vision tensors.

    `layers` is their number in the model, by which predicates for single layers count. Without `packed`, a
    format that is not MLX's own is decoded.
    """
    made = Encoded()
    for each in vision:
        made.steps.append(_copied(each, made))
    for group in groups:
        made.steps.append(_step(group, options, layers, made, packed=packed))
    return made


def _copied(tensor: VisionTensor, made: Encoded) -> Step:
    """Return the step of a vision tensor: its bits, or its numbers where MLX has no such format."""
    source, name = tensor.source, tensor.name
    codec = Dense(source.spec.dtype)
    moved = source.codec == codec
    word = exactness([source], codec, source.spec.dtype, moved=moved)
    if name in made.vision:
        cause = "The checkpoint mixes two layouts."
        made.problems.append(Problem(name, "duplicate", "one of them", cause=cause))
    made.vision.add(name)
    return Step(Same(), (source,), (Target(name, source.spec, codec, {"weight": name}, word, moved),))


def _step(group: Group, options: Options, layers: int, made: Encoded, *, packed: bool) -> Step:
    route, sources, op = group.route, group.sources, group.route.op
    specs = op.infer([source.spec for source in sources])
    codecs = list({source.codec: None for source in sources})
    targets = []
    for output, (name, spec) in enumerate(zip(route.targets(group.key), specs, strict=True)):
        path, keeps = short(name), op.keeps_last_axis(output)
        spec = Spec(spec.shape, _dtype(spec, route.param, options))
        choice = _choice(path, spec, route.param, keeps, codecs, options, layers, packed=packed)
        stored = _stored(choice, spec, route.param, keeps, codecs)
        _note(made, path, stored, spec.width)
        made.params[name] = route.param
        targets.append(made_by(op, output, sources, name, Spec(spec.shape, stored.dtype), stored.codec))
    return Step(op, sources, tuple(targets))


def _note(made: Encoded, path: str, stored: _Stored, width: int) -> None:
    """Add what is worth saying of a target to what the stage returns."""
    choice = stored.choice
    made.embed_q = made.embed_q or choice.embed_q
    if choice.override:
        made.overridden.add(choice.override)
    if choice.named and stored.codec.quantized:
        made.named.add(path)
    if stored.group is None:
        return
    if choice.because:
        made.problems.append(_indivisible(path, width, choice))
    else:
        made.indivisible.setdefault((stored.group, width), []).append(path)


def _dtype(spec: Spec, param: Param, options: Options) -> DType:
    """Return the dtype in which a target is computed."""
    if spec.dtype.kind == "float" and param.cast and options.dtype is not None:
        return options.dtype
    return spec.dtype


def _stored(
    choice: _Choice, spec: Spec, param: Param, keeps_last_axis: bool, codecs: Sequence[Codec]
) -> _Stored:
    """Return how a target of this spec is stored; `codecs` are those of the tensors that it is made of."""
    wanted = choice.wanted
    floats = _Stored(Dense(spec.dtype), spec.dtype, choice)
    if isinstance(wanted, QuantSpec):
        # mlx_lm.convert asks for the group size of -q, whatever a module's own is.
        for group in (choice.all or wanted, wanted):
            if not group.divides(spec.width):
                return replace(floats, group=group.group_size)
        rows = spec.shape[-2] if param.global_scale and keeps_last_axis else None
        return _Stored(*stored_as(wanted, spec.dtype, codecs, rows), choice)
    if wanted is not None:
        try:
            wanted.encoded(spec)
        except ValueError:
            return floats
        return _Stored(wanted, spec.dtype, choice)
    return floats


def _choice(
    path: str,
    spec: Spec,
    param: Param,
    keeps_last_axis: bool,
    codecs: Sequence[Codec],
    options: Options,
    layers: int,
    *,
    packed: bool,
) -> _Choice:
    """Return what the options say of a module."""
    if not param.quantizable:
        return _Choice(None)
    if override := options.overriding(path):
        pattern, wanted = override
        return _Choice(wanted, f"The override {pattern!r} asks for it.", pattern)
    if options.format is not None:
        return _Choice(options.format)
    if options.quantize is not None and not is_exempt(param, options):
        return _quantized(path, param, layers, options)
    decoded = param.raw or options.dequantize or not (packed or all(codec.is_mlx for codec in codecs))
    native = None if decoded else _common(codecs, param)
    if native is None:
        return _Choice(None)
    if keeps_last_axis:
        return _Choice(native.spec)
    match options.embed_q:
        case None | "auto":
            return _Choice(_lossless(native.spec, spec, codecs), embed_q=True)
        case "float":
            return _Choice(None, embed_q=True)
        case "source":
            named = native.spec
        case named:
            pass
    return _Choice(named, "embed_q asks for it (--embed-q).", embed_q=True)


def _lossless(source: QuantSpec, spec: Spec, codecs: Sequence[Codec]) -> QuantSpec | None:
    """Return the smallest form that holds decoded rows of another axis without loss, `EMBED_Q` if none does.

    None stands for floats.
    """
    in_dtype = all(codec.computes_in is spec.dtype for codec in codecs)
    for wanted in (source, QuantSpec("mxfp8"), None):
        divides = wanted is None or wanted.divides(spec.width)
        if divides and expected_error(source, wanted, spec.dtype, decoded_in_dtype=in_dtype) == 0:
            return wanted
    return EMBED_Q


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
        spec = recipe_spec(options.quant_predicate, path, layers, group)
        return _Choice(spec, named=True, all=options.quantize)
    if param.spec is not None:
        return _Choice(param.spec, named=True, all=options.quantize)
    return _Choice(options.quantize, all=options.quantize)


def is_exempt(param: Param, options: Options) -> bool:
    """Whether the model class leaves a module in floats; like the class's widths, predicates override it."""
    return param.unquantized and options.quant_predicate is None


def _indivisible(path: str, width: int, choice: _Choice) -> Problem:
    spec = choice.wanted
    assert isinstance(spec, QuantSpec)
    return Problem(
        path,
        f"cannot be quantized as {spec}",
        needed=f"a last axis that is a multiple of {spec.group_size}",
        found=f"{width}",
        cause=choice.because,
    )
