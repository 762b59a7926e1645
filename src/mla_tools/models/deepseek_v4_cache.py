"""What a DeepSeek V4 layer keeps between calls: a CacheList of mlx-lm's own caches.

    TOKENS   KVCache without numbers: rows of width 0, one for each token seen
    WINDOW   RotatingKVCache: the latents of the last `sliding_window` tokens
    TAILS    ArraysCache: the last projected tokens of the compressor, and those of the indexer's
    ENTRIES  KVCache: one entry for each closed group of `ratio` tokens; its values are the indexer's keys

Only layers with a compressor have the last two. An entry reads the tokens of its group and, where
neighbouring groups overlap, those of the group before it: the tails hold as many tokens as that can be.

So a prompt cache that was saved is read by mlx-lm alone. In a batch, two of mlx-lm's classes do not
suffice. Its requests close groups at different tokens, which BatchKVCache cannot append, and a window can
be given the last token of a padded prompt alone, which BatchRotatingKVCache refuses. `adopt` replaces these
by subclasses, whose requests are extracted as mlx-lm's own classes again.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    KVCache,
    RotatingKVCache,
)

__all__ = [
    "ENTRIES",
    "NO_EFFECT",
    "TAILS",
    "TOKENS",
    "WINDOW",
    "Span",
    "adopt",
    "append_entries",
    "append_rows",
    "arrays",
    "count_tokens",
    "entry_starts",
    "make_layer_cache",
    "refuse_quantization",
    "tail",
]

TOKENS, WINDOW, TAILS, ENTRIES = range(4)

NO_EFFECT = (
    "has no effect on DeepSeek V4: its cache is a window and compressed entries, in the model's dtype."
)


def make_layer_cache(window: int, ratio: int, *, indexed: bool = False) -> CacheList:
    """Return an empty cache of one layer; ratio 0 is for layers without a compressor."""
    if not ratio:
        return CacheList(KVCache(), RotatingKVCache(window))
    entries = KVCache()
    # Room is made for as many tokens at a time as in other layers.
    entries.step = max(KVCache.step // ratio, 1)
    return CacheList(KVCache(), RotatingKVCache(window), ArraysCache(2 if indexed else 1), entries)


def refuse_quantization(cache: CacheList) -> None:
    """Let a cache say that it stays as it is when mlx-lm's generation quantizes caches (kv_bits).

    That calls `to_quantized` of a cache which has it, and takes what is returned, once the cache has an
    `offset` that is large enough.
    """
    tokens = cache[TOKENS]
    if type(tokens) is KVCache:
        cache.offset = tokens.offset
        cache.to_quantized = MethodType(_unquantized, cache)


def _unquantized(cache: CacheList, group_size: int = 64, bits: int = 4) -> CacheList:
    warnings.warn(f"kv_bits {NO_EFFECT}", stacklevel=3)
    return cache


def arrays(cache: CacheList) -> list[mx.array]:
    """Return all arrays of the cache of a layer that a call may have changed."""
    found: list[Any] = []
    for part in cache.caches:
        if isinstance(part, ArraysCache):
            found += part.cache
        else:
            found += [part.keys, part.values, part.offset]
    return [array for array in found if isinstance(array, mx.array)]


def tail(cache: ArraysCache, slot: int, rows: mx.array, size: int) -> mx.array:
    """Return [B, size + L, D], the kept rows with `rows` [B, L, D] behind them, and keep the last `size`.

    Rows from before the first token are zeros.
    """
    batch, length, width = rows.shape
    kept = cache[slot]
    kept = mx.zeros((batch, size, width), rows.dtype) if kept is None else kept.astype(rows.dtype)
    rows = mx.concatenate([kept, rows], axis=1)
    if cache.lengths is None:
        # A copy, unless it is of a single token: a view would hold the memory of the whole call.
        cache[slot] = rows[:, 1:] if length == 1 else mx.contiguous(rows[:, length:])
    else:
        ends = mx.clip(cache.lengths, 0, length)
        index = (ends[:, None] + mx.arange(size))[..., None]
        cache[slot] = mx.take_along_axis(rows, index, axis=1)
    return rows


def count_tokens(cache: KVCache | BatchKVCache, rows: mx.array) -> None:
    """Count the tokens of a call, for which there are rows [B, 1, L, 0]."""
    if (
        type(cache) is KVCache
        and cache.keys is not None
        and cache.offset + rows.shape[2] <= cache.keys.shape[2]
    ):
        # There is nothing to write.
        cache.offset += rows.shape[2]
    else:
        cache.update_and_fetch(rows, rows)


def append_rows(cache: RotatingKVCache | BatchRotatingKVCache, rows: mx.array, none: mx.array) -> mx.array:
    """Return [B, 1, K, D], what the rows [B, 1, L, D] see of a window, and keep as many as it is long."""
    found: mx.array = cache.update_and_fetch(rows, none)[0]
    if type(cache) is RotatingKVCache and cache.keys.shape[2] > cache.max_size:
        # mlx-lm's class would hold the memory of the whole call until the next one.
        keys, values, offset, keep, size, _ = cache.state
        kept = (mx.contiguous(part[:, :, -size:]) for part in (keys, values))
        cache.state = (*kept, offset, keep, size, size)
    return found


def append_entries(
    cache: KVCache | BatchKVCache, keys: mx.array, values: mx.array, span: "Span", ratio: int
) -> None:
    """Put keys and values [B, 1, g, D], of the groups that a call closes, behind those that there are."""
    if isinstance(cache, BatchEntries):
        cache.write(keys, values, span.first(ratio), [end // ratio for end in span.ends])
    else:
        cache.update_and_fetch(keys, values)


def entry_starts(cache: KVCache | BatchKVCache) -> list[int] | None:
    """Return the place of each row's first entry; None where all rows begin at the first place."""
    starts = cache.starts() if isinstance(cache, BatchEntries) else [0]
    return starts if any(starts) else None


@dataclass(frozen=True)
class Span:
    """The tokens of one call: `length` of them, after `offsets` others; in row b only `counts[b]` count."""

    offsets: tuple[int, ...]
    counts: tuple[int, ...]
    length: int

    @classmethod
    def of(cls, caches: Sequence[Any], batch: int, length: int) -> "Span":
        """Return what the next `length` tokens of `batch` rows are to these caches of layers."""
        if not caches or caches[0] is None:
            return cls((0,) * batch, (length,) * batch, length)
        tokens = caches[0][TOKENS]
        have = batch if tokens.keys is None else tokens.keys.shape[0]
        if have != batch:
            raise ValueError(f"The cache holds {have} requests, and {batch} are asked for.")
        if isinstance(tokens, KVCache):
            return cls((tokens.offset,) * batch, (length,) * batch, length)
        seen = tokens.seen()
        if len(seen) != batch:
            raise ValueError(f"The cache holds {len(seen)} requests, and {batch} are asked for.")
        left = next((cache[TAILS].lengths for cache in caches if len(cache.caches) > TAILS), None)
        if left is None:
            return cls(tuple(seen), (length,) * batch, length)
        # In a prompt that is padded on the right, what follows the last token is counted until the end.
        remaining = _integers(left)
        offsets = tuple(offset + min(count, 0) for offset, count in zip(seen, remaining, strict=True))
        return cls(offsets, tuple(min(max(count, 0), length) for count in remaining), length)

    @property
    def aligned(self) -> bool:
        """Whether all rows of the batch stand at the same position, and none is padded."""
        return len(set(self.offsets)) == 1 and min(self.counts) == self.length

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(offset + count for offset, count in zip(self.offsets, self.counts, strict=True))

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


# ---- batches


def _integers(numbers: mx.array) -> list[int]:
    return [int(number) for number in np.array(numbers)]


def adopt(cache: CacheList) -> None:
    """Replace the batch caches of mlx-lm in the cache of a layer by those below; others stay."""
    if type(cache[TOKENS]) is not BatchKVCache:
        return
    parts = list(cache.caches)
    parts[TOKENS], parts[WINDOW] = BatchTokens(parts[TOKENS]), BatchWindow(parts[WINDOW])
    if len(parts) > ENTRIES:
        parts[ENTRIES] = BatchEntries(parts[ENTRIES])
    cache.caches = tuple(parts)


class BatchTokens(BatchKVCache):
    """The numbers of tokens seen, known on the host too, so that no call waits for the one before it."""

    offset: mx.array

    def __init__(self, cache: BatchKVCache) -> None:
        self.__dict__.update(cache.__dict__)
        self._seen: list[int] | None = None

    def seen(self) -> list[int]:
        """Return for each row the number of tokens; padding on the right counts until it is removed."""
        if self._seen is None:
            self._seen = _integers(self.offset)
        return self._seen

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        length = keys.shape[2]
        seen = [count + length for count in self.seen()]
        if self.keys is not None and self._idx + length <= self.keys.shape[2]:
            # There is nothing to write.
            self._idx += length
            self.offset = self.offset + length
        else:
            super().update_and_fetch(keys, values)
        self._seen = seen
        return keys, values

    def finalize(self) -> None:
        super().finalize()
        self._seen = None

    def filter(self, batch_indices: Any) -> None:
        super().filter(batch_indices)
        self._seen = None

    def extend(self, other: BatchKVCache) -> None:
        super().extend(other)
        self._seen = None


class BatchWindow(BatchRotatingKVCache):
    """A window that can be given a single token of a prompt that is padded."""

    keys: mx.array | None
    values: mx.array | None
    left_padding: mx.array
    _idx: int

    def __init__(self, cache: BatchRotatingKVCache) -> None:
        self.__dict__.update(cache.__dict__)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self._lengths is not None:
            return self._update_concat(keys, values)
        rows = super().update_and_fetch(keys, values)
        self._shorten()
        return rows

    def finalize(self) -> None:
        super().finalize()
        self._shorten()

    def _shorten(self) -> None:
        excess = self._idx - self.max_size
        if excess > 0 and self.keys is not None and self.values is not None and not self.rotated:
            self.keys = mx.contiguous(self.keys[:, :, excess : self._idx])
            self.values = mx.contiguous(self.values[:, :, excess : self._idx])
            self.left_padding = self.left_padding - excess
            self._idx = self.max_size

    def make_mask(self, N: int, **kwargs: Any) -> mx.array:  # noqa: N803
        if N == 1 and self._lengths is not None:
            # That of the first of two tokens, which are appended in the same way.
            return super().make_mask(2, **kwargs)[..., :1, :-1]
        return super().make_mask(N, **kwargs)


class BatchEntries(BatchKVCache):
    """The entries of requests that close groups at different tokens.

    Those of row b stand at `left_padding[b]` and behind it, `offset[b]` of them; what follows has no meaning.
    """

    keys: mx.array | None
    values: mx.array | None
    offset: mx.array
    left_padding: mx.array

    def __init__(self, cache: BatchKVCache) -> None:
        self.__dict__.update(cache.__dict__)
        self._starts: list[int] | None = None

    def starts(self) -> list[int]:
        """Return for each row the place of its first entry."""
        if self._starts is None:
            self._starts = _integers(self.left_padding)
        return self._starts

    def write(self, keys: mx.array, values: mx.array, first: Sequence[int], ends: Sequence[int]) -> None:
        """Put keys and values [B, 1, g, D] behind `first[b]` entries of row b; then it has `ends[b]`."""
        batch, heads, count, _ = keys.shape
        places = [start + number for start, number in zip(self.starts(), first, strict=True)]
        need = max(places) + count
        have = 0 if self.keys is None else self.keys.shape[2]
        if need > have:
            more = (need - have + self.step - 1) // self.step * self.step

            def grown(old: mx.array | None, new: mx.array) -> mx.array:
                room = mx.zeros((batch, heads, more, new.shape[-1]), new.dtype)
                return room if old is None else mx.concatenate([old, room], axis=2)

            self.keys, self.values = grown(self.keys, keys), grown(self.values, values)
        for held, new in ((self.keys, keys), (self.values, values)):
            assert held is not None
            if not new.size:
                continue  # without an indexer there are no keys for one, and MLX ends at a scatter of nothing
            if len(set(places)) == 1:
                held[:, :, places[0] : need] = new
            else:
                index = mx.array(places)[:, None] + mx.arange(count)
                held[mx.arange(batch)[:, None], 0, index] = new[:, 0]
        self._idx = max(start + end for start, end in zip(self.starts(), ends, strict=True))
        self.offset = mx.array(list(ends))

    def prepare(self, **kwargs: Any) -> None:
        """Padding counts tokens, and no entry is made of it."""

    def finalize(self) -> None:
        """As `prepare`."""

    def filter(self, batch_indices: Any) -> None:
        super().filter(batch_indices)
        self._starts = None

    def extend(self, other: BatchKVCache) -> None:
        super().extend(other)
        self._starts = None

    def extract(self, idx: int) -> KVCache:
        cache, start, count = KVCache(), self.starts()[idx], _integers(self.offset)[idx]
        if self.keys is not None and self.values is not None and count:
            cache.keys = mx.contiguous(self.keys[idx : idx + 1, :, start : start + count])
            cache.values = mx.contiguous(self.values[idx : idx + 1, :, start : start + count])
            cache.offset = count
        return cache
