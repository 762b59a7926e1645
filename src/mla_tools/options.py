"""The options of a conversion: `Options`, its form on a command line, sizes, and recipe files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from mla_tools.codecs import TargetCodec
from mla_tools.errors import CheckpointError, UsageError
from mla_tools.files.place import LocalFile, read_whole, shown
from mla_tools.quantization import QuantSpec
from mla_tools.spec import DType

__all__ = [
    "DTYPES",
    "EMBED_Q",
    "EmbedQ",
    "MissingBiases",
    "Options",
    "Override",
    "parse_embed_q",
    "parse_override",
    "parse_size",
    "read_recipe",
]

# What config.json and --dtype call the float dtypes.
DTYPES = {"float16": DType.F16, "bfloat16": DType.BF16, "float32": DType.F32}

MissingBiases = Literal["zero"]

EmbedQ = Literal["auto", "source", "float"] | QuantSpec

Override = tuple[str, QuantSpec | None]

# For a packed K that nothing holds exactly: a tenth of the loss of the source's 4 bits.
EMBED_Q = QuantSpec("affine", 8, 32)

_MAX_RECIPE = 1 << 20


@dataclass(frozen=True)
class Options:
    """The options of a conversion; the defaults are those of `mlx_lm.convert`.

    `dtype`: the dtype of unquantized tensors; None for that of config.json, or else of the checkpoint.
    `quantize` and `quant_predicate`: the target encoding. `embed_q`: the encoding of the K half of a
    quantized kv_b_proj, whose axis changes: like the source, a QuantSpec, or floats; "auto", which is what
    None means too, is the smallest of these that loses nothing, else `EMBED_Q`. `overrides`: pairs of a
    regular expression and a QuantSpec, or None for floats, for the modules whose path contains a match; the
    last match counts. `keep_vision`: copy the vision tensors, which mlx-lm ignores. `missing_biases`: "zero"
    to take zeros where an affine tensor has no biases and others have some; None to refuse it. `layout`: that
    of the output, "mlx" for what mlx-lm loads. `format`: a format other than MLX's, for everything that can
    be quantized.
    """

    quantize: QuantSpec | None = None
    quant_predicate: str | None = None
    dtype: DType | None = None
    dequantize: bool = False
    embed_q: EmbedQ | None = None
    overrides: tuple[Override, ...] = ()
    keep_vision: bool = False
    missing_biases: MissingBiases | None = None
    layout: str = "mlx"
    format: TargetCodec | None = None

    def __post_init__(self) -> None:
        self._check_types()
        if sum(map(bool, (self.quantize, self.dequantize, self.format))) > 1:
            raise UsageError("Choose either quantize or dequantize, not both.")
        if self.quant_predicate and not self.quantize:
            raise UsageError("--quant-predicate: not allowed without -q.")
        if self.quant_predicate and self.quantize and self.quantize.mode != "affine":
            raise UsageError("Quant predicates only support 'affine' quantization.")
        for pattern, _ in self.overrides:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"--q-override {pattern}: not a regular expression: {error}") from error

    def _check_types(self) -> None:
        """Raise UsageError for values of other types, which a caller in Python may give."""
        specs = [self.quantize, None if isinstance(self.embed_q, str) else self.embed_q]
        pairs = self.overrides if isinstance(self.overrides, tuple) else ("",)
        good = {
            "quantize and embed_q are a QuantSpec": all(
                spec is None or isinstance(spec, QuantSpec) for spec in specs
            ),
            'embed_q as text is "auto", "source" or "float"': not isinstance(self.embed_q, str)
            or self.embed_q in ("auto", "source", "float"),
            'missing_biases is "zero" or None': self.missing_biases in ("zero", None),
            "dtype is a DType, such as DType.F16": self.dtype is None or isinstance(self.dtype, DType),
            "overrides are a tuple of pairs: a regular expression, and a QuantSpec or None": all(
                isinstance(pair, tuple)
                and len(pair) == 2
                and isinstance(pair[0], str)
                and (pair[1] is None or isinstance(pair[1], QuantSpec))
                for pair in pairs
            ),
        }
        wrong = [what for what, is_so in good.items() if not is_so]
        if wrong:
            raise UsageError(f"Options: {'; '.join(wrong)}.")

    def described(self) -> dict[str, object]:
        """Return the options as plain values."""
        embed_q = dict(self.embed_q.config) if isinstance(self.embed_q, QuantSpec) else self.embed_q
        return {
            "quantize": None if self.quantize is None else dict(self.quantize.config),
            "quant_predicate": self.quant_predicate,
            "dtype": None if self.dtype is None else self.dtype.name,
            "dequantize": self.dequantize,
            "embed_q": embed_q or "auto",
            "overrides": [[pattern, spec and dict(spec.config)] for pattern, spec in self.overrides],
            "keep_vision": self.keep_vision,
            "missing_biases": self.missing_biases,
            "layout": self.layout,
            "format": None if self.format is None else self.format.name,
        }

    def overriding(self, path: str) -> Override | None:
        """Return the override that decides on the module at this path, or None."""
        found = None
        for override in self.overrides:
            if re.search(override[0], path):
                found = override
        return found

    def with_dtype_of(self, config: Mapping[str, Any], section: Mapping[str, Any]) -> Options:
        """Return options whose dtype is what mlx_lm.convert would take from config.json.

        `section` is where the language model's numbers stand in `config`, or `config` itself.
        """
        if self.dtype is not None:
            return self
        named = config.get("torch_dtype")
        if named is None and section is not config:
            named = section.get("dtype")
        return replace(self, dtype=DTYPES[named]) if isinstance(named, str) and named in DTYPES else self


def parse_embed_q(text: str) -> EmbedQ:
    """Return what "auto", "source", "float" or BITS[,GROUP[,MODE]] says; UsageError for anything else."""
    if text in ("auto", "source", "float"):
        return text  # type: ignore[return-value]
    return QuantSpec.parse(text)


def parse_override(text: str) -> Override:
    """Return what REGEX=BITS[,GROUP[,MODE]] or REGEX=float says; UsageError for anything else."""
    pattern, equals, spec = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"--q-override {text}: give REGEX=BITS[,GROUP[,MODE]] or REGEX=float")
    return pattern, None if spec == "float" else QuantSpec.parse(spec)


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str) -> int:
    """Return a size such as 2GB, 512MB, 1.5G or 800000000 in bytes; units are decimal, as for files.

    Raises UsageError for anything else.
    """
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise UsageError(f"--max-memory {shown(text)}: give a size such as 2GB or 500MB")
    return int(Decimal(found[1]) * _UNITS[found[2].upper()])


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the options that a recipe file names: `quantize`, `embed_q` and `overrides`, if it has them.

    It is a YAML mapping with no other keys. Raises UsageError where it is not.
    """
    import yaml

    try:
        recipe = yaml.safe_load(read_whole(LocalFile(path), _MAX_RECIPE).decode())
    except CheckpointError as error:
        problem = error.problems[0]
        why = " ".join(filter(None, (problem.what, problem.found)))
        raise UsageError(f"--recipe {path}: cannot be read: it {why}") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"--recipe {path}: cannot be read: {error}") from error
    known = {"quantize", "embed_q", "overrides"}
    if not isinstance(recipe, dict) or not set(recipe) <= known:
        raise UsageError(f"--recipe {path}: it must be a mapping with only the keys {sorted(known)}")
    overrides = recipe.get("overrides") or {}
    if not isinstance(overrides, dict):
        raise UsageError("overrides in a recipe must be a mapping of REGEX to BITS[,GROUP[,MODE]] or float")
    found: dict[str, Any] = {
        "overrides": [parse_override(f"{pattern}={spec}") for pattern, spec in overrides.items()]
    }
    if "quantize" in recipe:
        found["quantize"] = QuantSpec.parse(str(recipe["quantize"]))
    if recipe.get("embed_q") is not None:
        found["embed_q"] = parse_embed_q(str(recipe["embed_q"]))
    return found
