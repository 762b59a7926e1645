"""The errors of mla-tools, and their text."""

from __future__ import annotations

import re
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mla_tools.names import NUMBER, Fold, fold_files, fold_names, folds, natural

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
_MAX_SUBJECTS = 20
_MAX_LOST = 6

_BRACES = re.compile(r"\{[^}]*\}")

_clip = reprlib.Repr()
_clip.maxstring = _clip.maxother = _clip.maxlong = 80
_clip.maxlist = _clip.maxdict = 8
_clip.maxlevel = 3


def clipped(value: object) -> str:
    """Return the repr of a JSON value, short and printable however deep, long or strange it is."""
    return _clip.repr(value)


class MlaToolsError(Exception):
    """Base of every error that mla-tools raises on purpose; `exit_code` is what the command returns.

    `resumable`: an output that it leaves unfinished can be finished after the cause is corrected.
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
    """An unfinished output has changed since it was left."""

    resumable = False


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a checkpoint: what, what was needed and why, what was found.

    `lost`: the stored tensors that cannot be read because of it, as far as they are known by name. What
    follows from their loss has `reason` as a line of its cause.
    """

    subject: str
    what: str
    needed: str = ""
    found: str = ""
    cause: str = ""
    reason: str = ""
    lost: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text([self.subject], self.lost)

    def text(self, subjects: Sequence[str], lost: Sequence[str], *, whole: bool = False) -> str:
        """Return the problem as lines, as that of these subjects, by which these tensors are lost.

        With `whole`, each tensor is listed by its name.
        """
        lines = [f"{subject}: {self.what}" for subject in subjects[:_MAX_SUBJECTS]]
        if len(subjects) > _MAX_SUBJECTS:
            lines.append(f"... and {len(subjects) - _MAX_SUBJECTS:,} more names")
        details = (("needed", self.needed), ("found", self.found))
        lines += [f"  {word:<7} {value}" for word, value in details if value]
        if self.cause:
            lines.append(f"  {self.cause}")
        if lost and lost != (self.subject,):
            lines += _lost_lines(lost, whole)
        return "\n".join(lines)

    def values(self) -> dict[str, Any]:
        """Return the problem as plain values."""
        return {**vars(self), "lost": list(self.lost)}

    def _rest(self) -> tuple[str, ...]:
        return self.what, self.needed, self.found, self.cause

    def _kind(self) -> tuple[str, ...]:
        return tuple(NUMBER.sub(".*", text) for text in self._rest())


def _lost_lines(names: Sequence[str], whole: bool) -> list[str]:
    """Return what is lost in a few lines, the most first; with `whole`, each name on a line."""
    names = sorted(set(names), key=natural)
    folded = [Fold(1, name) for name in names] if whole else folds(names)
    if len(folded) == 1:
        return [f"  lost with it: {folded[0]}"]
    folded.sort(key=lambda fold: -fold.count)
    few = folded if whole else folded[:_MAX_LOST]
    lines = [f"  lost with it: {len(names):,} stored tensors", *(f"    {fold}" for fold in few)]
    if more := sum(fold.count for fold in folded[len(few) :]):
        lines.append(f"    and {more:,} more")
    return lines


class CheckpointError(MlaToolsError):
    """All problems of a checkpoint or an output.

    `problems` holds each one. The message gives each cause once, with the lost tensors, and leaves out what
    follows from it; it folds problems that differ only in their names. With `whole`, it lists every problem.
    """

    def __init__(self, problems: Sequence[Problem], *, whole: bool = False) -> None:
        self.problems = tuple(problems)
        super().__init__(_each(self.problems) if whole else _folded(self.problems))

    def in_full(self) -> CheckpointError:
        """Return the same error with a message that lists every problem separately."""
        return type(self)(self.problems, whole=True)


def _each(problems: Sequence[Problem]) -> str:
    texts = (problem.text([problem.subject], problem.lost, whole=True) for problem in problems)
    return "\n\n".join([_count(len(problems)), *texts])


def _folded(problems: Sequence[Problem]) -> str:
    losses = _Losses(problems)
    listed = [problem for problem in problems if not losses.explains(problem)]
    groups: dict[tuple[str, ...], list[Problem]] = defaultdict(list)
    for problem in listed:
        groups[problem._kind()].append(problem)
    blocks = [_block(members) for members in list(groups.values())[:_MAX_GROUPS]]
    if len(groups) > _MAX_GROUPS:
        blocks.append(f"... and {len(groups) - _MAX_GROUPS} more kinds of problems")
    head = _count(len(listed))
    if following := len(problems) - len(listed):
        causes = sum(bool(problem.reason) for problem in listed)
        verb = "may follow" if losses.guessed else "follows" if following == 1 else "follow"
        which = "it" if causes == len(listed) == 1 else "what is lost"
        head += f", and {following:,} that {verb} from {which} (--json lists them)"
    return "\n\n".join([head, *blocks])


def _count(number: int) -> str:
    return "1 problem" if number == 1 else f"{number} problems"


def _block(members: Sequence[Problem]) -> str:
    """Return problems of one kind as lines: all of their subjects, and the rest of the first."""
    first = members[0]
    subjects = fold_files(fold_names(problem.subject for problem in members))
    lost = tuple(name for problem in members for name in problem.lost)
    if lost == tuple(problem.subject for problem in members):
        lost = ()
    text = first.text(subjects, lost)
    if any(problem._rest() != first._rest() for problem in members):
        text += f"\n  (the lines above describe the first of {len(members)})"
    return text


class _Losses:
    """What is lost by some problems, and which others follow from that.

    Some say so: the loss is their cause. Of others it is a good guess: a weight whose scale is lost cannot be
    read or seems to have another shape, a scale whose weight is lost belongs to nothing, and their module is
    missing. Where it is not known what a file held, that may be true of all weights and scales.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        causes = [problem for problem in problems if problem.reason]
        self.guessed = False
        self._blind = any(not problem.lost for problem in causes)
        self._reasons = {problem.reason for problem in causes}
        self._modules = {name.rpartition(".")[0] for problem in causes for name in problem.lost}
        self._folded: dict[tuple[int, ...], set[str]] = {}

    def explains(self, problem: Problem) -> bool:
        """Return whether a problem follows from what others have lost."""
        if problem.reason or not self._reasons:
            return False
        if self._reasons.issuperset(problem.cause.split("\n  ")):
            return True
        found = (self._blind and _lacks(problem)) or any(map(self._is_lost, _modules(problem)))
        self.guessed = self.guessed or found
        return found

    def _is_lost(self, module: str) -> bool:
        """Return whether tensors of a module are lost, or of one of those that a folded name stands for."""
        if "{" not in module:
            return module in self._modules
        words = _BRACES.sub("*", module).split(".")
        places = tuple(place for place, word in enumerate(words) if word == "*")
        if places not in self._folded:
            self._folded[places] = {_starred(name.split("."), places) for name in self._modules}
        return ".".join(words) in self._folded[places]


_ALONE = "would be dropped for a wrong reason"


def _lacks(problem: Problem) -> bool:
    """Return whether a problem is that something else is not there."""
    scale = problem.cause.startswith("It looks like a scale whose weight is missing")
    gone = problem.what.endswith(("cannot be read", " do not fit together", "missing"))
    return scale or gone or problem.what == _ALONE


def _modules(problem: Problem) -> tuple[str, ...]:
    """Return the modules that a problem is about, if what they lack can be the cause of it."""
    if problem.what in ("cannot be read", "unknown tensor"):
        return (problem.subject.rpartition(".")[0],)
    if problem.what.endswith((" do not fit together", " shape", "shape mismatch", "missing")):
        return problem.subject, problem.needed.partition("  ")[0]
    return (problem.needed.partition(" ")[0],) if problem.what == _ALONE else ()


def _starred(words: list[str], places: tuple[int, ...]) -> str:
    return ".".join("*" if place in places else word for place, word in enumerate(words))


class ChangedError(CheckpointError):
    """A checkpoint is not what it was when its conversion was planned."""

    resumable = False
