"""The errors of mla-tools, and the text that tells them."""

from __future__ import annotations

import reprlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mla_tools.names import NUMBER, fold_names

__all__ = [
    "ChangedError",
    "CheckpointError",
    "DamagedError",
    "DataError",
    "MlaToolsError",
    "Problem",
    "UsageError",
    "clipped",
]

_MAX_GROUPS = 40

_clip = reprlib.Repr()
_clip.maxstring = _clip.maxother = _clip.maxlong = 80
_clip.maxlist = _clip.maxdict = 8
_clip.maxlevel = 3


def clipped(value: object) -> str:
    """Return the repr of a JSON value, short and printable however deep, long or strange it is."""
    return _clip.repr(value)


class MlaToolsError(Exception):
    """Base of every error that mla-tools raises on purpose; `exit_code` is what the command returns.

    `resumable`: an output that it leaves unfinished can be finished, once what was wrong is mended.
    """

    exit_code = 1
    resumable = True


class UsageError(MlaToolsError):
    """The options contradict each other or name something that does not exist."""

    exit_code = 2


class DataError(MlaToolsError):
    """The numbers of a tensor cannot be converted, or not with these options."""

    resumable = False


class DamagedError(MlaToolsError):
    """An unfinished output is not as it was left."""

    resumable = False


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a checkpoint: what, what was needed and why, what was found."""

    subject: str
    what: str
    needed: str = ""
    found: str = ""
    cause: str = ""

    def __str__(self) -> str:
        return self.text(self.subject)

    def text(self, subject: str) -> str:
        """Return the problem as lines, under a heading that may stand for several folded subjects."""
        lines = [f"{subject}: {self.what}"]
        lines += [f"  {word:<7} {value}" for word, value in self._details() if value]
        if self.cause:
            lines.append(f"  {self.cause}")
        return "\n".join(lines)

    def _details(self) -> tuple[tuple[str, str], ...]:
        return (("needed", self.needed), ("found", self.found))

    def _kind(self) -> tuple[str, ...]:
        return tuple(
            NUMBER.sub(".*", text) for text in (self.subject, self.what, self.needed, self.found, self.cause)
        )


class CheckpointError(MlaToolsError):
    """Everything that is wrong with a checkpoint or an output, in one go.

    `problems` holds each case; the message folds cases that differ in their indices alone.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self._message())

    def _message(self) -> str:
        groups: dict[tuple[str, ...], list[Problem]] = defaultdict(list)
        for problem in self.problems:
            groups[problem._kind()].append(problem)
        blocks = []
        for members in list(groups.values())[:_MAX_GROUPS]:
            subjects = fold_names(problem.subject for problem in members)
            text = members[0].text(subjects[0])
            if len(members) > 1:
                text += f"\n  (the lines above are those of the first of {len(members)})"
            blocks.append("\n".join(subjects[1:] + [text]))
        if len(groups) > _MAX_GROUPS:
            blocks.append(f"... and {len(groups) - _MAX_GROUPS} more kinds of problems")
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        return f"{head}\n\n" + "\n\n".join(blocks)


class ChangedError(CheckpointError):
    """A checkpoint is not what it was when its conversion was planned."""

    resumable = False
