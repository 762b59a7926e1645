"""A child process that is asked a question, so that whatever it imports costs this one nothing.

The question goes in as JSON and the answer comes out as JSON, both through files: any size of them fits
while this process does something else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from mla_tools.isolation import trusted_path

__all__ = ["Child", "UnansweredError", "child_path", "give"]

# The path comes with the question, before anything is imported that could lie in several places.
_CHILD = """\
import json, sys
from importlib import import_module
question = json.load(sys.stdin)
sys.path[:] = question["path"]
import_module("mla_tools.verify." + question["module"]).answer(question)
"""

# A folder that is always there and holds no modules: what the child has as working directory.
_NEUTRAL = "/"


class UnansweredError(Exception):
    """The child came to no answer; the text says why."""


def child_path() -> list[str]:
    """Return where the child looks for modules: where this process does, but for the working directory.

    The folder that holds this package comes last, for a process that has it from elsewhere.
    """
    return [*trusted_path(), str(Path(__file__).absolute().parents[2])]


def give(found: Mapping[str, Any], stdout: int) -> None:
    """Write an answer, in the child, to the descriptor that was its stdout."""
    with os.fdopen(stdout, "w") as file:
        json.dump(found, file)


class Child:
    """The process, started now; `module` in this package has the function `answer` that it calls.

    Raises UnansweredError if it cannot be started.
    """

    def __init__(
        self, module: str, question: Mapping[str, Any], environment: Mapping[str, str] | None = None
    ) -> None:
        asked = {**question, "path": child_path(), "module": module}
        # What the user's environment adds to the path is in ours, but for what may not be.
        inherited = {key: text for key, text in os.environ.items() if key != "PYTHONPATH"}
        with ExitStack() as stack:
            try:
                source, self._out, self._err = (stack.enter_context(TemporaryFile()) for _ in range(3))
                source.write(json.dumps(asked, allow_nan=False).encode())
                source.seek(0)
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _CHILD],
                    stdin=source,
                    stdout=self._out,
                    stderr=self._err,
                    env={**inherited, **(environment or {})},
                    cwd=_NEUTRAL,
                )
            except OSError as error:
                raise UnansweredError(f"its process cannot be started ({error.strerror})") from error
            self._files = stack.pop_all()

    def has_ended(self) -> bool:
        """Return whether the answer can be had without waiting."""
        return self._process.poll() is not None

    def answer(self, seconds: float | None = None) -> dict[str, Any]:
        """Return what the child says; UnansweredError if that is nothing, or not within so many seconds."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise UnansweredError(f"its process took more than {seconds:.0f} seconds") from error
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            raise UnansweredError(f"its process was ended by {name}")
        if code:
            self._err.seek(0)
            last = self._err.read().decode(errors="replace").strip().splitlines()[-1:]
            raise UnansweredError(last[0] if last else "no reason was given")
        self._out.seek(0)
        try:
            found = json.load(self._out)
        except ValueError as error:
            raise UnansweredError("its answer was cut off") from error
        if not isinstance(found, dict):
            raise UnansweredError("its answer is not valid")
        return found

    def cancel(self) -> None:
        """End the child if it still runs."""
        self._process.kill()
        self._process.wait()
        self._files.close()
