"""The class of the installed mlx-lm, asked in a child process.

The child says which parameters the class declares, and they are compared with what is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mla_tools.errors import CheckpointError, MlaToolsError, Problem
from mla_tools.verify.asking import Child, UnansweredError

__all__ = ["ManifestCheck", "compare"]

Shapes = Mapping[str, Sequence[int]]


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


class ManifestCheck:
    """The child process that asks mlx-lm, started now and waited for with `wait`."""

    def __init__(self, config: Mapping[str, Any], stored: Shapes) -> None:
        self._stored = stored
        self._agreed = False
        shapes = {name: list(shape) for name, shape in stored.items()}
        try:
            self._child = Child("child", {"config": dict(config), "stored": shapes})
        except UnansweredError as error:
            raise _unasked(str(error)) from error

    def look(self) -> None:
        """Return at once, or raise what `wait` raises if that is known by now."""
        if self._child.has_ended():
            self.wait()

    def wait(self) -> None:
        """Return when mlx-lm agrees; CheckpointError that lists the differences if it does not."""
        if self._agreed:
            return
        try:
            found = self._child.answer()
        except UnansweredError as error:
            raise _unasked(str(error)) from error
        match found:
            case {"refused": str(why)}:
                raise MlaToolsError(f"The installed mlx-lm cannot build this model: {why}")
            case {"manifest": {}}:
                pass
            case _:
                raise _unasked("its answer is not valid")
        problems = compare(self._stored, found["manifest"])
        if problems:
            raise CheckpointError(problems)
        self._agreed = True

    def cancel(self) -> None:
        """End the child if it still runs."""
        self._child.cancel()


def _unasked(why: str) -> MlaToolsError:
    return MlaToolsError(
        f"It could not be checked whether the installed mlx-lm loads this model: {why}. The model may be"
        f" right: make sure that mlx_lm can be imported, and resume."
    )
