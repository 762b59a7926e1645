"""Is an output what was written, and does it agree with the model class that will load it?

A complete output says in mla_tools.json what each of its files must be; `verify_output` compares.

The class of the installed mlx-lm is asked in a child process, so that whatever it imports costs the
converter neither time nor memory. The child builds the module tree, which is lazy and takes no memory,
and tells the parameter names and shapes, which are compared with what is written.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from types import ModuleType
from typing import Any

from mla_tools.architectures import MODEL_TYPES
from mla_tools.errors import CheckpointError, MlaToolsError, Problem
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.files.place import LocalFile
from mla_tools.output import RECORD, journals, read_record

__all__ = ["ManifestCheck", "compare", "manifest", "model_classes", "verify_output"]

AGAIN = "Convert again, or copy the file again from where it was whole."

_READ_AT_ONCE = 8 << 20

Shapes = Mapping[str, Sequence[int]]


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


def compare(stored: Shapes, declared: Shapes) -> list[Problem]:
    """Return every difference between the tensors of an output and the parameters of its class."""
    problems = []
    for name in sorted({*stored, *declared}):
        found, needed = stored.get(name), declared.get(name)
        if needed is None:
            problems.append(Problem(name, "mlx-lm's class has no such parameter", "nothing", f"{found}"))
        elif found is None:
            problems.append(Problem(name, "mlx-lm's class wants this parameter", f"{needed}", "nothing"))
        elif list(found) != list(needed):
            problems.append(Problem(name, "has another shape in mlx-lm's class", f"{needed}", f"{found}"))
    return problems


def verify_output(
    folder: Path, *, quick: bool = False, progress: Callable[[int], None] = lambda nbytes: None
) -> tuple[int, int]:
    """Return the number and the bytes of the files of an output, all of which are as they were written.

    Headers and index are read, sizes and the sha256 of every file compared with mla_tools.json; `quick`
    leaves the sha256 out. `progress` is called with the number of bytes just read. Raises CheckpointError
    that lists everything that differs, and MlaToolsError for a folder that is no output of this tool.
    """
    if journals(folder):
        raise MlaToolsError(
            f"{folder} is unfinished: go on with mla-sanitize convert --resume, with the options that it had"
        )
    record = read_record(folder)
    if record is None:
        raise MlaToolsError(f"{folder} holds no readable {RECORD}, so there is nothing to compare it with")
    problems = []
    total = 0
    for name, told in sorted(record.items()):
        total += told[0]
        problem = _file_problem(folder, name, told, quick)
        if problem is not None:
            problems.append(problem)
        progress(told[0])
    try:
        checkpoint = open_checkpoint(folder)
        problems += checkpoint.problems
        # mlx_lm.load takes every model*.safetensors there is, whatever the index says.
        strays = [path.name for path in folder.glob("model*.safetensors") if path.name not in record]
        problems += [
            Problem(name, "was not written by the conversion, and mlx-lm would load it") for name in strays
        ]
    except CheckpointError as error:
        problems += error.problems
    if problems:
        raise CheckpointError(problems)
    return len(record), total


def _file_problem(folder: Path, name: str, told: tuple[int, str], quick: bool) -> Problem | None:
    """Return in what a file is not what it was, or None."""
    nbytes, sha256 = told
    try:
        opened = LocalFile(folder / name).open()
    except CheckpointError as error:
        return error.problems[0]
    try:
        if opened.size != nbytes:
            return Problem(name, "has another size", f"{nbytes:,} bytes", f"{opened.size:,} bytes", AGAIN)
        if quick:
            return None
        digest = hashlib.sha256()
        for offset in range(0, nbytes, _READ_AT_ONCE):
            digest.update(opened.read(offset, min(_READ_AT_ONCE, nbytes - offset)).data)
        if (found := digest.hexdigest()) != sha256:
            return Problem(name, "has other bytes", f"sha256 {sha256}", found, AGAIN)
    finally:
        opened.close()
    return None


class ManifestCheck:
    """The child process that asks mlx-lm, started now and waited for with `wait`."""

    def __init__(self, config: Mapping[str, Any], stored: Shapes) -> None:
        self._stored = stored
        self._agreed = False
        with ExitStack() as stack:
            # Files, which hold any question and any answer while this process does something else.
            asked, self._out, self._err = (stack.enter_context(TemporaryFile()) for _ in range(3))
            question = {"config": dict(config), "stored": {k: list(v) for k, v in stored.items()}}
            asked.write(json.dumps(question).encode())
            asked.seek(0)
            self._child = subprocess.Popen(
                [sys.executable, "-m", "mla_tools.verify"], stdin=asked, stdout=self._out, stderr=self._err
            )
            self._files = stack.pop_all()

    def look(self) -> None:
        """Return at once, or raise what `wait` raises if that is known by now."""
        if self._child.poll() is not None:
            self.wait()

    def wait(self) -> None:
        """Return when mlx-lm agrees; CheckpointError that lists the differences if it does not."""
        if self._agreed:
            return
        if self._child.wait() != 0:
            self._err.seek(0)
            last = self._err.read().decode(errors="replace").strip().splitlines()[-1:]
            raise MlaToolsError(
                f"The installed mlx-lm cannot build this model: {last[0] if last else 'no reason given'}"
            )
        self._out.seek(0)
        problems = compare(self._stored, json.load(self._out))
        if problems:
            raise CheckpointError(problems)
        self._agreed = True

    def cancel(self) -> None:
        """End the child if it still runs."""
        self._child.kill()
        self._child.wait()
        self._files.close()


def _answer() -> None:
    """Read a question from stdin and print the manifest: the child process."""
    _import_mlx_lm()
    question = json.load(sys.stdin)
    print(json.dumps(manifest(question["config"], question["stored"])))


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


if __name__ == "__main__":
    _answer()
