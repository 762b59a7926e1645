"""The notes of a plan: worth knowing, but not problems."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mla_tools.architectures import Family
from mla_tools.codecs import Codec
from mla_tools.errors import clipped
from mla_tools.names import fold_indices, fold_names
from mla_tools.ops import Indices, Same
from mla_tools.options import Options
from mla_tools.plan.config import brief
from mla_tools.plan.encoding import Encoded, is_exempt
from mla_tools.precision import expected_error
from mla_tools.spec import DType
from mla_tools.steps import Step

__all__ = ["EmbedQCost", "embed_q_costs", "notes"]


# The paths of modules that look up rows, which no input gives a dtype to.
_EMBEDDING = re.compile(r"(^|\.)(embed|embed_tokens|word_embeddings|embedders\.\d+)$")


@dataclass(frozen=True)
class EmbedQCost:
    """What the choice of --embed-q costs for tensors of one encoding: bytes, and the expected error of K.

    The errors are parts of the norm of K: of this choice, and of "source" and "float". None: not measured.
    """

    before: str
    after: str
    tensors: int
    nbytes: int
    error: float | None
    error_as_source: float | None
    error_as_float: float | None


def notes(
    encoded: Encoded,
    family: Family,
    config: Mapping[str, Any],
    options: Options,
    dropped: set[int],
    bare: set[str],
    *,
    whole: bool,
) -> list[str]:
    """Return what is worth saying about a plan.

    `dropped` are the layers that were dropped as MTP layers, `bare` the tensors whose missing biases are
    zeros, and `whole` says that there are no problems.
    """
    return [
        *family.remarked(config),
        *_own_class(family),
        *_mtp_layers(family, config, dropped),
        *(_nothing_renamed(encoded.steps) if whole else ()),
        *_unquantized(encoded, options),
        *_vision(encoded, family),
        *_requantized(encoded.steps, options),
        *_narrower_integers(encoded.steps),
        *_narrower_embeddings(encoded.steps, options),
        *_disagreeing_sections(config),
        *_disagreeing_tensors(encoded.steps, config),
        *_unannounced(encoded.steps, config),
        *(_cost_text(cost, options) for cost in embed_q_costs(encoded.steps)),
        *_idle_embed_q(encoded, options),
        *_zero_biases(encoded.steps, options, bare),
        *_global_scales(encoded, options),
    ]


def _own_class(family: Family) -> Iterator[str]:
    if family.runtime:
        yield (
            f"the output brings its model class in {family.model_file}, and mlx-lm runs that only with"
            " --trust-remote-code (trust_remote_code=True in Python)"
        )


def _mtp_layers(family: Family, config: Mapping[str, Any], layers: set[int]) -> Iterator[str]:
    """Note a num_nextn_predict_layers that is not the number of such layers; they are dropped anyway."""
    key = "num_nextn_predict_layers"
    said = family.numbers(config).get(key)
    if layers and said is not None and said != len(layers):
        yield (
            f"{key} is {clipped(said)} in config.json, but the checkpoint has {len(layers)}: layers"
            f" {fold_indices(layers)}, dropped"
        )


def _nothing_renamed(steps: Sequence[Step]) -> Iterator[str]:
    if steps and all(_is_there(step) for step in steps):
        yield "in mlx-lm's own layout already: no tensor is renamed or reshaped"


def _is_there(step: Step) -> bool:
    names = [source.name for source in step.sources]
    return isinstance(step.op, Same | Indices) and names == [target.name for target in step.targets]


def _unquantized(encoded: Encoded, options: Options) -> Iterator[str]:
    exempt = [
        target.label
        for step in encoded.steps
        for target in step.targets
        if options.quantize is not None
        and (param := encoded.params.get(target.name)) is not None
        and param.quantizable
        and not target.codec.quantized
        and is_exempt(param, options)
        and not options.overriding(target.label)
    ]
    if exempt:
        folded = ", ".join(fold_names(exempt))
        yield f"unquantized, because mlx-lm's model class does not quantize it: {folded}"
    for (group, width), paths in encoded.indivisible.items():
        yield (
            f"unquantized, because the group size {group} does not divide its last axis of {width}: "
            + ", ".join(fold_names(paths))
        )


def _vision(encoded: Encoded, family: Family) -> Iterator[str]:
    if encoded.vision:
        modules = ", ".join(sorted({name.partition(".")[0] for name in encoded.vision}))
        yield f"copied unchanged, {len(encoded.vision):,} vision tensors under {modules}: {family.vision}"


def _requantized(steps: Sequence[Step], options: Options) -> Iterator[str]:
    words = Counter(target.exactness for step in steps for target in step.targets)
    if (options.quantize or options.format) and words["requantized"]:
        yield (
            f"requantized, from a quantized source to another quantization: {words['requantized']:,} of"
            f" {words.total():,} tensors"
        )


def _narrower_integers(steps: Sequence[Step]) -> Iterator[str]:
    """Note which integers are written in another dtype than the checkpoint's."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for step in steps:
        for target in step.targets:
            before = step.sources[0].spec.dtype
            if target.spec.dtype.kind == "int" and before is not target.spec.dtype:
                found[before.name, target.spec.dtype.name].append(target.label)
    for (before_name, after), names in found.items():
        yield (
            f"stored as {before_name} and written as {after}, which the model class reads; a number that"
            f" does not fit ends the conversion: {', '.join(fold_names(names))}"
        )


def _narrower_embeddings(steps: Sequence[Step], options: Options) -> Iterator[str]:
    """Note which embeddings MLX decodes to bfloat16 although floats are to be float32."""
    found: dict[str, list[str]] = defaultdict(list)
    for target in (target for step in steps for target in step.targets):
        native = target.codec.native
        if native is not None and native.spec.mode != "affine" and _EMBEDDING.search(target.label):
            found[native.spec.mode].append(target.label)
    for mode, names in found.items() if options.dtype is DType.F32 else ():
        yield (
            f"MLX decodes an embedding in {mode} to bfloat16, not to float32: {', '.join(fold_names(names))};"
            " --q-override embed=float keeps it in float32"
        )


def _disagreeing_sections(config: Mapping[str, Any]) -> Iterator[str]:
    """Note two sections on MLX's quantization that differ."""
    given, other = config.get("quantization"), config.get("quantization_config")
    if not isinstance(given, Mapping):
        return
    # With a quant_method it is the section of another format, which the codecs read.
    if isinstance(other, Mapping) and "quant_method" not in other and other != given:
        yield (
            f"quantization ({brief(given)}) and quantization_config ({brief(other)}) in config.json"
            " disagree; mlx_lm.load uses the first. The output describes the tensors as they are"
        )


def _disagreeing_tensors(steps: Sequence[Step], config: Mapping[str, Any]) -> Iterator[str]:
    """Note what config.json says of tensors that are stored differently."""
    wrong: dict[tuple[str, str], list[str]] = defaultdict(list)
    readers = {codec: codec.declared(config) for step in steps for codec in step.codecs}
    for step in steps:
        if any(readers[codec] for codec in step.codecs):
            paths = [target.label for target in step.targets]
            for source in step.sources:
                reader = readers[source.codec]
                said = reader((source.label, *paths)) if reader else None
                if said is not None:
                    wrong[said, source.codec.name].append(source.label)
    for (said, name), names in wrong.items():
        yield f"{said} but the tensors are {name}, and this is used: " + ", ".join(fold_names(names))


def _unannounced(steps: Sequence[Step], config: Mapping[str, Any]) -> Iterator[str]:
    """Note tensors that MLX has quantized where config.json says nothing of it."""
    if config.get("quantization") or config.get("quantization_config"):
        return
    codecs = dict.fromkeys(codec for step in steps for codec in step.codecs if codec.is_mlx)
    if not codecs:
        return
    names = [
        target.label
        for step in steps
        if any(codec.is_mlx for codec in step.codecs)
        for target in step.targets
    ]
    yield (
        f"config.json names no quantization, but these tensors have one"
        f" ({', '.join(sorted(codec.name for codec in codecs))}), so that mlx_lm.load cannot load them:"
        f" {', '.join(fold_names(names))}. mlx_lm.convert -d and mlx_lm.fuse --dequantize leave embed_q,"
        f" unembed_out and wo_a so. mla-sanitize convert writes a folder that loads, with -d one in floats"
    )


def embed_q_costs(steps: Sequence[Step]) -> tuple[EmbedQCost, ...]:
    """Return what becomes of packed rows that have to be decoded because their axis changes."""
    sizes: dict[tuple[Codec, Codec, DType], list[int]] = defaultdict(list)
    for step in steps:
        source = step.sources[0].codec
        for output, target in enumerate(step.targets):
            native = source.native
            if native is not None and not native.global_scale and not step.op.keeps_last_axis(output):
                nbytes = sum(spec.nbytes for spec in target.stored().values())
                sizes[source, target.codec, target.spec.dtype].append(nbytes)
    return tuple(_cost(source, target, dtype, each) for (source, target, dtype), each in sizes.items())


def _cost(source: Codec, target: Codec, dtype: DType, sizes: Sequence[int]) -> EmbedQCost:
    native, made = source.native, target.native
    assert native is not None
    in_dtype = source.computes_in is dtype
    as_made, as_source, as_float = (
        expected_error(native.spec, spec, dtype, decoded_in_dtype=in_dtype)
        for spec in (made.spec if made else None, native.spec, None)
    )
    return EmbedQCost(source.name, target.name, len(sizes), sum(sizes), as_made, as_source, as_float)


def _idle_embed_q(encoded: Encoded, options: Options) -> Iterator[str]:
    """Note that a choice for embed_q changes nothing."""
    if options.embed_q is None or encoded.embed_q:
        return
    if options.quantize or options.format:
        why = "-q decides how embed_q is stored; use --q-override embed_q=... to choose"
    else:
        why = "no quantized kv_b_proj stays quantized"
    yield f"--embed-q has no effect: {why}"


def _zero_biases(steps: Sequence[Step], options: Options, bare: set[str]) -> Iterator[str]:
    """Note how many tensors get biases of zero, and which."""
    if options.missing_biases is None:
        return
    names = [source.label for step in steps for source in step.sources if source.name in bare] if bare else []
    if not names:
        yield "--missing-biases has no effect: no affine tensor lacks biases"
        return
    count = f"{len(names):,} tensor{'s' if len(names) > 1 else ''}"
    folded = ", ".join(fold_names(names))
    yield f"{count} without biases, which are taken as zeros (--missing-biases): {folded}"


def _cost_text(cost: EmbedQCost, options: Options) -> str:
    flag = "--q-override embed_q=..." if options.quantize else "--embed-q"
    if cost.error is None:
        error = "not measured for this source"
    else:
        error = (
            f"about {cost.error:.2g} of its norm (source: {cost.error_as_source:.2g}, "
            f"float: {cost.error_as_float:.2g})"
        )
    return (
        f"the K half of kv_b_proj changes its axis: {cost.before} is decoded and stored as {cost.after}, "
        f"{cost.nbytes:,} bytes in {cost.tensors} tensors; expected error of K: {error} ({flag})"
    )


def _global_scales(encoded: Encoded, options: Options) -> Iterator[str]:
    """Note which tensors keep their global scale, and which are decoded because MLX has none there."""
    held = decoded = 0
    for step in encoded.steps:
        native = step.sources[0].codec.native
        for target in step.targets:
            made, param = target.codec.native, encoded.params.get(target.name)
            held += made is not None and made.global_scale
            lacks = native is not None and native.global_scale and not (param and param.global_scale)
            decoded += lacks and target.exactness == "decoded" and not options.overriding(target.label)
    if held:
        yield (
            f"nvfp4 with a global scale: {_tensors(held)} of experts keep codes and E4M3 scales bit for bit;"
            f" the global scale becomes MLX's global_scale, equal to within one unit of float32; MLX"
            f" multiplies with it only on a GPU"
        )
    if decoded and not options.dequantize:
        yield (
            f"nvfp4 with a global scale: {_tensors(decoded)} decoded to floats, because MLX has no such scale"
            " outside of experts; multiplied into the E4M3 scales, it would make those of weights below 0.09"
            " subnormal, in steps of 2^-9"
        )


def _tensors(count: int) -> str:
    return f"{count:,} tensor" + ("" if count == 1 else "s")
