"""MLX's codec for a native form, to look into what `to_native` makes."""

from __future__ import annotations

from mla_tools.codecs import MlxQuantized, Native

__all__ = ["mlx_form"]


def mlx_form(native: Native) -> MlxQuantized:
    """Return the codec of MLX's parts in this form; one without a global scale."""
    return MlxQuantized(native.spec, native.dtype, native.spec.has_biases)
