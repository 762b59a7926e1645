"""The DeepSeek V4 model against transformers in float32, and against mlx-vlm's class where that is right."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm import generate, load
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from mlx_lm.utils import load_model, save_model
from mlx_vlm.models.deepseek_v4.config import ModelConfig
from mlx_vlm.models.deepseek_v4.deepseek_v4 import Model as VlmModel
from ports import free_ports
from reference_v4 import CONFIG, CONFIGS, Torch, reference, relative, renamed, tokens

from mla_tools.models.bundle import bundled
from mla_tools.models.deepseek_v4 import Model, ModelArgs
from mla_tools.models.deepseek_v4_cache import ENTRIES, WINDOW
from mla_tools.samples import write_tokenizer

# Float32 has 6e-8; the logits of both lie about 1e-6 apart after 6 layers.
TOLERANCE = 1e-5
LENGTH = 300


def model_of(source: Torch) -> Model:
    model = Model(ModelArgs.from_dict(source.config))
    model.load_weights([(name, mx.array(array)) for name, array in source.weights.items()], strict=True)
    model.eval()
    return model


def fed(model: Any, ids: list[int], sizes: list[int], cache: list[Any] | None = None) -> np.ndarray[Any, Any]:
    """Return the logits [L, V] of calls of these sizes."""
    cache, parts, start = cache or model.make_cache(), [], 0
    for size in sizes:
        parts.append(np.array(model(mx.array([ids[start : start + size]]), cache=cache))[0])
        start += size
    return np.concatenate(parts)


def calls(size: int) -> list[int]:
    return [size] * (LENGTH // size) + [LENGTH % size] * (LENGTH % size > 0)


@pytest.fixture(scope="module")
def source() -> Torch:
    # Layers without a compressor have no yarn in it; test_other_configs has none anywhere.
    return reference("yarn")


@pytest.fixture(scope="module")
def model(source: Torch) -> Model:
    return model_of(source)


@pytest.fixture(scope="module")
def truth(source: Torch) -> np.ndarray[Any, Any]:
    return source.logits(tokens(LENGTH))


# ---- one request


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([LENGTH], id="one-shot"),
        *[pytest.param(calls(size), id=f"chunks-of-{size}") for size in (50, 7, 4, 3)],
        pytest.param(calls(1), id="token-by-token"),
        pytest.param([150, *[1] * 40, 5, *[1] * 5, 100], id="mixed"),
    ],
)
def test_logits(model: Model, truth: np.ndarray[Any, Any], sizes: list[int]) -> None:
    assert relative(fed(model, tokens(LENGTH), sizes), truth) < TOLERANCE


def test_without_a_cache(model: Model, truth: np.ndarray[Any, Any]) -> None:
    assert relative(np.array(model(mx.array([tokens(LENGTH)])))[0], truth) < TOLERANCE


def test_what_comes_later_changes_nothing(model: Model, truth: np.ndarray[Any, Any]) -> None:
    ids = tokens(LENGTH)
    assert relative(fed(model, [*ids[:200], *tokens(100, seed=9)], [LENGTH])[:200], truth[:200]) < TOLERANCE


WIDE = {
    "no-yarn": {},
    "more-entries-chosen-than-there-are": {"index_topk": 512},
    "window-longer-than-the-prompt": {"sliding_window": 512},
    "window-of-two": {"sliding_window": 2},
    "no-clamping": {"swiglu_limit": 100.0},
    "two-shared-experts-of-half-the-width": {"moe_intermediate_size": 16, "n_routed_experts": 12},
    "two-streams": {"hc_mult": 2, "hc_sinkhorn_iters": 3},
    "long-groups-first": {"compress_ratios": [128, 128, 4, 128, 4, 128, 0], "num_hash_layers": 0},
    "one-output-group": {"o_groups": 1, "qk_rope_head_dim": 16},
    # So large that one which is left out, or taken for the other, is seen; they are usually 1e-6.
    "large-eps": {"rms_norm_eps": 1e-2, "hc_eps": 3e-2},
}


@pytest.mark.parametrize("keys", WIDE.values(), ids=WIDE)
def test_other_configs(keys: dict[str, Any]) -> None:
    other = Torch({**CONFIG, **keys})
    ids = tokens(LENGTH)
    model, expected = model_of(other), other.logits(ids)
    assert relative(fed(model, ids, [LENGTH]), expected) < TOLERANCE
    assert relative(fed(model, ids, [140, *[1] * 20, 3, 137]), expected) < TOLERANCE


# ---- batches


def test_a_batch_of_equal_lengths(model: Model, source: Torch) -> None:
    rows = [tokens(180, seed) for seed in range(3)]
    cache = model.make_cache()
    parts = [np.array(model(mx.array([row[:140] for row in rows]), cache=cache))]
    parts += [np.array(model(mx.array([[row[i]] for row in rows]), cache=cache)) for i in range(140, 180)]
    logits = np.concatenate(parts, axis=1)
    for row, found in zip(rows, logits, strict=True):
        assert relative(found, source.logits(row)) < TOLERANCE


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("step", [16, 50, 2048])
def test_a_batch_of_different_lengths_as_mlx_lm_generates_it(model: Model, source: Torch, step: int) -> None:
    # More requests than places, and of different lengths: batches are merged, extended and filtered.
    prompts = {length: tokens(length, seed=length) for length in (3, 130, 17, 64, 257, 1)}
    new = {3: 40, 130: 6, 17: 12, 64: 70, 257: 9, 1: 20}
    generator = BatchGenerator(model, completion_batch_size=4, prefill_batch_size=3, prefill_step_size=step)
    uids = generator.insert(list(prompts.values()), list(new.values()))
    written: dict[int, list[int]] = {uid: [] for uid in uids}
    scored: dict[int, list[np.ndarray[Any, Any]]] = {uid: [] for uid in uids}
    caches: dict[int, Any] = {}
    while responses := generator.next_generated():
        for response in responses:
            written[response.uid].append(response.token)
            scored[response.uid].append(np.array(response.logprobs))
            if response.finish_reason:
                caches[response.uid] = response.prompt_cache
    generator.close()
    for uid, length in zip(uids, prompts, strict=True):
        ids = [*prompts[length], *written[uid]]
        expected = source.logits([*ids, *tokens(30, seed=7)])
        assert len(written[uid]) == new[length]
        found = np.stack(scored[uid])
        assert relative(found, log_softmax(expected[length - 1 : len(ids) - 1])) < TOLERANCE
        # The cache that comes back with the last token continues alone.
        seen = caches[uid][0].size()
        rest = [*ids, *tokens(30, seed=7)][seen:]
        assert relative(fed(model, rest, [len(rest)], caches[uid]), expected[seen:]) < TOLERANCE


def test_requests_that_join_while_others_are_read_in_pieces(model: Model, source: Torch) -> None:
    # In one call, rows close groups of 128 at different tokens, in layers without an indexer too.
    prompts = [tokens(length, seed=length) for length in (3, 200, 1, 50, 131, 129, 4, 16, 17)]
    generator = BatchGenerator(model, completion_batch_size=4, prefill_batch_size=2, prefill_step_size=16)
    uids = generator.insert(prompts[:3], [12] * 3)
    written: dict[int, list[int]] = {uid: [] for uid in uids}
    waiting, calls = prompts[3:], 0
    while (responses := generator.next_generated()) or waiting:
        for response in responses:
            written[response.uid].append(response.token)
        calls += 1
        if waiting and calls % 4 == 0:
            uids += generator.insert([waiting.pop(0)], [12])
            written[uids[-1]] = []
    generator.close()
    for uid, prompt in zip(uids, prompts, strict=True):
        logits = source.logits([*prompt, *written[uid]])
        assert logits.argmax(-1)[-13:-1].tolist() == written[uid]


# ---- files


def test_a_prompt_cache_that_was_saved(model: Model, truth: np.ndarray[Any, Any], tmp_path: Path) -> None:
    ids = tokens(LENGTH)
    cache = model.make_cache()
    fed(model, ids[:203], [203], cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert relative(fed(model, ids[203:], [1, 1, 95], loaded), truth[203:]) < TOLERANCE


def test_an_empty_prompt_cache_that_was_saved(
    model: Model, truth: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    save_prompt_cache(str(tmp_path / "cache.safetensors"), model.make_cache())
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert relative(fed(model, tokens(LENGTH), [LENGTH], loaded), truth) < TOLERANCE


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_a_saved_prompt_cache_joins_a_batch(
    order: list[int], model: Model, source: Torch, tmp_path: Path
) -> None:
    # A long one, one that is shorter than a group, and a request without one.
    known, rests = [tokens(203, 1), tokens(3, 2), []], [tokens(9, 3), tokens(21, 4), tokens(30, 5)]
    written, steps = {}, 8
    for kind in ("made", "loaded"):
        caches: list[Any] = []
        for row, ids in enumerate(known):
            cache = model.make_cache()
            if ids:
                fed(model, ids, [len(ids)], cache)
                assert [layer.size() for layer in cache] == [len(ids)] * 6
            if ids and kind == "loaded":
                save_prompt_cache(str(tmp_path / f"{row}.safetensors"), cache)
                held = [layer.nbytes for layer in cache]
                cache = load_prompt_cache(str(tmp_path / f"{row}.safetensors"))
                assert [layer.size() for layer in cache] == [len(ids)] * 6
                assert [layer.nbytes for layer in cache] == held
                assert not any(layer.empty() for layer in cache)
            caches.append(cache)
        generator = BatchGenerator(model, prefill_step_size=16)
        uids = generator.insert([rests[i] for i in order], [steps] * 3, caches=[caches[i] for i in order])
        found: dict[int, list[int]] = {uid: [] for uid in uids}
        while responses := generator.next_generated():
            for response in responses:
                found[response.uid].append(response.token)
        generator.close()
        written[kind] = [found[uid] for uid in uids]
    assert written["loaded"] == written["made"]
    for i, ids in zip(order, written["loaded"], strict=True):
        logits = source.logits([*known[i], *rests[i], *ids])
        assert logits.argmax(-1)[-steps - 1 : -1].tolist() == ids


def write_folder(folder: Path, model: nn.Module, config: dict[str, Any]) -> None:
    folder.mkdir()
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps({**config, "model_file": "deepseek_v4.py"}))
    (folder / "deepseek_v4.py").write_text(bundled("deepseek_v4"))
    write_tokenizer(folder)


def test_a_folder_that_mlx_lm_loads_and_runs(model: Model, source: Torch, tmp_path: Path) -> None:
    write_folder(tmp_path / "model", model, source.config)
    loaded, tokenizer = load(str(tmp_path / "model"), trust_remote_code=True)
    ids = tokens(40)
    assert relative(fed(loaded, ids, [40]), source.logits(ids)) < TOLERANCE
    text = generate(loaded, tokenizer, ids, max_tokens=6)
    greedy = list(ids)
    for _ in range(6):
        greedy.append(int(source.logits(greedy)[-1].argmax()))
    assert text == tokenizer.decode(greedy[40:])


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_prompt_cache_in_mlx_lms_commands(tmp_path: Path) -> None:
    # generate reads the cache before it has loaded the model's class.
    source = reference("plain")
    model = model_of(source)
    write_folder(tmp_path / "model", model, source.config)
    common = ["--model", str(tmp_path / "model"), "--trust-remote-code"]
    cached = ["--prompt-cache-file", str(tmp_path / "cache.safetensors")]
    text, rest = "a text that is longer than the window of this model", " and what follows it"
    run(sys.executable, "-m", "mlx_lm", "cache_prompt", *common, *cached, "--prompt", text)
    asked = ["--prompt", rest, "--max-tokens", "8", "--verbose", "False"]
    found = run(sys.executable, "-m", "mlx_lm", "generate", *common, *cached, *asked)
    loaded, tokenizer = load(str(tmp_path / "model"), trust_remote_code=True)
    ids = tokenizer.encode(text) + tokenizer.encode(rest)
    assert found.strip() == generate(loaded, tokenizer, ids, max_tokens=8).strip()


def test_without_trust_mlx_lm_says_what_it_needs(model: Model, source: Torch, tmp_path: Path) -> None:
    write_folder(tmp_path / "model", model, source.config)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(str(tmp_path / "model"))


MX = {
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
}


EXPERTS = ("switch_mlp.gate_proj", "switch_mlp.up_proj", "switch_mlp.down_proj")


def as_official(path: str, module: nn.Module) -> dict[str, Any] | bool:
    """Return the quantization that holds the numbers of the official checkpoint."""
    if ".switch_mlp." in path:
        return MX["mxfp4"]
    official = ".shared_experts." in path or re.search(r"\.attn\.(w\w+|indexer\.wq_b)$", path)
    return MX["mxfp8"] if official else False


def as_affine(path: str, module: nn.Module) -> dict[str, Any] | bool:
    return {"group_size": 32, "bits": 6} if hasattr(module, "to_quantized") and _divides(module) else False


def _divides(module: nn.Module) -> bool:
    return module.weight.shape[-1] % 32 == 0


@pytest.fixture(scope="module")
def quantizable() -> Torch:
    """Widths that the groups of 32 divide."""
    return Torch({**CONFIG, "o_lora_rank": 32})


@pytest.mark.parametrize("predicate", [as_official, as_affine])
def test_quantized(predicate: Callable[..., Any], quantizable: Torch, tmp_path: Path) -> None:
    model = model_of(quantizable)
    chosen = {}

    def quantized(path: str, module: nn.Module) -> dict[str, Any] | bool:
        found = hasattr(module, "to_quantized") and predicate(path, module)
        if found:
            chosen[path] = found
        return found

    nn.quantize(model, class_predicate=quantized)
    assert {"model.layers.0.attn.wo_a", "model.layers.3.ffn.switch_mlp.down_proj"} <= chosen.keys()
    config = {**quantizable.config, "quantization": {"group_size": 32, "bits": 4, **chosen}}
    write_folder(tmp_path / "model", model, config)
    loaded, _ = load_model(tmp_path / "model", trust_remote_code=True)
    # What the stored codes stand for, in transformers.
    arrays = dict(tree_flatten(loaded.parameters()))
    plain = {
        f"{path}.weight": mx.dequantize(
            arrays[f"{path}.weight"],
            arrays[f"{path}.scales"],
            arrays.get(f"{path}.biases"),
            **{"mode": "affine", **how},
        ).astype(mx.float32)
        for path, how in chosen.items()
    }
    twin = Torch(quantizable.config, {name: np.array(array) for name, array in plain.items()})
    ids = tokens(LENGTH)
    expected = twin.logits(ids)
    assert relative(expected, quantizable.logits(ids)) > 1e-3
    assert relative(fed(loaded, ids, [200, *[1] * 20, 80]), expected) < TOLERANCE


def test_in_bfloat16(quantizable: Torch) -> None:
    model = model_of(quantizable)
    # On a CPU, MLX multiplies by gathered experts in bfloat16 only if they are quantized.
    nn.quantize(model, class_predicate=lambda path, module: path.endswith(EXPERTS) and MX["mxfp8"])
    ids = tokens(LENGTH)
    expected = fed(model, ids, [LENGTH])
    keep = model.cast_predicate
    arrays = tree_flatten(model.parameters())
    narrow = [
        (name, array.astype(mx.bfloat16) if array.dtype == mx.float32 and keep(name) else array)
        for name, array in arrays
    ]
    model.load_weights(narrow)
    cache = model.make_cache()
    found = model(mx.array([ids[:250]]), cache=cache)
    assert found.dtype == mx.bfloat16
    # What grows is as narrow as the activations; the tokens of open groups are as wide as the compressor.
    held = [layer[WINDOW].keys for layer in cache]
    for layer in cache[2:]:
        held += [layer[ENTRIES].keys, layer[ENTRIES].values]
    assert len(held) == 14
    assert {array.dtype for array in held} == {mx.bfloat16}
    logits = np.array(found.astype(mx.float32))[0]
    # Bfloat16 has 8 bits; most tokens keep their experts, and a few choose others.
    error = np.abs(logits - expected[:250]).max(1) / np.abs(expected).max()
    assert np.median(error) < 0.05


# ---- beside mlx-vlm


def vlm(source: Torch) -> VlmModel:
    return VlmModel(ModelConfig.from_dict({**source.config, "num_nextn_predict_layers": 0}))


def test_ours_load_in_mlx_vlm_and_are_equal_in_one_shot(
    model: Model, source: Torch, truth: np.ndarray[Any, Any]
) -> None:
    theirs = vlm(source)
    weights = theirs.sanitize(dict(tree_flatten(model.parameters())))
    theirs.load_weights(list(weights.items()), strict=True)
    theirs.eval()
    language = theirs.language_model
    logits = language(mx.array([tokens(LENGTH)]), cache=language.make_cache()).logits
    assert relative(np.array(logits)[0], truth) < TOLERANCE


def test_theirs_load_here(model: Model, source: Torch) -> None:
    theirs = dict(tree_flatten(vlm(source).parameters()))
    ours = Model(ModelArgs.from_dict(source.config))
    weights = ours.sanitize(theirs)
    assert all(name.startswith("language_model.") for name in theirs)
    ours.load_weights(list(weights.items()), strict=True)
    shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
    assert {name: array.shape for name, array in weights.items()} == shapes


# ---- what mlx-lm asks


def test_what_is_kept_when_the_model_is_cast(model: Model, source: Torch) -> None:
    theirs = source.model
    patterns = [*theirs._keep_in_fp32_modules_strict, *theirs._keep_in_fp32_modules]
    kept = {
        renamed(name)
        for name in theirs.state_dict()
        if any(re.search(rf"(^|\.){re.escape(pattern)}(\.|$)", name) for pattern in patterns)
    }
    names = {name for name, array in tree_flatten(model.parameters()) if array.dtype == mx.float32}
    assert {name for name in names if not model.cast_predicate(name)} == kept


def test_what_is_not_quantized(model: Model) -> None:
    modules = [path for path, module in model.named_modules() if hasattr(module, "to_quantized")]
    left = {re.sub(r"\.\d+\.", ".N.", path) for path in modules if not model.quant_predicate(path, model)}
    assert left == {
        "model.layers.N.attn.compressor.wkv",
        "model.layers.N.attn.compressor.wgate",
        "model.layers.N.attn.indexer.compressor.wkv",
        "model.layers.N.attn.indexer.compressor.wgate",
        "model.layers.N.attn.indexer.weights_proj",
    }


REFUSED = {
    "too-few-ratios": ({"compress_ratios": [0, 0, 4]}, "compress_ratios has 3 numbers"),
    "another-ratio": ({"compress_ratios": [0, 0, 4, 8, 4, 128]}, r"\[8\]; a ratio is one of"),
    "another-score": ({"scoring_func": "softmax"}, "'softmax'"),
    "another-rope": ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, "'linear'"),
}


@pytest.mark.parametrize(("keys", "message"), REFUSED.values(), ids=REFUSED)
def test_configs_that_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelArgs.from_dict({**CONFIG, **keys})


RANK = """
import json, sys
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mla_tools.models.deepseek_v4 import Model, ModelArgs

folder = sys.argv[1]
group = mx.distributed.init(strict=True, backend="ring")
config, ids = json.load(open(f"{folder}/config.json")), np.load(f"{folder}/ids.npy")
for kind in ("shard", "pipeline"):
    model = Model(ModelArgs.from_dict(config))
    if kind == "shard":
        model.load_weights(f"{folder}/model.safetensors")
        model.shard(group)
        assert model.layers[0].attn.wq_b.weight.shape[0] * group.size() == 128 and group.size() == 2
    else:
        model.load_weights(f"{folder}/model.safetensors")
        model.model.pipeline(group)
        assert len(model.layers) == len(model.make_cache()) == 3
        names = {name.split(".")[2] for name, _ in tree_flatten(model.parameters()) if ".layers." in name}
        assert names == {"012"[i] if group.rank() else "345"[i] for i in range(3)}
    cache, parts = model.make_cache(), []
    model(mx.array(ids[None, :60]), cache=cache)
    # A prompt evaluates nothing but the cache.
    mx.eval([layer.state for layer in cache])
    for start, stop in ((60, 90), (90, 91), (91, 300)):
        parts.append(np.array(model(mx.array(ids[None, start:stop]), cache=cache)))
    np.save(f"{folder}/{kind}{group.rank()}.npy", np.concatenate(parts, axis=1))
"""


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    source = reference("yarn")
    folder = tmp_path / "model"
    write_folder(folder, model_of(source), source.config)
    np.save(folder / "ids.npy", np.array(tokens(LENGTH)))
    (tmp_path / "rank.py").write_text(RANK)
    first = free_ports(2)
    hosts = [[f"127.0.0.1:{first + rank}"] for rank in range(2)]
    (tmp_path / "hosts.json").write_text(json.dumps(hosts))
    command = [sys.executable, str(tmp_path / "rank.py"), str(folder)]
    ring = {**os.environ, "MLX_HOSTFILE": str(tmp_path / "hosts.json")}
    ranks = [subprocess.Popen(command, env={**ring, "MLX_RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    truth = source.logits(tokens(LENGTH))[60:]
    for rank in range(2):
        for kind in ("shard", "pipeline"):
            assert relative(np.load(folder / f"{kind}{rank}.npy")[0], truth) < TOLERANCE


class ThreeRanks:
    def size(self) -> int:
        return 3

    def rank(self) -> int:
        return 0


def test_ranks_that_do_not_divide_are_refused(source: Torch) -> None:
    with pytest.raises(ValueError, match="3 ranks do not divide the 2 output groups"):
        Model(ModelArgs.from_dict(source.config)).shard(ThreeRanks())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_oracle_has_yarn_where_the_config_has(name: str) -> None:
    source = reference(name)
    settings = source.model.config.rope_parameters
    assert settings["main"]["rope_type"] == "default"
    assert (settings["compress"]["rope_type"] == "yarn") == (source.config["rope_scaling"] is not None)
    assert torch.is_tensor(source.model.model.rotary_emb.compress_inv_freq)
