"""mla-tools: checkpoints of multi-head-latent-attention models, made to run on MLX."""

# Nothing is imported here before a name is asked for: not even a module of Python, of which a stranger's
# copy may lie in the working directory (see isolation.py).
TYPE_CHECKING = False

if TYPE_CHECKING:
    from mla_tools import convert
    from mla_tools.errors import CheckpointError, MlaToolsError, Problem, UsageError
    from mla_tools.kv_b import merge_kv_b_proj_weights, split_kv_b_proj_weights
    from mla_tools.mla import shard_mla_projections
    from mla_tools.options import Options
    from mla_tools.quantization import QuantSpec
    from mla_tools.spec import DType
    from mla_tools.weights import quantization_of, sanitize

    __version__: str

__all__ = [
    "CheckpointError",
    "DType",
    "MlaToolsError",
    "Options",
    "Problem",
    "QuantSpec",
    "UsageError",
    "__version__",
    "convert",
    "merge_kv_b_proj_weights",
    "quantization_of",
    "sanitize",
    "shard_mla_projections",
    "split_kv_b_proj_weights",
]

# `convert` is the module: a function of that name would be hidden by it as soon as it is imported, and
# `plan` and `verify` are packages. The functions are convert.convert, convert.plan and so on.
_MODULES = {"convert"}

_HOMES = {
    "CheckpointError": "errors",
    "DType": "spec",
    "MlaToolsError": "errors",
    "Options": "options",
    "Problem": "errors",
    "QuantSpec": "quantization",
    "UsageError": "errors",
    "merge_kv_b_proj_weights": "kv_b",
    "quantization_of": "weights",
    "sanitize": "weights",
    "shard_mla_projections": "mla",
    "split_kv_b_proj_weights": "kv_b",
}


def __getattr__(name: str) -> object:
    """Return a public name, whose module is imported when the name is first used."""
    from importlib import import_module

    value: object
    if name in _MODULES:
        value = import_module(f"mla_tools.{name}")
    elif name in _HOMES:
        value = getattr(import_module(f"mla_tools.{_HOMES[name]}"), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("mla-tools")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
