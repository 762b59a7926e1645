"""The error of K for each encoding of kv_b_proj and of embed_q, beside what a plan says of it.

    python benchmarks/embed_q.py [bf16|f16|f32]

K [heads, nope, rank] of normally distributed numbers is encoded along rank, decoded, transposed and
encoded along nope, as a conversion does it. A line for each source, a column for each target; "expected"
is the figure of the plan and "-" what it does not say.
"""

from __future__ import annotations

import sys

import mlx.core as mx

from mla_tools.codecs import MlxQuantized
from mla_tools.precision import expected_error
from mla_tools.quantization import MODES, QuantSpec, dequantize
from mla_tools.spec import DType

SPECS = [QuantSpec(mode, b, g) for mode, (bits, groups) in MODES.items() for b in bits for g in groups]
HEADS, NOPE, RANK = 4, 128, 512


def main() -> None:
    """Measure and print."""
    mx.set_default_device(mx.cpu)
    dtype = DType[(sys.argv[1:] or ["bf16"])[0].upper()]
    targets = [*SPECS, None]
    print(f"{'':24}" + "".join(f"{column(target):>13}" for target in targets))
    for source in SPECS:
        expected = [expected_error(source, target, dtype) for target in targets]
        print(f"{source!s:24}" + "".join(f"{measured(source, t, dtype):13.5f}" for t in targets))
        print(f"{'  expected':24}" + "".join(f"{'-' if e is None else f'{e:.5f}':>13}" for e in expected))


def column(target: QuantSpec | None) -> str:
    return "float" if target is None else f"{target.mode[:6]} {target.bits}/{target.group_size}"


def measured(source: QuantSpec, target: QuantSpec | None, dtype: DType, seed: int = 0) -> float:
    """Return the error of K over its norm."""
    weights = mx.random.normal((HEADS, NOPE, RANK), key=mx.random.key(seed)).astype(getattr(mx, dtype.mlx))
    codec = MlxQuantized(source, dtype, source.has_biases)
    parts = codec.encode(weights)
    truth = exactly(parts, source).swapaxes(-1, -2)
    found = codec.decode(parts, 0, HEADS * NOPE, dtype).swapaxes(-1, -2)
    if target is not None:
        found = exactly(MlxQuantized(target, dtype, target.has_biases).encode(found), target)
    return (mx.linalg.norm(found.astype(mx.float32) - truth) / mx.linalg.norm(truth)).item()


def exactly(parts: dict[str, mx.array], spec: QuantSpec) -> mx.array:
    """Return the numbers that packed parts stand for, in float32."""
    floats = {k: v.astype(mx.float32) if mx.issubdtype(v.dtype, mx.floating) else v for k, v in parts.items()}
    return dequantize(floats, spec, mx.float32)


if __name__ == "__main__":
    main()
