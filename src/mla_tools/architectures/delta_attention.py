"""Kimi Delta Attention (KDA): linear attention over short convolutions, with a gate for what is forgotten."""

from __future__ import annotations

from mla_tools.architectures import blocks
from mla_tools.architectures.geometry import Geometry
from mla_tools.ops import Concat, Op, Same, SwapLastAxes, Then
from mla_tools.rules import HUB, Form, Param, Rule

__all__ = ["delta_attention"]


def delta_attention(
    prefix: str,
    hidden: int,
    heads: int,
    sizes: Geometry,
    where: blocks.Where,
    decay: Rule,
    *,
    conv: str,
    joined: bool = False,
    full: str = "",
    cast: bool = False,
) -> list[Rule]:
    """Return the rules of a KDA layer.

    `sizes` has the keys head_dim and short_conv_kernel_size, and `decay` is the rule of A_log, which each
    family shapes in its own way. `conv` ends what the class calls a convolution, which is [c, 1, k] in torch
    and [c, k, 1] in MLX; with `joined`, q, k and v are one there. `full` names the gates of full rank: f, g
    or both; the others are two projections, over head_dim numbers. `cast` is that of dt_bias.
    """
    size, kernel = sizes.dim("head_dim"), sizes.dim("short_conv_kernel_size", 4)
    inner = heads * size
    rules = []
    for names in ("qkv",) if joined else "qkv":
        for theirs, ours, shape in (("proj", "proj", (inner, hidden)), ("conv1d", conv, (inner, 1, kernel))):
            convolution = theirs == "conv1d"
            op: Op = SwapLastAxes() if convolution else Same()
            if joined:
                concat = Concat((inner,) * 3)
                op = Then(concat, op) if convolution else concat
            rules.append(
                Rule(
                    (f"{prefix}.{names}_{ours}.weight",),
                    (
                        Form(
                            HUB,
                            tuple(f"{prefix}.{name}_{theirs}.weight" for name in names),
                            (shape,) * len(names),
                            op,
                        ),
                    ),
                    where,
                    Param(quantizable=not convolution),
                )
            )
    for gate in "fg":
        if gate in full:
            rules += blocks.linear(f"{prefix}.{gate}_proj", (inner, hidden), where)
        else:
            rules += blocks.linear(f"{prefix}.{gate}_a_proj", (size, hidden), where)
            rules += blocks.linear(f"{prefix}.{gate}_b_proj", (inner, size), where)
    return [
        *rules,
        *blocks.linear(f"{prefix}.b_proj", (heads, hidden), where),
        *blocks.linear(f"{prefix}.o_proj", (hidden, inner), where),
        blocks.norm(f"{prefix}.o_norm", size, where),
        decay,
        blocks.param(f"{prefix}.dt_bias", (inner,), where, cast=cast),
    ]
