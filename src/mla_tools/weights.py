"""Weights in, weights out: the tables and ops of `convert` over a dict of arrays.

This is what a model file's `Model.sanitize` calls in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from mla_tools.architectures import Family
from mla_tools.errors import CheckpointError, Problem
from mla_tools.options import EmbedQ, Options
from mla_tools.plan import make_steps
from mla_tools.spec import Spec, spec_of
from mla_tools.transform import whole

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["sanitize"]


def sanitize(
    weights: Mapping[str, mx.array], config: Any, *, embed_q: EmbedQ = "source"
) -> dict[str, mx.array]:
    """Return the weights under the names and in the shapes of mlx-lm's class for this config.

    `weights` are arrays as `mx.load` gives them, lazy ones too: nothing is evaluated but the scales and
    indices whose values a format must check (E8M0 scales, GPTQ's g_idx and zero points). `config` is
    config.json as a dict, or a model class's ModelArgs. Tensors that the class has no place for
    (multi-token prediction, rotary buffers) are left out; packed weights stay packed wherever their
    last axis stays, and `embed_q` says what becomes of the K half of a quantized kv_b_proj. Float
    dtypes are kept; FP8 becomes bfloat16.

    Raises CheckpointError that lists every tensor that is unknown, missing, a duplicate or of another shape.
    """
    keys = asdict(config) if is_dataclass(config) and not isinstance(config, type) else dict(config)
    specs: dict[str, Spec] = {}
    problems = []
    for name, array in weights.items():
        spec = spec_of(array)
        if spec is None:
            problems.append(Problem(name, "no checkpoint holds this dtype", found=str(array.dtype)))
        else:
            specs[name] = spec
    made = make_steps(specs, keys, Options(embed_q=embed_q))
    if problems or made.problems:
        raise CheckpointError([*problems, *made.problems])
    result: dict[str, mx.array] = {}
    for step in made.steps:
        result |= whole(step, weights)
    if _is_untied(made.family, keys):
        result = {name: array for name, array in result.items() if not name.startswith("lm_head.")}
    return result


def _is_untied(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether `convert` writes an output head that the class of this config, being tied, has no place for."""
    tied = "tie_word_embeddings"
    return bool(family.numbers(config).get(tied)) and not family.rewritten(config).get(tied)
