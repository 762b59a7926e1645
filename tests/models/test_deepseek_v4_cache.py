"""The caches of the DeepSeek V4 model: their bytes, what of a stream they keep, and what they refuse."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    can_trim_prompt_cache,
    trim_prompt_cache,
)
from reference_v4 import CONFIG, reference, relative, tokens

from mla_tools.models.deepseek_v4 import SCORES, Model, ModelArgs
from mla_tools.models.deepseek_v4_cache import (
    ENTRIES,
    TAILS,
    TOKENS,
    WINDOW,
    BatchEntries,
    Span,
    adopt,
    append_entries,
    append_rows,
    arrays,
    count_tokens,
    make_layer_cache,
    tail,
)


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
        numbers += min(positions, args.sliding_window) * args.head_dim
        if ratio:
            # The tokens of the open group, two projections each; and with overlap two halves of each,
            # and the tokens of the group before.
            halves, groups = (2, 2) if ratio == 4 else (1, 1)
            widths = [args.head_dim, args.index_head_dim] if ratio == 4 else [args.head_dim]
            for width in widths:
                numbers += min(positions, groups * ratio - 1) * 2 * halves * width
                numbers += positions // ratio * width
    return 4 * numbers


def written(layers: list[CacheList], args: ModelArgs, positions: int) -> None:
    """Bring caches to a position as a prompt does that is read in chunks, without computing it."""
    for start in range(0, positions, 2000):
        length = min(2000, positions - start)
        span = Span.of(layers, 1, length)
        none = mx.zeros((1, 1, length, 0))
        for cache, ratio in zip(layers, args.compress_ratios, strict=True):
            count_tokens(cache[TOKENS], none)
            append_rows(cache[WINDOW], mx.zeros((1, 1, length, args.head_dim)), none)
            if ratio:
                halves, size, count = (
                    (2, 7, span.closed(ratio)) if ratio == 4 else (1, ratio - 1, span.closed(ratio))
                )
                widths = [args.head_dim, args.index_head_dim if ratio == 4 else 0]
                for slot, width in enumerate(filter(None, widths)):
                    tail(cache[TAILS], slot, mx.zeros((1, length, 2 * halves * width)), size)
                if count:
                    new = [mx.zeros((1, 1, count, width)) for width in widths]
                    append_entries(cache[ENTRIES], *new, span, ratio)
            mx.eval([part.state for part in layers])


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
    padded=st.booleans(),
    data=st.data(),
)
def test_a_tail_holds_the_last_rows_of_each_stream(
    size: int, chunks: list[int], padded: bool, data: st.DataObject
) -> None:
    streams: list[list[float]] = [[], []]
    cache = ArraysCache(1)
    for length in chunks:
        counts = [data.draw(st.integers(0, length)) if padded else length, length]
        if padded:
            cache.prepare(lengths=counts)
        new = np.full((2, length, 1), -1.0, np.float32)
        before = [stream[-size:] for stream in streams]
        for row, count in enumerate(counts):
            fresh = [100.0 * row + len(streams[row]) + i for i in range(count)]
            new[row, :count, 0] = fresh
            streams[row] += fresh
        rows = np.array(tail(cache, 0, mx.array(new), size))[..., 0]
        cache.finalize()
        assert rows.shape == (2, size + length)
        for row, stream in enumerate(streams):
            known, kept = before[row], np.array(cache[0])[row, :, 0].tolist()
            assert rows[row, :size].tolist() == [0.0] * (size - len(known)) + known
            assert rows[row, size:].tolist() == new[row, :, 0].tolist()
            assert kept == [0.0] * (size - len(stream)) + stream[-size:]


def entries_of(rows: list[int]) -> BatchEntries:
    """Return the entries of requests that have so many, numbered from 1 on."""
    caches = [make_layer_cache(4, 4) for _ in rows]
    for cache, count in zip(caches, rows, strict=True):
        if count:
            numbers = mx.arange(1.0, count + 1)[None, None, :, None]
            cache[ENTRIES].update_and_fetch(numbers, -numbers)
            count_tokens(cache[TOKENS], mx.zeros((1, 1, 4 * count, 0)))
            append_rows(cache[WINDOW], mx.zeros((1, 1, 4 * count, 1)), mx.zeros((1, 1, 4 * count, 0)))
            cache[TAILS][0] = mx.zeros((1, 3, 1))
    merged = CacheList.merge(caches)
    adopt(merged)
    return merged[ENTRIES]


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=4), data=st.data())
def test_entries_of_requests_that_close_groups_at_different_tokens(
    counts: list[int], data: st.DataObject
) -> None:
    entries = entries_of(counts)
    for _ in range(data.draw(st.integers(0, 5))):
        act = data.draw(st.sampled_from(["write", "filter", "extend"]))
        if act == "write":
            fresh = [data.draw(st.integers(0, 3)) for _ in counts]
            ends = [count + more for count, more in zip(counts, fresh, strict=True)]
            if max(fresh):
                # What lies behind the new entries of a row has no meaning.
                new = mx.array(counts)[:, None] + mx.arange(1, max(fresh) + 1)
                new = mx.where(new <= mx.array(ends)[:, None], new, 99)[:, None, :, None].astype(mx.float32)
                entries.write(new, -new, counts, ends)
            counts = ends
        elif act == "filter":
            keep = sorted(data.draw(st.sets(st.integers(0, len(counts) - 1), min_size=1)))
            entries.filter(keep)
            counts = [counts[row] for row in keep]
        else:
            more = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=2))
            entries.extend(entries_of(more))
            counts = counts + more
    for row, count in enumerate(counts):
        one = entries.extract(row)
        assert one.offset == count == one.size()
        if count:
            keys, values = one.keys_and_values()
            assert keys.flatten().tolist() == list(range(1, count + 1))
            assert values.flatten().tolist() == [-number for number in range(1, count + 1)]


# ---- what mlx-lm asks


def test_nothing_can_be_trimmed(model: Model) -> None:
    cache = model.make_cache()
    assert not can_trim_prompt_cache(cache)
    model(mx.array([tokens(20)]), cache=cache)
    assert trim_prompt_cache(cache, 3) == 0
    assert not can_trim_prompt_cache(cache)
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
        assert layer.extract(1)[TOKENS].offset == layer.extract(1).size() == 9
    mx.eval(model(mx.array([[3], [4]]), cache=merged))
    for layer in merged:
        layer.filter([1])
    found = np.array(model(mx.array([[5]]), cache=merged))[0]
    assert relative(found, reference("plain").logits([*short, 4, 5])[-1:]) < 1e-5


def test_another_batch_is_refused(model: Model) -> None:
    cache = model.make_cache()
    model(mx.array([tokens(5)]), cache=cache)
    with pytest.raises(ValueError, match="The cache holds 1 requests, and 3 are asked for"):
        model(mx.array([[1], [2], [3]]), cache=cache)
    merged = [layer.merge([layer, layer]) for layer in cache]
    with pytest.raises(ValueError, match="The cache holds 2 requests, and 1 are asked for"):
        model(mx.array([[1]]), cache=merged)


@pytest.mark.parametrize(
    ("counts", "step"), [((0, 5), 25), ((1, 40), 25), ((40, 1), 25), ((17, 40), 13), ((2, 5), 4)]
)
def test_a_padded_prompt_behind_requests_of_different_lengths(
    model: Model, counts: tuple[int, int], step: int
) -> None:
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
    parts = [model(padded[:, i : i + step], cache=merged) for i in range(0, length, step)]
    for layer in merged:
        layer.finalize()
    logits = np.concatenate([np.array(part) for part in parts], axis=1)
    alone = [[layer.extract(row) for layer in merged] for row in range(2)]
    last = np.array(model(mx.array([[7], [8]]), cache=merged))
    for row, extra in enumerate((7, 8)):
        truth = reference("plain").logits([*known[row], *new[row], extra])[len(known[row]) :]
        found = np.concatenate([logits[row, : counts[row]], last[row]])
        assert relative(found, truth) < 1e-5
        assert [layer.size() for layer in alone[row]] == [len(known[row]) + counts[row]] * 6
        assert relative(np.array(model(mx.array([[extra]]), cache=alone[row]))[0], truth[-1:]) < 1e-5


# ---- graphs


def edges(cache: list[CacheList], folder: Path) -> int:
    """Return how many edges the graph of what is not evaluated has, behind all arrays of a cache."""
    held = [array for layer in cache for array in arrays(layer)]
    mx.export_to_dot(str(folder / "graph.dot"), *held)
    return (folder / "graph.dot").read_text().count("->")


@pytest.mark.parametrize("requests", [1, 2])
def test_no_graph_grows_while_decoding(requests: int, tmp_path: Path) -> None:
    # Nothing reads the entries of the indexer as long as there are no more than a query may choose.
    args = ModelArgs.from_dict({**NARROW, "index_topk": 64, "vocab_size": 320})
    model = Model(args)
    cache = model.make_cache()
    mx.eval(model(mx.array([tokens(20)]), cache=cache))
    if requests > 1:
        cache = [layer.merge([layer] * requests) for layer in cache]
    for token in tokens(30):
        logits = model(mx.array([[token]] * requests), cache=cache)
        assert edges(cache, tmp_path) > 100
        mx.eval(logits)
        assert edges(cache, tmp_path) == 0


# ---- memory

LONG = 100_000


@pytest.mark.parametrize("queries", [128, 1], ids=["prompt", "token"])
def test_temporary_memory_at_100k_tokens(queries: int) -> None:
    # One layer that chooses entries, and nothing else of a size that counts.
    args = ModelArgs.from_dict(
        {
            **NARROW,
            "num_hidden_layers": 1,
            "compress_ratios": [4],
            "num_hash_layers": 1,
            "index_n_heads": 64,
            "index_head_dim": 16,
            "index_topk": 16,
        }
    )
    model = Model(args)
    model.set_dtype(mx.bfloat16, lambda dtype: dtype == mx.float32)
    # On a CPU, MLX has no gathered experts in bfloat16.
    model.layers[0].ffn.set_dtype(mx.float32)
    cache = model.make_cache()
    count = LONG // args.compress_ratios[0]
    none = mx.zeros((1, 1, LONG, 0))
    count_tokens(cache[0][TOKENS], none)
    append_rows(cache[0][WINDOW], mx.zeros((1, 1, LONG, args.head_dim), mx.bfloat16), none)
    for slot, width in enumerate((args.head_dim, args.index_head_dim)):
        cache[0][TAILS][slot] = mx.zeros((1, 7, 4 * width), mx.bfloat16)
    entries = mx.random.normal((1, 1, count + 100, args.head_dim)).astype(mx.bfloat16)
    keys = mx.random.normal((1, 1, count + 100, args.index_head_dim)).astype(mx.bfloat16)
    cache[0][ENTRIES].keys, cache[0][ENTRIES].values, cache[0][ENTRIES].offset = entries, keys, count
    mx.eval(model.parameters(), [array for layer in cache for array in arrays(layer)])
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model(mx.array([tokens(queries)]), cache=cache))
    used = mx.get_peak_memory() - before
    # A score of a head: the product, which a CPU makes in float32 first, clamped, and in float32 again.
    # A sum over the heads: negated, masked, and sorted, with two masks and the places.
    scores = count * args.index_n_heads if queries == 1 else SCORES
    bound = scores * (4 + 2 + 2 + 4) + queries * count * 4 * 6
    # Entries and keys are written to their places, and taken in another layout.
    bound += 2 * (entries.nbytes + keys.nbytes)
    assert used < bound
    # All scores of a block of queries in float32 would be twice as much.
    assert queries == 1 or bound < queries * count * args.index_n_heads * 4 / 2


# ---- options without an effect


def generated(model: Model, **options: Any) -> list[int]:
    found = generate_step(mx.array(tokens(20)), model, max_tokens=3, **options)
    return [token for token, _ in found]


def test_options_that_have_no_effect_say_so(model: Model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = generated(model)
        # Not yet: the cache is shorter.
        assert generated(model, kv_bits=4, quantized_kv_start=1000) == expected
    with pytest.warns(UserWarning, match="max_kv_size has no effect on DeepSeek V4"):
        assert generated(model, max_kv_size=8) == expected
    with pytest.warns(UserWarning, match="kv_bits has no effect on DeepSeek V4"):
        assert generated(model, kv_bits=4, quantized_kv_start=0) == expected
    # A copy answers for itself.
    cache = model.make_cache()
    model(mx.array([tokens(20)]), cache=cache)
    twin = copy.deepcopy(cache)
    with pytest.warns(UserWarning, match="kv_bits"):
        assert twin[0].to_quantized(group_size=64, bits=4) is twin[0]
