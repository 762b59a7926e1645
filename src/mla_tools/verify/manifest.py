"""The class of the installed mlx-lm, asked in a child process.

So whatever it imports costs the converter neither time nor memory. The child says which parameters the class
declares, and they are compared with what is written.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from mla_tools.errors import CheckpointError, MlaToolsError, Problem
from mla_tools.isolation import trusted_path

__all__ = ["ManifestCheck", "compare"]

Shapes = Mapping[str, Sequence[int]]

# The path comes with the question, before anything is imported that could lie in several places.
_CHILD = """\
import json, sys
question = json.load(sys.stdin)
sys.path[:] = question["path"]
from mla_tools.verify.child import answer
answer(question)
"""

# A folder that is always there and holds no modules: what the child has as working directory.
_NEUTRAL = "/"


def compare(stored: Shapes, declared: Shapes) -> list[Problem]:
    """Return every difference between the tensors of an output and the parameters of its class."""
    problems = []
    for name in sorted({*stored, *declared}):
        found, needed = stored.get(name), declared.get(name)
        if needed is None:
            problems.append(
                Problem(name, "mlx-lm's model class has no such parameter", "nothing", f"{found}")
            )
        elif found is None:
            problems.append(
                Problem(name, "mlx-lm's model class needs this parameter", f"{needed}", "nothing")
            )
        elif list(found) != list(needed):
            problems.append(
                Problem(name, "has another shape in mlx-lm's model class", f"{needed}", f"{found}")
            )
    return problems


def child_path() -> list[str]:
    """Return where the child looks for modules: where this process does, but for the working directory.

    The folder that holds this package comes last, for a process that has it from elsewhere.
    """
    return [*trusted_path(), str(Path(__file__).absolute().parents[2])]


class ManifestCheck:
    """The child process that asks mlx-lm, started now and waited for with `wait`."""

    def __init__(self, config: Mapping[str, Any], stored: Shapes) -> None:
        self._stored = stored
        self._agreed = False
        question = {
            "path": child_path(),
            "config": dict(config),
            "stored": {name: list(shape) for name, shape in stored.items()},
        }
        # What the user's environment adds to the path is in ours, but for what may not be.
        environment = {key: text for key, text in os.environ.items() if key != "PYTHONPATH"}
        with ExitStack() as stack:
            try:
                # Files, which hold any question and any answer while this process does something else.
                asked, self._out, self._err = (stack.enter_context(TemporaryFile()) for _ in range(3))
                asked.write(json.dumps(question, allow_nan=False).encode())
                asked.seek(0)
                self._child = subprocess.Popen(
                    [sys.executable, "-P", "-c", _CHILD],
                    stdin=asked,
                    stdout=self._out,
                    stderr=self._err,
                    env=environment,
                    cwd=_NEUTRAL,
                )
            except OSError as error:
                raise _unasked(f"its process cannot be started ({error.strerror})") from error
            self._files = stack.pop_all()

    def look(self) -> None:
        """Return at once, or raise what `wait` raises if that is known by now."""
        if self._child.poll() is not None:
            self.wait()

    def wait(self) -> None:
        """Return when mlx-lm agrees; CheckpointError that lists the differences if it does not."""
        if self._agreed:
            return
        found = self._answer(self._child.wait())
        if "refused" in found:
            raise MlaToolsError(f"The installed mlx-lm cannot build this model: {found['refused']}")
        problems = compare(self._stored, found["manifest"])
        if problems:
            raise CheckpointError(problems)
        self._agreed = True

    def _answer(self, code: int) -> dict[str, Any]:
        """Return what the child has said; MlaToolsError if it came to no answer."""
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            raise _unasked(f"its process was ended by {name}")
        if code:
            self._err.seek(0)
            last = self._err.read().decode(errors="replace").strip().splitlines()[-1:]
            raise _unasked(last[0] if last else "no reason was given")
        self._out.seek(0)
        try:
            found = json.load(self._out)
        except ValueError as error:
            raise _unasked("its answer was cut off") from error
        match found:
            case {"manifest": {}} | {"refused": str()}:
                return dict(found)
        raise _unasked("its answer is not valid")

    def cancel(self) -> None:
        """End the child if it still runs."""
        self._child.kill()
        self._child.wait()
        self._files.close()


def _unasked(why: str) -> MlaToolsError:
    return MlaToolsError(
        f"It could not be checked whether the installed mlx-lm loads this model: {why}. The model may be"
        f" right: make sure that mlx_lm can be imported, and resume."
    )
