"""Weights in, weights out: the tables and ops of `convert` over a dict of arrays.

This is what a model file's `Model.sanitize` calls in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from mla_tools.architectures import family_of
from mla_tools.errors import CheckpointError, Problem, UsageError
from mla_tools.files.checkpoint import no_collector
from mla_tools.ops import Same
from mla_tools.options import EmbedQ, MissingBiases, Options
from mla_tools.plan import Step, Steps, make_steps
from mla_tools.plan.config import quantization_keys
from mla_tools.spec import Spec, spec_of
from mla_tools.transform import whole

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["as_converted", "quantization_of", "sanitize"]


def sanitize(
    weights: Mapping[str, mx.array],
    config: Any,
    *,
    embed_q: EmbedQ | None = "source",
    packed: bool = True,
    strict: bool = False,
    missing_biases: MissingBiases | None = None,
) -> dict[str, mx.array]:
    """Return the weights under the names and in the shapes of mlx-lm's class for this config.

    `weights` are arrays as `mx.load` gives them, lazy ones too: nothing is evaluated but the scales and
    indices whose values a format must check (E8M0 scales, GPTQ's g_idx and zero points). `config` is
    config.json as a dict, or a model class's ModelArgs. They may be some of a checkpoint's weights, or
    none: what can be made of them is made. Tensors that the class has no place for (multi-token
    prediction, rotary buffers) are left out, and those that no rule names stay as they are. With `strict`,
    all weights must be there and no others.

    Packed weights stay packed wherever their last axis stays, and `embed_q` says what becomes of the K half
    of a quantized kv_b_proj; None is what `convert` does by default. The model must then be quantized as
    `quantization_of` says. With `packed=False`, only MLX's own quantization stays packed, which config.json
    names; other formats are decoded. AWQ tensors that keep their name stay as stored, because `mlx_lm.load`
    unpacks these after `sanitize`. Float dtypes are kept; FP8 becomes bfloat16.

    Raises CheckpointError that lists every tensor that is a duplicate or of another shape, or lacks
    scales, or affine biases unless `missing_biases` is "zero", and every set that is there in part, such as
    3 of 4 experts; with `strict` also every tensor that is unknown or missing.
    """
    keys = _keys(config)
    options = Options(embed_q=embed_q, missing_biases=missing_biases)
    result = as_converted(weights, keys, options, packed=packed, strict=strict)
    if _is_untied(keys):
        result = {name: array for name, array in result.items() if not name.startswith("lm_head.")}
    return result


@no_collector()
def as_converted(
    weights: Mapping[str, mx.array],
    config: Mapping[str, Any],
    options: Options = Options(),
    *,
    packed: bool = True,
    strict: bool = False,
) -> dict[str, mx.array]:
    """Return what `sanitize` does, but for the class of the config that `convert` would write.

    The two differ where that class has an output head of its own, and the one of `config` is tied.
    """
    made = _steps(weights, config, options, packed=packed, strict=strict)
    result: dict[str, mx.array] = {}
    for step in made.steps:
        if packed or not _is_unpacked_later(step):
            result |= whole(step, weights)
        else:
            result |= {name: weights[name] for name in step.sources[0].parts.values()}
    return result | {name: weights[name] for name in made.foreign}


def quantization_of(weights: Mapping[str, mx.array], config: Any) -> dict[str, Any] | None:
    """Return what `quantization` in config.json must say of weights that `sanitize` returned.

    It is {"group_size", "bits", "mode"} with an entry for each module that differs; None if no weight is
    quantized. `mlx_lm.load` quantizes a model by it. `config` is that of `sanitize`.

    Raises CheckpointError as `sanitize` does.
    """
    keys = _keys(config)
    encoded = _steps(weights, keys, Options(embed_q="source")).encoded
    found = quantization_keys(encoded, Options(), keys.get("quantization"))
    quantization: dict[str, Any] | None = found.get("quantization")
    return quantization


def _keys(config: Any) -> dict[str, Any]:
    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    if not isinstance(config, Mapping):
        raise UsageError(
            f"config: give config.json as a dict, or a model's ModelArgs, not {type(config).__name__}"
        )
    return dict(config)


def _steps(
    weights: Mapping[str, mx.array],
    config: Mapping[str, Any],
    options: Options,
    *,
    packed: bool = True,
    strict: bool = False,
) -> Steps:
    """Return what becomes of each weight; CheckpointError if there are problems."""
    specs: dict[str, Spec] = {}
    problems = []
    for name, array in weights.items():
        spec = spec_of(array)
        if spec is None:
            problems.append(Problem(name, "no checkpoint holds this dtype", found=str(array.dtype)))
        else:
            specs[name] = spec
    made = make_steps(specs, config, options, partial=not strict, packed=packed)
    if problems or made.problems:
        raise CheckpointError([*problems, *made.problems])
    return made


def _is_unpacked_later(step: Step) -> bool:
    """Whether mlx_lm.load makes the target of the source's own parts."""
    stays = step.op == Same() and step.sources[0].name == step.targets[0].name
    return stays and all(codec.is_unpacked_by_mlx_lm for codec in step.codecs)


def _is_untied(config: Mapping[str, Any]) -> bool:
    """Whether `convert` writes an output head that the class of this config, being tied, has no place for."""
    family, tied = family_of(config), "tie_word_embeddings"
    return bool(family.numbers(config).get(tied)) and not family.rewritten(config).get(tied)
