"""What lies in an output folder: its names, and what the journals and the record among them say."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mla_tools.files.directory import Directory, partial_name
from mla_tools.output.journal import CLEARING, State, read_journals
from mla_tools.output.record import CONFIG, INDEX, LISTED, MAX_RECORD, RECORD, Record, names_of

__all__ = ["Found", "find_record"]


@dataclass(frozen=True)
class Found:
    """What lies in a folder: its names, the journals among them, what these began with, and the record.

    `state` is what the journals call done.
    """

    names: frozenset[str]
    journals: frozenset[str]
    begun: Mapping[str, dict[str, Any]]
    record: Record | None
    state: State

    @classmethod
    def of(cls, folder: Directory) -> Found:
        held = read_journals(folder)
        begun = {name: first for name, (first, _) in held.items() if first is not None}
        names = frozenset(folder.names())
        return cls(names, frozenset(held), begun, find_record(folder), State.of(held))

    @property
    def unfinished(self) -> bool:
        """Whether an output was begun here: by what a journal says, or by there being nothing but the first
        of what a conversion makes, whose journal the power cut came too early for."""
        rest = self.names - self.journals
        return bool(self.begun) or bool(self.journals and all(map(_is_partial, rest)))

    @property
    def clearing(self) -> bool:
        """Whether the removal of an output was begun here, and what is removed is on record."""
        return CLEARING in self.begun

    def ours(self) -> set[str]:
        """Return the names of all files that the conversions which were here may have made."""
        names = self._listed(*LISTED) | ({RECORD, INDEX, CONFIG} if self.begun else set())
        if self.record is not None:
            names |= {RECORD, *self.record.files}
        if self.journals and not self.clearing:
            # What still has its temporary name did not get the final one from us, and before the last
            # weight file was complete nothing did.
            final = {name for name in names if partial_name(name) not in self.names}
            names = (final if self._named_files else set()) | {partial_name(name) for name in names}
        partials = {partial_name(name) for name in names if not _is_partial(name)}
        return names | partials | self.journals

    @property
    def _named_files(self) -> bool:
        """Whether an interrupted run had come so far that it gave files their final names."""
        weights = self._listed("files")
        return self.record is not None or (bool(weights) and weights <= self.state.sealed.keys())

    def _listed(self, *keys: str) -> set[str]:
        """Return the names of the files that the journals were begun for."""
        outputs = (first.get("provenance", first) for first in self.begun.values())
        return {
            name
            for output in outputs
            for name in names_of(output.get("output") if isinstance(output, dict) else None, *keys)
        }


def _is_partial(name: str) -> bool:
    return name.endswith(partial_name(""))


def find_record(folder: Directory) -> Record | None:
    """Return the record of a folder, None if it has no sound one."""
    data = folder.read(RECORD, MAX_RECORD)
    if data is not None:
        with suppress(ValueError):
            return Record.parse(data)
    return None
