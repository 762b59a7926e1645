"""The parameters that the installed mlx-lm's class declares: what the child process of `ManifestCheck` runs.

Building the module tree is lazy and takes no memory. Nothing here reads a file of a checkpoint, and the
process has neither the working directory nor a checkpoint on its path.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from mla_tools.architectures import MODEL_TYPES
from mla_tools.verify.asking import give

__all__ = ["answer", "manifest", "model_classes"]

Shapes = Mapping[str, Sequence[int]]


def answer(question: Mapping[str, Any]) -> None:
    """Write the manifest for a question to stdout as JSON, or why the class cannot be built."""
    # Whatever mlx-lm prints is no part of the answer.
    stdout = os.dup(1)
    os.dup2(2, 1)
    _import_mlx_lm()
    try:
        found: dict[str, Any] = {"manifest": manifest(question["config"], question["stored"])}
    except Exception as error:
        found = {"refused": str(error) or type(error).__name__}
    give(found, stdout)


def manifest(config: Mapping[str, Any], stored: Shapes) -> dict[str, list[int]]:
    """Return the parameters that the class for a config declares, by name with their shapes.

    No file that a config names is run for it. `stored` are the tensors of the output: as in
    `mlx_lm.load`, a module is quantized if its scales are among them. Raises
    whatever mlx-lm raises for a config that it cannot build.
    """
    import mlx.core as mx
    from mlx.nn.layers.quantized import quantize
    from mlx.utils import tree_flatten

    # Nothing is computed here, and a GPU is the converter's.
    mx.set_default_device(mx.cpu)
    model_class, args_class = model_classes(config)
    model = model_class(args_class.from_dict(dict(config)))
    section = config.get("quantization")
    if section is not None:

        def how(path: str, module: Any) -> bool | dict[str, Any]:
            if not hasattr(module, "to_quantized") or f"{path}.scales" not in stored:
                return False
            found = section.get(path, True)
            return dict(found) if isinstance(found, Mapping) else bool(found)

        quantize(
            model,
            group_size=section["group_size"],
            bits=section["bits"],
            mode=section.get("mode", "affine"),
            class_predicate=how,
        )
    return {name: list(array.shape) for name, array in dict(tree_flatten(model.parameters())).items()}


def model_classes(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the Model and ModelArgs for a config: mlx-lm's, or ours where mlx-lm has none."""
    from mlx_lm.utils import _get_classes

    family = MODEL_TYPES.get(config["model_type"])
    if family is None or not family.runtime:
        found: tuple[Any, Any] = _get_classes(dict(config))
        return found
    module = import_module(f"mla_tools.models.{family.runtime}")
    return module.Model, module.ModelArgs


def _import_mlx_lm() -> None:
    """Import mlx_lm.utils, if it can be, without the generator and the tokenizers that mlx_lm begins with.

    They import transformers, and it all there is of torch: seconds, for what no model class needs.
    """
    package, tokenizers = ModuleType("mlx_lm"), ModuleType("mlx_lm.tokenizer_utils")
    found = find_spec("mlx_lm")
    package.__path__ = list(found.submodule_search_locations or ()) if found else []
    tokenizers.__getattr__ = lambda name: None  # type: ignore[method-assign]
    stand_ins = {module.__name__: module for module in (package, tokenizers)}
    sys.modules.update(stand_ins)
    try:
        import_module("mlx_lm.utils")
    except Exception:  # another mlx-lm needs more of itself
        for name in [name for name in sys.modules if name.partition(".")[0] == "mlx_lm"]:
            del sys.modules[name]
        import_module("mlx_lm.utils")
