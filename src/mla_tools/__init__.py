"""mla-tools: checkpoints of multi-head-latent-attention models, made to run on MLX."""

# Nothing is imported here before a name is asked for: not even a module of Python, of which a stranger's
# copy may lie in the working directory (see isolation.py).
TYPE_CHECKING = False

if TYPE_CHECKING:
    from mla_tools.errors import CheckpointError, MlaToolsError, Problem, UsageError
    from mla_tools.kv_b import merge_kv_b_proj_weights, split_kv_b_proj_weights
    from mla_tools.mla import shard_mla_projections
    from mla_tools.quantization import QuantSpec
    from mla_tools.weights import sanitize

__all__ = [
    "CheckpointError",
    "MlaToolsError",
    "Problem",
    "QuantSpec",
    "UsageError",
    "merge_kv_b_proj_weights",
    "sanitize",
    "shard_mla_projections",
    "split_kv_b_proj_weights",
]

_HOMES = {
    "CheckpointError": "errors",
    "MlaToolsError": "errors",
    "Problem": "errors",
    "QuantSpec": "quantization",
    "UsageError": "errors",
    "merge_kv_b_proj_weights": "kv_b",
    "sanitize": "weights",
    "shard_mla_projections": "mla",
    "split_kv_b_proj_weights": "kv_b",
}


def __getattr__(name: str) -> object:
    """Return a public name, whose module is imported when the name is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"mla_tools.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
