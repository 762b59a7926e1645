"""An output under way: where its tensors go, what of them is done, and when each file is complete."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from mla_tools.distributed import Group, shares
from mla_tools.errors import DamagedError, MlaToolsError
from mla_tools.files.directory import Directory
from mla_tools.files.writer import Range, Writer, sha256_in
from mla_tools.output.folder import check_kept
from mla_tools.output.journal import Journal, State, done_line, read_journals
from mla_tools.plan import OutputFile, Plan, Target

__all__ = ["Output"]

# So many bytes at most are written twice when a conversion is resumed.
CHECKPOINT_BYTES = 256 << 20


class Output:
    """The folder of a conversion under way.

    The journal is this process's own, open, so that nobody else writes what is read here.
    Targets are counted through the steps of the plan. `write` may be called by any thread, everything
    else by one.
    """

    def __init__(self, plan: Plan, folder: Directory, group: Group, journal: Journal) -> None:
        self._folder, self._journal = folder, journal
        owners = shares([file.layout.size for file in plan.files], group.size)
        self._files: dict[str, OutputFile] = {
            file.name: file for file, rank in zip(plan.files, owners, strict=True) if rank == group.rank
        }
        self._homes = {name: file for file in self._files.values() for name in file.tensors}
        state = State.of(read_journals(folder))
        sealed = {name: digest for name, digest in state.sealed.items() if name in self._files}
        self._sealed = set(sealed)
        self._targets = [target for step in plan.steps for target in step.targets]
        kept = state.kept(self._targets)
        homes = [self._home(target) for target in self._targets]
        mine = {number for number, home in enumerate(homes) if home is not None}
        self.todo = {number for number in mine if number not in kept and homes[number] not in self._sealed}
        self._left = Counter(homes[number] for number in self.todo)
        self._begun: dict[str, dict[str, tuple[Range, ...]]] = {}
        for number in mine & kept.keys():
            self._begun.setdefault(str(homes[number]), {}).update(kept[number])
        self._writers: dict[str, Writer] = {}
        self._lock = threading.Lock()
        self._fresh: list[int] = []
        self._fresh_bytes = 0
        # One thread that waits for the disk, so that those that compute need not, and one that reads again
        # what an earlier run has completed.
        self._keeper, self._checker = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._closing = threading.Event()
        self._kept: list[Future[None]] = []
        for name, digest in sealed.items():
            self._kept.append(self._checker.submit(self._check, name, digest))
        for name in self._files:
            if name not in self._sealed and not self._left[name]:
                self._later(self._seal, name)

    @property
    def done_bytes(self) -> int:
        """The bytes of this rank's tensors that need not be written any more."""
        skipped = (target for number, target in enumerate(self._targets) if number not in self.todo)
        return sum(_nbytes(target) for target in skipped if self._home(target) is not None)

    def _home(self, target: Target) -> str | None:
        file = self._homes.get(next(iter(target.parts.values())))
        return None if file is None else file.name

    def write(self, name: str, start: int, data: Any) -> None:
        """Write a contiguous buffer at byte `start` of a stored tensor."""
        self._writer(self._homes[name].name).write(name, start, data)

    def _writer(self, name: str) -> Writer:
        with self._lock:
            if name not in self._writers:
                path = self._folder.path / name
                begun = self._begun.get(name)
                self._writers[name] = Writer(path, self._files[name].layout, begun, self._folder)
            return self._writers[name]

    def finished(self, number: int) -> None:
        """Take note that all of a target is written."""
        target = self._targets[number]
        name = self._homes[next(iter(target.parts.values()))].name
        self.todo.discard(number)
        self._fresh.append(number)
        self._fresh_bytes += _nbytes(target)
        self._left[name] -= 1
        if not self._left[name]:
            self._later(self._seal, name)
        if self._fresh_bytes >= CHECKPOINT_BYTES:
            self._checkpoint()
        self._look(wait=False)

    def _checkpoint(self) -> None:
        fresh, self._fresh, self._fresh_bytes = self._fresh, [], 0
        if fresh:
            self._later(self._save, fresh)

    def _later(self, work: Any, given: Any) -> None:
        self._kept.append(self._keeper.submit(work, given))

    def _look(self, wait: bool) -> None:
        """Raise what went wrong in the threads that wait for the disk."""
        for future in list(self._kept):
            if wait or future.done():
                future.result()  # stays where it is when it failed, to be raised again
                self._kept.remove(future)

    def _save(self, numbers: Collection[int]) -> None:
        numbers = [number for number in numbers if self._home(self._targets[number]) not in self._sealed]
        homes = {str(self._home(self._targets[number])) for number in numbers}
        writers = [self._writer(name) for name in sorted(homes)]
        for writer in writers:
            writer.sync()
        self._journal.append(done_line((number, self._ranges(number)) for number in sorted(numbers)))
        for writer in writers:
            writer.hash()

    def _ranges(self, number: int) -> list[list[Range]]:
        target = self._targets[number]
        writer = self._writer(str(self._home(target)))
        return [writer.ranges(name) for name in target.stored()]

    def _seal(self, name: str) -> None:
        digest = self._writer(name).seal()
        self._sealed.add(name)
        self._journal.append({"file": name, "sha256": digest})

    def _check(self, name: str, digest: str) -> None:
        """Compare a file that an earlier run has completed with the sha256 that its journal gives."""
        present = check_kept(self._folder, self._files[name])
        found = sha256_in(self._folder, present, self._closing.is_set)
        if found != digest and not self._closing.is_set():
            raise DamagedError(
                f"{self._folder.path / present} is damaged: its bytes have changed since they were"
                f" written; start"
                " again with --overwrite"
            )

    def complete(self) -> None:
        """Return when all of this rank's files are on disk for good, under their temporary names."""
        self._look(wait=True)
        if left := sorted(self._files.keys() - self._sealed):
            raise MlaToolsError(f"{self._folder.path} was not written completely: {', '.join(left)}")

    def close(self) -> None:
        """Let go of the folder; what is unfinished stays so, with as much done as can be kept."""
        self._closing.set()
        try:
            with suppress(MlaToolsError, OSError):
                self._look(wait=True)  # a disk that failed once is not believed afterwards
                self._checkpoint()
                self._look(wait=True)
        finally:
            self._keeper.shutdown()
            self._checker.shutdown()
            for writer in self._writers.values():
                writer.suspend()


def _nbytes(target: Target) -> int:
    return sum(spec.nbytes for spec in target.stored().values())
