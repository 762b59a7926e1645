"""Whether mlx-lm opens the tokenizer that goes beside the weights, asked in a child process.

A checkpoint's own code runs only where the user trusts it, and then in the child alone.
"""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mla_tools.errors import MlaToolsError
from mla_tools.files.checkpoint import Planned
from mla_tools.files.place import LocalFile, pieces
from mla_tools.output.record import CONFIG, pretty
from mla_tools.verify.asking import Child, UnansweredError, give

__all__ = ["NO_TOKENIZER", "TokenizerCheck", "answer", "has_tokenizer"]

# One of these is in every checkpoint that has a tokenizer.
_TOKENIZER = ("tokenizer*", "*.model", "*.tiktoken", "vocab.*", "tokenization*")

NO_TOKENIZER = "There is no tokenizer beside the weights, and mlx_lm.generate needs one."

# transformers and all that it brings are imported in seconds; nobody waits longer than this for the answer.
_SECONDS = 60.0

# A few bytes of a tokenizer.json can ask for any amount of memory: more than this on top of what the
# libraries take is refused. macOS takes such a limit and does not keep it: there, time alone ends it.
_MEMORY = 2 << 30


# Of a repository, files up to this are fetched for the check: no tokenizer's file is larger.
_MOST = 256 << 20


def has_tokenizer(names: Iterable[str]) -> bool:
    """Return whether a tokenizer is among files of these names."""
    return any(fnmatchcase(name, pattern) for name in names for pattern in _TOKENIZER)


class TokenizerCheck:
    """The child process that opens a tokenizer, started now.

    `companions` are the files that are copied and `config` is the output's. With `trusted`, the code of the
    checkpoint may run.
    """

    def __init__(self, config: Mapping[str, Any], companions: Iterable[Planned], *, trusted: bool) -> None:
        self._said = ""
        self._child: Child | None = None
        held = list(companions)
        with ExitStack() as stack:
            if not has_tokenizer(each.name for each in held):
                self._said = NO_TOKENIZER
            else:
                folder = Path(stack.enter_context(TemporaryDirectory(prefix="mla-tools-")))
                try:
                    _lay(folder / "model", config, held)
                    self._child = _ask(folder, trusted)
                    stack.callback(self._child.cancel)
                except UnansweredError as error:
                    self._said = _unasked(str(error))
                except OSError as error:
                    self._said = _unasked(error.strerror or str(error))
            self._held = stack.pop_all()

    def said(self) -> str:
        """Return, when it is known, what the user must know; nothing if mlx-lm opens the tokenizer."""
        if self._child is None:
            return self._said
        try:
            found = self._child.answer(_SECONDS)
        except UnansweredError as error:
            return _unasked(str(error))
        match found:
            case {"opened": True}:
                return ""
            case {"untrusted": True}:
                return (
                    "The tokenizer needs the checkpoint's own code, so it was not opened here:"
                    " --trust-remote-code does it, and mlx_lm needs that option too."
                )
            case {"refused": str(why)}:
                return f"mlx_lm cannot open the tokenizer: {why}"
        return _unasked("its answer is not valid")

    def cancel(self) -> None:
        """End the child if it still runs, and remove its folder."""
        self._held.close()


def _lay(folder: Path, config: Mapping[str, Any], companions: Iterable[Planned]) -> None:
    """Put into a new folder what a tokenizer is opened from: links to files of this machine, or copies."""
    folder.mkdir()
    (folder / CONFIG).write_bytes(pretty(config))
    for each in companions:
        path = folder / each.name
        path.parent.mkdir(exist_ok=True)
        if isinstance(each.file, LocalFile):
            path.symlink_to(each.file.path.absolute())
            continue
        if each.size > _MOST:
            continue
        try:
            opened = each.file.open()
            try:
                with path.open("wb") as file:
                    file.writelines(pieces(opened, opened.size))
            finally:
                opened.close()
        except MlaToolsError as error:
            raise UnansweredError(str(error)) from error


def _ask(folder: Path, trusted: bool) -> Child:
    # transformers copies the code that it runs, and looks on the hub for what a folder lacks.
    environment = {"HF_MODULES_CACHE": str(folder / "modules")}
    if not trusted:
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return Child("tokenizer", {"folder": str(folder / "model"), "trusted": trusted}, environment)


def _unasked(why: str) -> str:
    return f"It could not be checked whether mlx_lm opens the tokenizer: {why}"


def answer(question: Mapping[str, Any]) -> None:
    """Write to stdout as JSON whether mlx-lm opens the tokenizer in a folder."""
    stdout = os.dup(1)
    os.dup2(2, 1)  # whatever is printed is no part of the answer
    folder, trusted = Path(question["folder"]), question["trusted"]
    found: dict[str, Any]
    try:
        if not trusted and _has_code(folder):
            # Without the code, another class may open the same files and make other tokens of them.
            found = {"untrusted": True}
        else:
            from mlx_lm.tokenizer_utils import load

            _limit_memory()
            load(folder, {"trust_remote_code": trusted})
            found = {"opened": True}
    except Exception as error:
        found = {"refused": " ".join(str(error).split())[:500] or type(error).__name__}
    give(found, stdout)


def _limit_memory() -> None:
    """Let this process end rather than take much more memory than it has now."""
    status = Path("/proc/self/statm")
    if status.exists():
        most = int(status.read_text().split()[0]) * resource.getpagesize() + _MEMORY
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or most < hard:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _has_code(folder: Path) -> bool:
    """Return whether the tokenizer in a folder is one of the checkpoint's own classes."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_bytes()) if path.exists() else {}
    classes = config.get("auto_map") if isinstance(config, dict) else None
    return isinstance(classes, dict) and "AutoTokenizer" in classes
