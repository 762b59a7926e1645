"""The caches of the DeepSeek V4 model: their bytes, what of a stream they keep, and what they refuse."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
from reference_v4 import CONFIG, reference, relative, tokens

from mla_tools.models.deepseek_v4 import Model, ModelArgs
from mla_tools.models.deepseek_v4_cache import ArraysCache, Entries, Span, Tail, runs


@pytest.fixture(scope="module")
def model() -> Model:
    source = reference("plain")
    model = Model(ModelArgs.from_dict(source.config))
    model.load_weights([(name, mx.array(array)) for name, array in source.weights.items()])
    return model


# ---- bytes

NARROW = {
    **CONFIG,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "head_dim": 8,
    "qk_rope_head_dim": 4,
    "q_lora_rank": 8,
    "moe_intermediate_size": 8,
    "index_n_heads": 1,
    "index_head_dim": 4,
    "hc_sinkhorn_iters": 1,
    "index_topk": 4,
}


def promised(positions: int, args: ModelArgs) -> int:
    """Return the bytes of float32 that the architecture needs after so many tokens."""
    numbers = 0
    for ratio in args.compress_ratios:
        numbers += min(positions, args.sliding_window - 1) * args.head_dim
        if ratio:
            # The tokens of the open group, two projections each; and with overlap two halves of each,
            # and the tokens of the group before.
            halves, groups = (2, 2) if ratio == 4 else (1, 1)
            widths = [args.head_dim, args.index_head_dim] if ratio == 4 else [args.head_dim]
            for width in widths:
                numbers += min(positions, groups * ratio - 1) * 2 * halves * width
                numbers += positions // ratio * width
    return 4 * numbers


def written(layers: list[ArraysCache], args: ModelArgs, positions: int) -> None:
    """Bring caches to a position as a prompt does that is read in chunks, without computing it."""
    for start in range(0, positions, 2000):
        length = min(2000, positions - start)
        for cache, ratio in zip(layers, args.compress_ratios, strict=True):
            span = cache.span(1, length)
            cache.window.append(mx.zeros((1, length, args.head_dim)), span)
            for groups, width in ((cache.compressor, args.head_dim), (cache.indexer, args.index_head_dim)):
                if groups is not None:
                    halves = 2 if ratio == 4 else 1
                    groups.tokens.append(mx.zeros((1, length, 2 * halves * width)), span)
                    groups.entries.write(mx.zeros((1, span.closed(ratio), width)), span.first(ratio))
            cache.advance(span)
            mx.eval(cache.state[0])


@pytest.mark.parametrize("positions", [1_000, 10_000, 100_000])
def test_bytes_are_what_the_architecture_promises(positions: int) -> None:
    args = ModelArgs.from_dict(NARROW)
    cache = Model(args).make_cache()
    written(cache, args, positions)
    needed = promised(positions, args)
    held = sum(layer.nbytes for layer in cache)
    # Entries are allocated for 256 tokens at a time.
    room = sum(
        4 * max(256 // ratio, 1) * (args.head_dim + (args.index_head_dim if ratio == 4 else 0))
        for ratio in args.compress_ratios
        if ratio
    )
    assert needed <= held <= needed + room
    # The share that grows: a quarter or a 128th of an entry per token.
    growth = sum(
        args.head_dim / ratio + (args.index_head_dim / ratio if ratio == 4 else 0)
        for ratio in args.compress_ratios
        if ratio
    )
    assert held == pytest.approx(4 * growth * positions + promised(255, args), rel=0.2)


def test_decoding_adds_bounded_room(model: Model) -> None:
    args = model.args
    cache = model.make_cache()
    model(mx.array([tokens(200)]), cache=cache)
    sizes = []
    for token in tokens(60):
        mx.eval(model(mx.array([[token]]), cache=cache))
        sizes.append([layer.nbytes for layer in cache[:2]])
    # A layer without a compressor: the window, and an eighth of it more.
    rows = args.sliding_window - 1
    assert max(max(size) for size in sizes) <= 4 * args.head_dim * (rows + rows // 8 + 1)


# ---- what is kept


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 12),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    data=st.data(),
)
def test_a_tail_holds_the_last_rows_of_each_stream(size: int, chunks: list[int], data: st.DataObject) -> None:
    streams: list[list[float]] = [[], []]
    tail, offsets = Tail(size), [0, 0]
    for length in chunks:
        counts = [data.draw(st.integers(0, length)), length]
        new = np.full((2, length, 1), -1.0, np.float32)
        for row, count in enumerate(counts):
            fresh = [100.0 * row + len(streams[row]) + i for i in range(count)]
            new[row, :count, 0] = fresh
            streams[row] += fresh
        span = Span(tuple(offsets), tuple(counts), length)
        before = [stream[: len(stream) - count] for stream, count in zip(streams, counts, strict=True)]
        rows = np.array(tail.append(mx.array(new), span))[..., 0]
        past = span.past(size)
        assert rows.shape[1] == past + length
        for row, stream in enumerate(before):
            known = stream[-min(len(stream), past) :] if past and stream else []
            assert rows[row, past - len(known) : past].tolist() == known
        offsets = list(span.ends)
        for row, stream in enumerate(streams):
            known = stream[-size:]
            if known:
                assert tail.rows is not None
                assert np.array(tail.rows)[row, -len(known) :, 0].tolist() == known


@settings(max_examples=60, deadline=None)
@given(
    starts=st.lists(st.integers(-3, 5), min_size=2, max_size=2),
    length=st.integers(1, 8),
)
def test_runs_are_slices_where_they_are_inside(starts: list[int], length: int) -> None:
    rows = np.arange(12.0).reshape(2, 6, 1)
    found = np.array(runs(mx.array(rows), starts, length))
    assert found.shape == (2, length, 1)
    for row, start in enumerate(starts):
        for i in range(length):
            if 0 <= start + i < 6:
                assert found[row, i, 0] == rows[row, start + i, 0]


def test_entries_of_rows_at_different_places() -> None:
    entries = Entries(4)
    entries.write(mx.ones((2, 3, 1)), [0, 0])
    entries.write(2 * mx.ones((2, 2, 1)), [1, 3])
    assert entries.rows is not None
    assert np.array(entries.rows)[..., 0].tolist() == [[1, 2, 2, 0, 0, 0, 0, 0], [1, 1, 1, 2, 2, 0, 0, 0]]


# ---- what mlx-lm asks


def test_nothing_can_be_trimmed(model: Model) -> None:
    cache = model.make_cache()
    assert not can_trim_prompt_cache(cache)
    model(mx.array([tokens(20)]), cache=cache)
    assert trim_prompt_cache(cache, 3) == 0
    assert [layer.trim(3) for layer in cache] == [0] * 6
    assert {layer.size() for layer in cache} == {20}


def test_size_and_empty(model: Model) -> None:
    cache = model.make_cache()
    assert all(layer.empty() and layer.nbytes == 0 for layer in cache)
    model(mx.array([tokens(5)]), cache=cache)
    assert not any(layer.empty() for layer in cache)


def test_a_copy_is_independent(model: Model) -> None:
    ids = tokens(60)
    cache = model.make_cache()
    model(mx.array([ids[:40]]), cache=cache)
    twin = copy.deepcopy(cache)
    other = np.array(model(mx.array([tokens(15, seed=4)]), cache=twin))
    found = np.array(model(mx.array([ids[40:]]), cache=cache))[0]
    assert relative(found, reference("plain").logits(ids)[40:]) < 1e-5
    assert np.isfinite(other).all()


def test_what_is_extracted_has_no_foreign_room(model: Model) -> None:
    long, short = tokens(280, seed=1), tokens(9, seed=2)
    merged: list[Any] = []
    single = [model.make_cache(), model.make_cache()]
    for cache, ids in zip(single, (long, short), strict=True):
        model(mx.array([ids]), cache=cache)
    merged = [a.merge([a, b]) for a, b in zip(*single, strict=True)]
    for layer, alone in zip(merged, single[1], strict=True):
        assert layer.extract(1).nbytes <= alone.nbytes
        assert layer.extract(1).offsets == [9]
    mx.eval(model(mx.array([[3], [4]]), cache=merged))
    for layer in merged:
        layer.filter([1])
    found = np.array(model(mx.array([[5]]), cache=merged))[0]
    assert relative(found, reference("plain").logits([*short, 4, 5])[-1:]) < 1e-5


REFUSALS: dict[str, tuple[Any, str]] = {
    "left-padding": (lambda cache: cache.prepare(left_padding=[0, 2]), "padded on the right"),
    "another-batch": (lambda cache: cache.span(3, 1), "The cache holds 1 requests, and 3 are asked for"),
    "another-model": (lambda cache: cache.adopt(ArraysCache(16, 4, indexed=True)), "not one of this model"),
}


@pytest.mark.parametrize(("act", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_a_cache_refuses(act: Any, message: str) -> None:
    cache = ArraysCache(16)
    cache.advance(cache.span(1, 5))
    with pytest.raises(ValueError, match=message):
        act(cache)


def test_caches_are_not_joined_within_a_padded_prompt() -> None:
    cache, other = ArraysCache(16), ArraysCache(16)
    cache.prepare(lengths=[3], right_padding=[1])
    with pytest.raises(ValueError, match="between prompts"):
        cache.extend(other)


@pytest.mark.parametrize("counts", [(0, 5), (1, 40), (40, 1), (17, 40)])
def test_a_padded_prompt_behind_requests_of_different_lengths(model: Model, counts: tuple[int, int]) -> None:
    # The first has as many entries as there is room for: padding must not look for more.
    known, length = [tokens(383, seed=1), tokens(4, seed=2)], max(counts)
    caches = []
    for ids in known:
        caches.append(model.make_cache())
        model(mx.array([ids]), cache=caches[-1])
    merged: list[Any] = [a.merge([a, b]) for a, b in zip(*caches, strict=True)]
    new = [tokens(count, seed=3 + row) for row, count in enumerate(counts)]
    for layer in merged:
        layer.prepare(lengths=list(counts), right_padding=[length - count for count in counts])
    padded = mx.array([[*ids, *[0] * (length - len(ids))] for ids in new])
    parts = [model(padded[:, i : i + 25], cache=merged) for i in range(0, length, 25)]
    for layer in merged:
        layer.finalize()
    logits = np.concatenate([np.array(part) for part in parts], axis=1)
    last = np.array(model(mx.array([[7], [8]]), cache=merged))
    for row, extra in enumerate((7, 8)):
        truth = reference("plain").logits([*known[row], *new[row], extra])[len(known[row]) :]
        found = np.concatenate([logits[row, : counts[row]], last[row]])
        assert relative(found, truth) < 1e-5
