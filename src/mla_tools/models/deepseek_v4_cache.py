"""What a DeepSeek V4 layer keeps between calls, and which of its rows each call may read.

A layer remembers the latents of the last `sliding_window - 1` tokens. A layer with a compressor also has
an entry for each closed group of `ratio` tokens, and the last projected tokens: those of the open group
and, where neighbouring groups overlap, those of the group before it. An indexer has both once more, in
its own width. Only the entries grow.

Everything follows from the number of tokens that each row of the batch has seen, which is known on the
host: entry i is of the tokens [i * ratio, (i + 1) * ratio), and a query at position p sees the entries
below (p + 1) // ratio. So rows of a batch may be of different lengths, and padding on the right only has
to be left out when rows are stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

__all__ = ["ArraysCache", "Groups", "Span", "runs"]

# Entries are allocated for this many tokens at a time, as mlx-lm's caches are.
GROWTH = 256


@dataclass(frozen=True)
class Span:
    """The tokens of one call: `length` of them, after `offsets` others; in row b only `counts[b]` count."""

    offsets: tuple[int, ...]
    counts: tuple[int, ...]
    length: int

    @property
    def aligned(self) -> bool:
        """Whether all rows of the batch stand at the same position."""
        return len(set(self.offsets)) == 1

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(offset + count for offset, count in zip(self.offsets, self.counts, strict=True))

    def past(self, size: int) -> int:
        """Return how many of the last `size` tokens before the call there are, in the longest row."""
        return min(max(self.offsets), size)

    def first(self, ratio: int) -> list[int]:
        """Return for each row the number of the group that is open when the call begins."""
        return [offset // ratio for offset in self.offsets]

    def closed(self, ratio: int) -> int:
        """Return how many groups the call closes, in the row where it closes most."""
        return max(end // ratio - first for end, first in zip(self.ends, self.first(ratio), strict=True))

    def visible(self, ratio: int, query: int) -> list[int]:
        """Return for each row the entries that the token `query` of the call sees; padding sees no more."""
        seen = zip(self.offsets, self.ends, strict=True)
        return [min(offset + query + 1, end) // ratio for offset, end in seen]


def runs(x: mx.array, starts: Sequence[int], length: int) -> mx.array:
    """Return [B, length, D]: from each row of x, `length` consecutive ones from `starts[b]` on.

    What lies outside of x are numbers without a meaning, which the caller leaves unread.
    """
    total = x.shape[1]
    if len(set(starts)) == 1 and starts[0] >= 0 and starts[0] + length <= total:
        return x[:, starts[0] : starts[0] + length]
    index = np.clip(np.asarray(starts)[:, None] + np.arange(length), 0, total - 1)
    return mx.take_along_axis(x, mx.array(index)[..., None], axis=1)


class Tail:
    """The last `size` rows of a stream of rows [B, _, D], in order; the newest of each batch row is last."""

    def __init__(self, size: int) -> None:
        self.size = size
        # Free places behind the last rows: single tokens are written there, and only when none is left
        # are the rows moved to the front.
        self.room = size // 8 + 1
        self.buffer: mx.array | None = None
        self.end = 0

    @property
    def rows(self) -> mx.array | None:
        return None if self.buffer is None else self.buffer[:, : self.end][:, -self.size :]

    @rows.setter
    def rows(self, rows: mx.array | None) -> None:
        self.buffer, self.end = rows, 0 if rows is None else rows.shape[1]

    def append(self, new: mx.array, span: Span) -> mx.array:
        """Return [B, past + L, D], the last rows with `new` behind them, and keep the last of those."""
        past = span.past(self.size)
        ends = max(span.ends)
        if span.length <= self.room and min(span.counts) == span.length:
            self._make_room(new, past)
            assert self.buffer is not None
            self.buffer[:, self.end : self.end + span.length] = new
            self.end += span.length
            return self.buffer[:, self.end - span.length - past : self.end]
        old = self.buffer[:, self.end - past : self.end] if self.buffer is not None and past else None
        rows = new if old is None else mx.concatenate([old, new], axis=1)
        keep = min(ends, self.size)
        kept = runs(rows, [past + count - keep for count in span.counts], keep)
        # A copy: a view would hold the memory of the whole call.
        self.rows = mx.contiguous(kept) if kept.shape[1] < rows.shape[1] else kept
        return rows

    def _make_room(self, new: mx.array, past: int) -> None:
        batch, length, width = new.shape
        if self.buffer is not None and self.end + length <= self.buffer.shape[1]:
            return
        room = mx.zeros((batch, self.room, width), new.dtype)
        if self.buffer is None or not past:
            self.buffer, self.end = room, 0
        else:
            self.buffer = mx.concatenate([self.buffer[:, self.end - past : self.end], room], axis=1)
            self.end = past


class Entries:
    """A growing list of rows [B, n, D]; what lies behind the count of a batch row has no meaning."""

    def __init__(self, growth: int) -> None:
        self.growth = growth
        self.rows: mx.array | None = None

    def write(self, new: mx.array, starts: Sequence[int]) -> None:
        """Put new [B, g, D] at `starts[b]` in each row b."""
        batch, count, width = new.shape
        need, have = max(starts) + count, 0 if self.rows is None else self.rows.shape[1]
        if need > have:
            size = math.ceil(need / self.growth) * self.growth
            room = mx.zeros((batch, size - have, width), new.dtype)
            self.rows = room if self.rows is None else mx.concatenate([self.rows, room], axis=1)
        assert self.rows is not None
        if len(set(starts)) == 1:
            self.rows[:, starts[0] : need] = new
        else:
            index = mx.array(np.asarray(starts)[:, None] + np.arange(count))
            self.rows[mx.arange(batch)[:, None], index] = new


class Groups:
    """The state of one compressor: the projected tokens that a later entry needs, and the entries.

    `overlap` means that an entry reads the group before its own too.
    """

    def __init__(self, ratio: int, *, overlap: bool) -> None:
        self.ratio = ratio
        self.tokens = Tail(2 * ratio - 1 if overlap else ratio - 1)
        self.entries = Entries(max(GROWTH // ratio, 1))


class ArraysCache:
    """The cache of one layer, for requests alone and in batches, as mlx-lm's generation uses caches.

    mlx-lm reads a saved prompt cache by the names of its own classes, and `mlx_lm generate` does so before
    it has loaded the model. The state here is a list of arrays, as that of mlx-lm's ArraysCache is, and the
    class has that name: what is saved comes back as an ArraysCache of mlx-lm's, and the model takes the
    arrays over with `adopt`.
    """

    def __init__(self, window: int, ratio: int = 0, *, overlap: bool = False, indexed: bool = False) -> None:
        self.shape = (window, ratio, overlap, indexed)
        self.offsets: list[int] = [0]
        self.window = Tail(window - 1)
        self.compressor = Groups(ratio, overlap=overlap) if ratio else None
        self.indexer = Groups(ratio, overlap=overlap) if indexed else None
        # While a prompt is read that is padded on the right: the tokens of each row that are still to come.
        self._remaining: list[int] | None = None

    # ---- the model's side

    def span(self, batch: int, length: int) -> Span:
        """Return what the next `length` tokens of `batch` rows are to this cache."""
        if len(self.offsets) != batch:
            if any(self.offsets):
                raise ValueError(f"The cache holds {len(self.offsets)} requests, and {batch} are asked for.")
            self.offsets = [0] * batch
        counts = self._remaining or [length] * batch
        clipped = tuple(min(max(count, 0), length) for count in counts)
        return Span(tuple(self.offsets), clipped, length)

    def advance(self, span: Span) -> None:
        """Count the tokens of a call, after all that it stored."""
        self.offsets = list(span.ends)
        if self._remaining is not None:
            self._remaining = [count - span.length for count in self._remaining]

    def adopt(self, saved: Any) -> ArraysCache:
        """Return this cache with the state that a saved one of mlx-lm's model class holds."""
        self.state = saved.state
        return self

    # ---- mlx-lm's side

    @property
    def state(self) -> tuple[list[mx.array | None], None, None]:
        """The arrays, in the form of mlx-lm's ArraysCache; the first has the tokens seen."""
        arrays = [part.rows for part in self._parts()]
        return [mx.array(self.offsets), *arrays], None, None

    @state.setter
    def state(self, state: tuple[Sequence[mx.array | None], Any, Any]) -> None:
        offsets, *arrays = state[0]
        if offsets is None or len(arrays) != len(self._parts()):
            raise ValueError("The saved cache is not one of this model.")
        self.offsets = [int(offset) for offset in np.array(offsets)]
        for part, rows in zip(self._parts(), arrays, strict=True):
            part.rows = rows

    def is_trimmable(self) -> bool:
        """False: tokens that left the window, and those of closed groups, cannot be brought back."""
        return False

    def trim(self, n: int) -> int:
        """Return 0, the number of tokens taken back."""
        return 0

    def size(self) -> int:
        return max(self.offsets)

    def empty(self) -> bool:
        return not any(self.offsets)

    @property
    def nbytes(self) -> int:
        tails = [part.buffer if isinstance(part, Tail) else part.rows for part in self._parts()]
        return sum(array.nbytes for array in tails if array is not None)

    @classmethod
    def merge(cls, caches: Sequence[ArraysCache]) -> ArraysCache:
        """Return one cache with the rows of all."""
        merged = caches[0]._like()
        merged._join(caches)
        return merged

    def extend(self, other: ArraysCache) -> None:
        """Append the rows of another cache."""
        self._join([self, other])

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep only these rows of the batch."""
        self._take(self, list(batch_indices))

    def extract(self, idx: int) -> ArraysCache:
        """Return the cache of one row of the batch, without the room that the others needed."""
        one = self._like()
        one._take(self, [idx])
        _, ratio, _, _ = self.shape
        count = one.offsets[0]
        for part in one._parts():
            if part.rows is not None:
                cut = part.rows[:, -count:] if isinstance(part, Tail) else part.rows[:, : count // ratio]
                part.rows = mx.contiguous(cut) if count and cut.shape[1] else None
        return one

    def prepare(
        self,
        *,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
        left_padding: Sequence[int] | None = None,
    ) -> None:
        """Expect prompts of these lengths, padded on the right to the longest, until `finalize`."""
        if left_padding is not None and any(left_padding):
            raise ValueError("This cache takes prompts that are padded on the right, not on the left.")
        if lengths is not None:
            self._remaining = [int(length) for length in lengths]

    def finalize(self) -> None:
        """Expect no more padding."""
        self._remaining = None

    # ---- both

    def _parts(self) -> list[Tail | Entries]:
        groups = [groups for groups in (self.compressor, self.indexer) if groups is not None]
        return [self.window, *(part for group in groups for part in (group.tokens, group.entries))]

    def _like(self) -> ArraysCache:
        window, ratio, overlap, indexed = self.shape
        return ArraysCache(window, ratio, overlap=overlap, indexed=indexed)

    def _take(self, other: ArraysCache, rows: list[int]) -> None:
        for part, source in zip(self._parts(), other._parts(), strict=True):
            part.rows = None if source.rows is None else source.rows[mx.array(rows)]
        self.offsets = [other.offsets[row] for row in rows]
        remaining = other._remaining
        self._remaining = None if remaining is None else [remaining[row] for row in rows]

    def _join(self, caches: Sequence[ArraysCache]) -> None:
        """Take the rows of all caches: tails aligned at their ends, entries at their beginnings."""
        sizes = [len(cache.offsets) for cache in caches]
        for i, part in enumerate(self._parts()):
            found = [cache._parts()[i].rows for cache in caches]
            known = [rows for rows in found if rows is not None]
            if not known:
                continue
            length, width, dtype = max(rows.shape[1] for rows in known), known[0].shape[2], known[0].dtype
            padded = []
            for rows, size in zip(found, sizes, strict=True):
                rows = mx.zeros((size, 0, width), dtype) if rows is None else rows
                short = length - rows.shape[1]
                pad = (short, 0) if isinstance(part, Tail) else (0, short)
                padded.append(mx.pad(rows, [(0, 0), pad, (0, 0)]) if short else rows)
            part.rows = mx.concatenate(padded)
        if any(cache._remaining is not None for cache in caches):
            raise ValueError("Caches are joined between prompts, not within one that is padded.")
        self.offsets = [offset for cache in caches for offset in cache.offsets]
