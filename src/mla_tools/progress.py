"""The progress of a conversion on stderr: a bar on a terminal, otherwise a line from time to time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TextIO

from mla_tools.console import say
from mla_tools.convert import Progress
from mla_tools.report import human_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Bar", "Lines", "telling"]

# A line comes when another tenth is done, or after so long, and never sooner than after the shortest time.
_LINES = 10
_SECONDS, _MOST_SECONDS = 10, 600


@contextmanager
def telling(stream: TextIO | None = None) -> Iterator[Callable[[Progress], None]]:
    """Yield the progress display that suits stderr."""
    with ExitStack() as stack:
        yield stack.enter_context(Bar()) if (stream or sys.stderr).isatty() else Lines()


class Bar:
    """Bytes, speed and time left on a terminal; a bar for each folder."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._folder: Path | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *given: object) -> None:
        self._stack.close()

    def __call__(self, progress: Progress) -> None:
        """Show how far it is."""
        if progress.folder != self._folder:
            self._folder = progress.folder
            self._stack.close()
            self._bar, self._task = self._begun(progress)
        self._bar.update(self._task, completed=progress.done)

    def _begun(self, progress: Progress) -> tuple[RichProgress, TaskID]:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
        from rich.progress import TransferSpeedColumn as SpeedColumn

        columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), SpeedColumn(), TimeRemainingColumn())
        bar = self._stack.enter_context(RichProgress(*columns, console=Console(stderr=True)))
        return bar, bar.add_task("writing", total=progress.total, completed=progress.done)


class Lines:
    """A line from time to time, for a log; none for short conversions."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        """Print a line, if it is time for one."""
        now = self._clock()
        if self._first is None or progress.folder != self._first.folder:
            self._first, self._last = progress, progress
            self._began = self._reported = now
            return
        silent, more = now - self._reported, progress.done - self._last.done
        if progress.done == progress.total or silent < _SECONDS:
            return
        if more * _LINES >= progress.total or silent >= _MOST_SECONDS:
            self._reported, self._last = now, progress
            say(f"{_line(progress)}{_left(progress, self._first, now - self._began)}")


def _line(progress: Progress) -> str:
    done, total = human_bytes(progress.done), human_bytes(progress.total)
    return f"{progress.folder}: {int(100 * progress.share)} % written, {done} of {total}"


def _left(progress: Progress, first: Progress, seconds: float) -> str:
    """Return how long the rest will take at the speed so far, if anything is known of it."""
    written = progress.done - first.done
    if not written:
        return ""
    left = (progress.total - progress.done) * seconds / written
    minutes = round(left / 60)
    return f", about {minutes} min left" if minutes else ", less than a minute left"
