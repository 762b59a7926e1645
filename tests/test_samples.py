"""Samples: families in formats, of which every pair converts, loads strictly and computes finite logits."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from conversion import convert
from mlx_lm.utils import load_model, load_tokenizer
from pairs import PUBLISHED, pairs, product
from reference import second_scales_on_a_cpu
from support import contents, sample
from transformers import AutoTokenizer

from mla_tools import samples
from mla_tools.architectures import MODEL_TYPES, family_of
from mla_tools.codecs import FORMATS
from mla_tools.errors import MlaToolsError, UsageError
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.samples import sample_config, write_sample, write_tokenizer

TEXT = "héllo wörld 🙂"


def test_each_family_has_a_config_that_names_it_and_nothing_else_is_there() -> None:
    configs = {path.name for path in (Path(samples.__file__).parent / "configs").iterdir()}
    assert configs == {f"{family.name}.json" for family in MODEL_TYPES.values()}
    for name, family in MODEL_TYPES.items():
        assert family_of(sample_config(name)) is family


def dtypes(folder: Path) -> dict[str, str]:
    return {name: stored.spec.dtype.name for name, stored in open_checkpoint(folder).tensors.items()}


PAIRS = pairs(MODEL_TYPES, FORMATS, PUBLISHED, times=1)


@pytest.mark.parametrize(("family", "fmt"), product(MODEL_TYPES, FORMATS, PAIRS))
def test_a_sample_converts_loads_strictly_and_runs(family: str, fmt: str, tmp_path: Path) -> None:
    convert(sample(family, fmt), tmp_path / "out")
    # The class of DeepSeek V4 is in this package, and a file beside the weights imports it.
    model, _ = load_model(tmp_path / "out", strict=True, trust_remote_code=True)
    model.set_dtype(mx.float32)  # mlx multiplies by gathered experts on the CPU in float32 alone
    with second_scales_on_a_cpu():
        logits = model(mx.array([[1, 2, 3, 250, 256]])).astype(mx.float32)
        mx.eval(logits)
    assert logits.shape == (1, 5, 512)
    assert mx.isfinite(logits).all().item()
    # Random weights, but not so small or large that every token comes out alike.
    assert (logits.max(axis=-1) - logits.min(axis=-1) > 0.1).all().item()
    assert not mx.array_equal(logits[0, 0], logits[0, 4]).item()


@pytest.mark.parametrize(("family", "fmt"), [("deepseek_v3", "fp8"), ("kimi_linear", "bf16")])
def test_the_seed_decides_every_byte(family: str, fmt: str, tmp_path: Path) -> None:
    for name, seed in {"one": 3, "again": 3, "other": 4}.items():
        write_sample(family, tmp_path / name, fmt, seed=seed)
    one, again, other = (contents(tmp_path / name) for name in ("one", "again", "other"))
    assert one == again
    assert one.keys() == other.keys()
    changed = {name for name in one if one[name] != other[name]}
    assert changed == {name for name in one if name.endswith(".safetensors")}


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_are_named_as_on_the_hub_and_indexed(shards: int, tmp_path: Path) -> None:
    write_sample("deepseek_v3", tmp_path / "sample", "fp8", shards=shards)
    checkpoint = open_checkpoint(tmp_path / "sample")
    assert (checkpoint.problems, checkpoint.notes) == ((), ())
    names = [f"model-{k:05}-of-{shards:05}.safetensors" for k in range(1, shards + 1)]
    assert [shard.name for shard in checkpoint.shards] == names
    index = json.loads((tmp_path / "sample" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: at.file.name for name, at in checkpoint.tensors.items()}
    assert index["metadata"]["total_size"] == sum(at.spec.nbytes for at in checkpoint.tensors.values())


@pytest.mark.parametrize(("fmt", "dtype"), [("bf16", "BF16"), ("f16", "F16"), ("f32", "F32")])
def test_formats_are_dtypes(fmt: str, dtype: str, tmp_path: Path) -> None:
    write_sample("deepseek_v3", tmp_path / "sample", fmt)
    found = dtypes(tmp_path / "sample")
    others = {name for name, there in found.items() if there != dtype}
    assert all(name.endswith("e_score_correction_bias") for name in others)
    config = json.loads((tmp_path / "sample" / "config.json").read_text())
    assert config["torch_dtype"] == {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype]


def test_fp8_quantizes_the_linear_layers_and_nothing_else(tmp_path: Path) -> None:
    write_sample("deepseek_v3", tmp_path / "sample", "fp8")
    found = dtypes(tmp_path / "sample")
    codes = {name for name, there in found.items() if there == "F8_E4M3"}
    assert {f"{name}_scale_inv" for name in codes} == {name for name in found if name.endswith("_scale_inv")}
    layer = "model.layers.2"
    linear = (
        "self_attn.kv_b_proj",
        "self_attn.o_proj",
        "mlp.experts.7.down_proj",
        "mlp.shared_experts.up_proj",
    )
    assert {f"{layer}.{name}.weight" for name in linear} <= codes
    float_ones = (
        f"{layer}.mlp.gate",
        f"{layer}.input_layernorm",
        "model.embed_tokens",
        "lm_head",
        "model.norm",
    )
    assert {found[f"{name}.weight"] for name in float_ones} == {"BF16"}
    config = json.loads((tmp_path / "sample" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert config["quantization_config"]["quant_method"] == "fp8"


@pytest.mark.parametrize("family", ["deepseek_v3", "longcat_flash"])
def test_samples_have_the_mtp_layers_of_the_real_ones(family: str, tmp_path: Path) -> None:
    write_sample(family, tmp_path / "sample")
    names = dtypes(tmp_path / "sample")
    where = {
        "deepseek_v3": "model.layers.4.eh_proj.weight",
        "longcat_flash": "model.mtp.layers.0.eh_proj.weight",
    }
    assert where[family] in names
    assert not any(".rotary_emb." in name for name in names)


def test_kimi_k2_has_its_rotary_buffers(tmp_path: Path) -> None:
    write_sample("kimi_k2", tmp_path / "sample")
    found = dtypes(tmp_path / "sample")
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(4)}
    assert {name for name in found if name.endswith("inv_freq")} == buffers
    assert {found[name] for name in buffers} == {"F32"}


# --- the tokenizer -----------------------------------------------------------------------------------

TEXTS = [
    TEXT,
    "",
    " leading and  double ",
    "tab\tnewline\n\r",
    "".join(map(chr, range(1, 0x250))),
    "日本語 \U0001f9ea",
]


@pytest.mark.parametrize("text", TEXTS, ids=["greeting", "empty", "spaces", "controls", "latin", "wide"])
def test_transformers_reads_back_every_text(text: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    # A byte is its own number, so this needs no vocabulary.
    assert tokens == list(text.encode())
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_mlx_lm_loads_the_tokenizer_of_every_family(family: str, tmp_path: Path) -> None:
    # Beside the config of an output: of a model_type that only the hub knows, transformers loads none.
    source = sample(family)
    for path in (*source.glob("*token*"), source / "generation_config.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(MODEL_TYPES[family].rewritten(config)))
    tokenizer = load_tokenizer(tmp_path, {"trust_remote_code": family.startswith("kimi")})
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.eos_token_ids == {256}
    assert tokenizer.encode("<|end|>")[-1] == 256


# --- refusals ----------------------------------------------------------------------------------------


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="deepseek_v3") as caught:
        write_sample("llama", tmp_path / "sample")
    assert all(family in str(caught.value) for family in MODEL_TYPES)
    assert not (tmp_path / "sample").exists()


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=", ".join(FORMATS)):
        write_sample("deepseek_v3", tmp_path / "sample", "fp9")
    assert not (tmp_path / "sample").exists()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_exists_is_refused_and_left_alone(kind: str, tmp_path: Path) -> None:
    there = tmp_path / "sample"
    there.mkdir() if kind == "folder" else there.write_text("precious")
    with pytest.raises(MlaToolsError, match="already exists"):
        write_sample("deepseek_v3", there)
    assert list(there.iterdir()) == [] if kind == "folder" else there.read_text() == "precious"
