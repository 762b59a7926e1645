"""Checkpoints and options that cannot be converted: one run reports everything, and nothing is written."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import support

from mla_tools.architectures import MODEL_TYPES
from mla_tools.cli import main

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"

EXPERT = "model.layers.2.mlp.experts.{}.up_proj.weight"
KV_B = "model.layers.1.self_attn.kv_b_proj"


# --- a sample folder that can be edited ---------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """A stored tensor: its file, and what its header entry and its bytes are."""

    file: str
    dtype: str
    shape: list[int]
    data: bytes


@dataclass
class Folder:
    """A sample that can be changed; `save` writes every shard and the index anew, without our writer."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Raw] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = json.loads((self.path / "config.json").read_text())
        for file in (FIRST, SECOND):
            raw = (self.path / file).read_bytes()
            start = 8 + int.from_bytes(raw[:8], "little")
            for name, entry in json.loads(raw[8:start]).items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    data = raw[start + begin : start + end]
                    self.tensors[name] = Raw(file, entry["dtype"], entry["shape"], data)

    def rename(self, old: str, new: str) -> None:
        self.tensors[new] = self.tensors.pop(old)

    def reshape(self, name: str, shape: list[int]) -> None:
        old = self.tensors[name]
        width = len(old.data) // prod(old.shape)
        self.tensors[name] = replace(old, shape=shape, data=bytes(width * prod(shape)))

    def add(self, name: str, dtype: str = "BF16", shape: tuple[int, ...] = (2, 4)) -> None:
        width = {"BF16": 2, "F32": 4, "U8": 1, "I8": 1, "F64": 8}[dtype]
        self.tensors[name] = Raw(FIRST, dtype, list(shape), bytes(width * prod(shape)))

    def save(self) -> None:
        for file in (FIRST, SECOND):
            held = {name: raw for name, raw in self.tensors.items() if raw.file == file}
            header: dict[str, object] = {}
            reached = 0
            for name, raw in held.items():
                offsets = [reached, reached + len(raw.data)]
                header[name] = {"dtype": raw.dtype, "shape": raw.shape, "data_offsets": offsets}
                reached = offsets[1]
            self.write(file, header, b"".join(raw.data for raw in held.values()))
        self.write_index({name: raw.file for name, raw in self.tensors.items()})
        (self.path / "config.json").write_text(json.dumps(self.config))

    def write(self, file: str, header: dict[str, object], data: bytes) -> None:
        text = json.dumps(header).encode()
        (self.path / file).write_bytes(len(text).to_bytes(8, "little") + text + data)

    def write_index(self, places: dict[str, str]) -> None:
        (self.path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))

    def header(self, file: str) -> tuple[dict[str, Any], bytes]:
        raw = (self.path / file).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        return json.loads(raw[8:start]), raw[start:]


@pytest.fixture(scope="module")
def samples() -> dict[str, Path]:
    formats = {
        "bf16": "bf16",
        "fp8": "fp8",
        "e8m0": "fp8-ue8m0",
        "tensor": "fp8-tensor",
        "channel": "ct-fp8-channel",
        "mxfp4": "quark-mxfp4",
        "times": "modelopt-nvfp4",
        "divided": "ct-nvfp4",
    }
    made = {name: support.sample("deepseek_v3", fmt) for name, fmt in formats.items()}
    return {**made, "longcat": support.sample("longcat_flash")}


@dataclass(frozen=True)
class Refused:
    """What a refused conversion said: its message, and the problems that --json printed."""

    message: str
    problems: list[dict[str, str]]

    def says(self, *texts: str) -> None:
        for text in texts:
            assert text in self.message, self.message


Bench = Callable[..., Folder]
Refuse = Callable[..., Refused]


@pytest.fixture
def sample(samples: dict[str, Path], tmp_path: Path) -> Bench:
    """Return a copy of a sample to be damaged."""

    def copy(fmt: str = "bf16") -> Folder:
        shutil.copytree(samples[fmt], tmp_path / "damaged")
        return Folder(tmp_path / "damaged")

    return copy


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Convert a folder, assert that it is refused without a trace, and return what was said.

    `begun`: refused for what only the data shows, which leaves an unfinished output.
    """

    def convert(folder: Path, *flags: str, code: int = 1, begun: bool = False) -> Refused:
        out = tmp_path / "out"
        argv = ["convert", str(folder), "--mlx-path", str(out), *flags]
        assert main(argv) == code
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert main([*argv, "--json", *(["--resume"] if begun else [])]) == code
        again = capsys.readouterr()
        assert again.err == said.err
        values = json.loads(again.out)
        again_only = f"{out} is unfinished, and --resume would fail again: start again with --overwrite\n"
        advice = again_only if begun else ""
        assert said.err == f"error: {values['error']}\n{advice}"
        assert "Traceback" not in said.err
        if begun:
            made = {path.suffix for path in out.iterdir()}
            assert made <= {".partial", ".jsonl"}
        else:
            assert not out.exists()
        assert code != 1 or len(values["problems"]) == count(said.err)
        for problem in values["problems"]:
            assert problem.keys() == {"subject", "what", "needed", "found", "cause", "reason", "lost"}
        return Refused(said.err, values["problems"])

    def count(message: str) -> int:
        found = re.match(r"error: (\d+) problems?(?:, and ([\d,]+) that (?:may )?follow)?", message)
        return sum(int(number.replace(",", "")) for number in found.groups("0")) if found else 0

    return convert


# --- the config --------------------------------------------------------------------------------------


def test_no_config(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    (folder.path / "config.json").unlink()
    refused(folder.path).says(
        "1 problem\n",
        f"{folder.path}: there is no config.json in it",
        "Give the folder that holds config.json and the weights.",
    )


@pytest.mark.parametrize("model_type", ["llama", None, 7, ["deepseek_v3"]])
def test_an_unknown_architecture_lists_the_known_ones(
    sample: Bench, refused: Refuse, model_type: object
) -> None:
    folder = sample()
    folder.config |= {"model_type": model_type, "architectures": ["LlamaForCausalLM"]}
    folder.save()
    refused(folder.path).says(
        "config.json: this architecture is not known",
        f"one of {', '.join(MODEL_TYPES)}",
        f"found   model_type {model_type!r}, architectures ['LlamaForCausalLM']",
    )


NO_RANKS = {
    "absent": ("absent", "no such key"),
    "null": (None, "no such key"),
    "negative": (-128, "-128"),
    "zero": (0, "0"),
    "string": ("128", "'128'"),
    "float": (128.0, "128.0"),
    "true": (True, "True"),
    "list": ([128], "[128]"),
    "huge": (10**30, "1" + 30 * "0"),
}


@pytest.mark.parametrize(("value", "found"), NO_RANKS.values(), ids=NO_RANKS.keys())
def test_a_rank_that_is_none(sample: Bench, refused: Refuse, value: object, found: str) -> None:
    folder = sample()
    folder.config["kv_lora_rank"] = value
    if value == "absent":
        del folder.config["kv_lora_rank"]
    folder.save()
    said = refused(folder.path)
    said.says("config.json: kv_lora_rank cannot be used", "an integer between 1 and", f"found   {found}\n")
    assert len(said.problems) == 1


def test_all_numbers_of_a_config_are_told_at_once(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    folder.config |= {"kv_lora_rank": -1, "hidden_size": "256", "attention_bias": "no", "moe_layer_freq": 0}
    del folder.config["num_attention_heads"]
    folder.save()
    said = refused(folder.path)
    assert {problem["what"] for problem in said.problems} == {
        f"{key} cannot be used"
        for key in (
            "kv_lora_rank",
            "hidden_size",
            "attention_bias",
            "moe_layer_freq",
            "num_attention_heads",
        )
    }


def test_an_absurd_number_of_experts_costs_no_memory(sample: Bench) -> None:
    folder = sample()
    folder.config["n_routed_experts"] = 200_000_000
    folder.save()
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30));"
        "from mla_tools.cli import main; sys.exit(main(['plan', sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", limited, str(folder.path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "n_routed_experts" in done.stderr
    assert "Traceback" not in done.stderr


# --- the files ---------------------------------------------------------------------------------------


def test_a_shard_that_is_not_there(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    lost = [name for name, raw in folder.tensors.items() if raw.file == SECOND]
    (folder.path / SECOND).unlink()
    said = refused(folder.path)
    sentence = f"{SECOND} is listed in the index but is not in the folder"
    said.says(
        f"{SECOND}: is listed in the index but is not in the folder\n"
        f"  Download it into {folder.path}.\n"
        f"  lost with it: {len(lost)} stored tensors\n",
        "that follow from it (--json lists them)\n",
    )
    assert sentence not in said.message
    assert len(said.message.splitlines()) < 15
    # One problem of the file, and each that follows from it gives it as the cause.
    own, *others = said.problems
    assert own["subject"] == SECOND
    assert others
    assert {problem["cause"] for problem in others} == {sentence}
    missing = [name for name in lost if ".experts." not in name and ".layers.4." not in name]
    assert {problem["subject"] for problem in others if problem["what"] == "missing"} == {
        name.removesuffix(".weight") for name in missing
    }


def test_a_tensor_in_two_shards(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    name = "model.norm.weight"
    folder.save()
    other = FIRST if folder.tensors[name].file == SECOND else SECOND
    header, data = folder.header(other)
    twin = folder.tensors[name]
    header[name] = {
        "dtype": twin.dtype,
        "shape": twin.shape,
        "data_offsets": [len(data), len(data) + len(twin.data)],
    }
    folder.write(other, header, data + twin.data)
    said = refused(folder.path)
    said.says(f"{name}: is stored in two files", f"found   {FIRST} and {SECOND}")
    assert len(said.problems) == 1


def test_a_truncated_shard(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    raw = (folder.path / SECOND).read_bytes()
    (folder.path / SECOND).write_bytes(raw[:-1000])
    said = refused(folder.path)
    said.says(f"{SECOND}: is truncated: 1,000 bytes are missing at the end", "Download the file again")
    causes = {problem["cause"] for problem in said.problems[1:]}
    assert causes == {f"{SECOND} is damaged or unreadable: is truncated: 1,000 bytes are missing at the end"}


def test_a_header_longer_than_the_file(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    raw = (folder.path / FIRST).read_bytes()
    (folder.path / FIRST).write_bytes((len(raw) + 92).to_bytes(8, "little") + raw[8:])
    refused(folder.path).says(
        f"{FIRST}: is truncated inside its header: 100 bytes of it are missing",
        f"found   a file of {len(raw):,} bytes",
    )


@pytest.mark.parametrize(("shift", "text"), [(-2, "the bytes overlap those of"), (2, "belong to no tensor")])
def test_offsets_that_do_not_tile(sample: Bench, refused: Refuse, shift: int, text: str) -> None:
    folder = sample()
    folder.save()
    header, data = folder.header(FIRST)
    for entry in list(header.values())[1:]:
        entry["data_offsets"] = [offset + shift for offset in entry["data_offsets"]]
    folder.write(FIRST, header, data[:shift] if shift < 0 else data + bytes(shift))
    refused(folder.path).says(text, FIRST)


# --- tensors -----------------------------------------------------------------------------------------


def test_a_missing_expert(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    del folder.tensors[EXPERT.format(5)]
    folder.save()
    said = refused(folder.path)
    assert said.message == (
        "error: 1 problem\n\n"
        "model.layers.2.mlp.switch_mlp.up_proj: expert 5 is missing\n"
        "  needed  model.layers.2.mlp.experts.{0..7}.up_proj  (n_routed_experts = 8 in config.json)\n"
        "  found   7 of 8\n"
    )


def test_a_missing_expert_of_a_shard_that_is_not_there(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    folder.save()
    places = {name: raw.file for name, raw in folder.tensors.items()}
    name = EXPERT.format(5)
    del folder.tensors[name]
    folder.save()
    folder.write_index({**places, name: "model-00003-of-00003.safetensors"})
    said = refused(folder.path)
    said.says(
        "error: 1 problem, and 1 that follows from it (--json lists them)\n\n"
        "model-00003-of-00003.safetensors: is listed in the index but is not in the folder\n",
        f"  lost with it: {name}\n",
    )
    own, other = said.problems
    assert (other["subject"], other["what"]) == (
        "model.layers.2.mlp.switch_mlp.up_proj",
        "expert 5 is missing",
    )
    assert other["cause"] == own["reason"]


def test_several_missing_experts(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    for e in (0, 3, 7):
        del folder.tensors[EXPERT.format(e)]
    folder.save()
    said = refused(folder.path)
    said.says("model.layers.2.mlp.switch_mlp.up_proj: experts 0, 3, 7 are missing", "found   5 of 8")
    assert len(said.problems) == 1


def test_all_experts_of_a_layer_are_missing(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    for e in range(8):
        del folder.tensors[EXPERT.format(e)]
    folder.save()
    said = refused(folder.path)
    said.says("model.layers.2.mlp.experts.{0..7}.up_proj: missing", "model.layers.2.mlp.switch_mlp.up_proj")
    assert len(said.problems) == 1


def test_one_expert_too_many(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    folder.add(EXPERT.format(8), shape=(128, 256))
    folder.save()
    said = refused(folder.path)
    said.says("model.layers.2.mlp.experts.8.up_proj: unknown tensor", "found   BF16 [128, 256]")
    assert len(said.problems) == 1


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("model.norm", "hidden_size 256"),
        ("lm_head", "vocab_size 512, hidden_size 256"),
        ("model.layers.3.self_attn.q_a_proj", "q_lora_rank 128, hidden_size 256"),
    ],
)
def test_a_missing_tensor(sample: Bench, refused: Refuse, name: str, numbers: str) -> None:
    folder = sample()
    shape = folder.tensors.pop(f"{name}.weight").shape
    folder.save()
    assert refused(folder.path).message == (
        f"error: 1 problem\n\n{name}: missing\n"
        f"  needed  [{', '.join(map(str, shape))}]  ({numbers} in config.json)\n"
        "  found   no such tensor\n"
    )


def test_a_missing_kv_b_proj_says_what_it_is_for(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    del folder.tensors[f"{KV_B}.weight"]
    folder.save()
    said = refused(folder.path)
    prefix = "model.layers.1.self_attn"
    said.says(
        f"{KV_B}: missing",
        "needed  [512, 128]  (num_attention_heads 4 x (qk_nope_head_dim 64 + v_head_dim 64),",
        f"for {prefix}.embed_q and {prefix}.unembed_out",
        "no such tensor",
    )
    assert len(said.problems) == 1


def test_an_unknown_tensor(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    folder.add("model.layers.1.self_attn.q_norm.weight", shape=(64,))
    folder.save()
    said = refused(folder.path)
    assert said.message == (
        "error: 1 problem\n\nmodel.layers.1.self_attn.q_norm: unknown tensor\n"
        "  found   BF16 [64] (bf16)\n"
        "  No rule of deepseek_v3 names it. Is model_type in config.json right?\n"
    )


@pytest.mark.parametrize("dtype", ["F64", "I8", "U8"])
def test_a_tensor_in_a_dtype_of_no_format(sample: Bench, refused: Refuse, dtype: str) -> None:
    folder = sample()
    del folder.tensors["model.norm.weight"]
    folder.add("model.norm.weight", dtype, (256,))
    folder.save()
    said = refused(folder.path)
    said.says("model.norm.weight: cannot be read", f"found   {dtype} [256]")


def test_a_kv_b_proj_of_the_wrong_shape(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    folder.reshape(f"{KV_B}.weight", [384, 128])
    folder.save()
    said = refused(folder.path)
    assert said.message == (
        f"error: 1 problem\n\n{KV_B}: shape mismatch\n"
        "  needed  [512, 128]  (num_attention_heads 4 x (qk_nope_head_dim 64 + v_head_dim 64),"
        " kv_lora_rank 128 in config.json)\n"
        "  found   [384, 128]\n"
    )


@pytest.mark.parametrize("shape", [[128], [8, 64, 128], []])
def test_a_kv_b_proj_with_other_axes(sample: Bench, refused: Refuse, shape: list[int]) -> None:
    folder = sample()
    folder.reshape(f"{KV_B}.weight", shape)
    folder.save()
    refused(folder.path).says(f"{KV_B}: shape mismatch", "needed  [512, 128]", f"found   {shape}")


def test_an_expert_of_another_shape_than_the_others(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    folder.reshape(EXPERT.format(5), [128, 128])
    folder.save()
    said = refused(folder.path)
    said.says("model.layers.2.mlp.experts.5.up_proj: shape mismatch", "needed  [128, 256]", "hidden_size 256")
    assert len(said.problems) == 1


def test_scales_of_the_wrong_shape(sample: Bench, refused: Refuse) -> None:
    folder = sample("fp8")
    folder.reshape(f"{KV_B}.weight_scale_inv", [4, 2])
    folder.save()
    refused(folder.path).says(
        f"{KV_B}: its stored tensors do not fit together",
        "weight_scale_inv is F32 [4, 2], but weight [512, 128] needs [4, 1] in blocks of 128x128",
    )


def test_scales_of_the_wrong_dtype(sample: Bench, refused: Refuse) -> None:
    folder = sample("fp8")
    name = f"{KV_B}.weight_scale_inv"
    folder.tensors[name] = replace(folder.tensors[name], dtype="I32", data=bytes(4 * 4))
    folder.save()
    refused(folder.path).says("weight_scale_inv is I32, which is not a dtype of FP8 scales")


def test_fp8_without_scales(sample: Bench, refused: Refuse) -> None:
    folder = sample("fp8")
    del folder.tensors[f"{KV_B}.weight_scale_inv"]
    folder.save()
    refused(folder.path).says(
        f"{KV_B}.weight: cannot be read",
        "found   F8_E4M3 [512, 128]",
        "F8_E4M3 without a scale (weight_scale_inv, weight_scale or scale)",
    )


def test_scales_without_fp8(sample: Bench, refused: Refuse) -> None:
    folder = sample("fp8")
    del folder.tensors[f"{KV_B}.weight"]
    folder.save()
    refused(folder.path).says(f"{KV_B}.weight_scale_inv: unknown tensor", f"{KV_B}: missing")


def test_another_block_size(sample: Bench, refused: Refuse) -> None:
    folder = sample("fp8")
    folder.config["quantization_config"]["weight_block_size"] = [64, 64]
    folder.save()
    refused(folder.path).says("in blocks of 64x64 (weight_block_size in config.json)")


def test_both_layouts_of_one_tensor(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    folder.add("model.layers.1.self_attn.embed_q.weight", shape=(4, 128, 64))
    folder.save()
    said = refused(folder.path)
    prefix = "model.layers.1.self_attn"
    said.says(
        f"{prefix}.embed_q: duplicate",
        "The checkpoint mixes two layouts.",
    )
    assert set(said.problems[0]["found"].split(" and ")) == {f"{prefix}.kv_b_proj", f"{prefix}.embed_q"}
    assert len(said.problems) == 1


def test_stacked_experts_beside_single_ones(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    folder.add("model.layers.2.mlp.switch_mlp.up_proj.weight", shape=(8, 128, 256))
    folder.save()
    said = refused(folder.path)
    said.says("model.layers.2.mlp.switch_mlp.up_proj: duplicate", "The checkpoint mixes two layouts.")
    assert set(said.problems[0]["found"].split(" and ")) == {
        "model.layers.2.mlp.experts.{0..7}.up_proj",
        "model.layers.2.mlp.switch_mlp.up_proj",
    }


def test_half_of_a_layer_in_the_other_layout(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    del folder.tensors[f"{KV_B}.weight"]
    folder.add("model.layers.1.self_attn.embed_q.weight", shape=(4, 128, 64))
    folder.save()
    said = refused(folder.path)
    said.says(f"{KV_B}: missing", "for model.layers.1.self_attn.unembed_out")
    assert len(said.problems) == 1


def test_layers_beyond_the_last_are_no_mtp_layers_unless_they_look_like_one(
    sample: Bench, refused: Refuse
) -> None:
    folder = sample()
    folder.config["num_hidden_layers"] = 3
    folder.save()
    said = refused(folder.path)
    said.says(
        "model.layers.3.input_layernorm: would be dropped for a wrong reason",
        "model.layers.3.eh_proj beside it",
        "Does config.json give the right number of layers?",
    )
    # Layer 4 is the MTP layer, whatever its number.
    layers = {problem["subject"].split(".")[2] for problem in said.problems}
    assert layers == {"3"}


def test_layers_are_missing_where_the_config_counts_too_many(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    folder.config["num_hidden_layers"] = 6
    folder.save()
    said = refused(folder.path)
    said.says(
        "model.layers.5.self_attn.o_proj: missing", "model.layers.5.mlp.experts.{0..7}.up_proj: missing"
    )


def test_a_layer_number_of_thousands_of_digits(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    folder.add(f"model.layers.{'9' * 3000}.eh_proj.weight")
    folder.add(f"model.layers.{10**10}.input_layernorm.weight", shape=(256,))
    folder.add("model.layers.-1.input_layernorm.weight", shape=(256,))
    folder.add("model.layers.01.input_layernorm.weight", shape=(256,))
    folder.save()
    said = refused(folder.path)
    said.says("model.layers.10000000000.input_layernorm: unknown tensor")
    said.says("model.layers.-1.input_layernorm: unknown tensor")


def test_an_mtp_prefix_of_longcat_is_dropped_only_as_it_is_known(sample: Bench, refused: Refuse) -> None:
    folder = sample("longcat")
    folder.add("model.mtp.layers.0.self_attn.extra.weight")
    folder.save()
    said = refused(folder.path)
    said.says("model.mtp.layers.0.self_attn.extra: unknown tensor", "No rule of longcat_flash names it.")


def test_everything_that_is_wrong_is_told_in_one_run(sample: Bench, refused: Refuse) -> None:
    folder = sample("fp8")
    del folder.tensors["model.norm.weight"]
    del folder.tensors[EXPERT.format(1)]
    del folder.tensors[EXPERT.format(1) + "_scale_inv"]
    folder.reshape("lm_head.weight", [512, 128])
    folder.reshape(f"{KV_B}.weight_scale_inv", [1, 1])
    folder.add("model.vision_tower.weight")
    folder.save()
    places = {name: raw.file for name, raw in folder.tensors.items()}
    folder.write_index({**places, "model.norm.weight": "model-00003-of-00003.safetensors"})
    said = refused(folder.path)
    said.says(
        "lost with it: model.norm.weight",
        "expert 1 is missing",
        "lm_head: shape mismatch",
        f"{KV_B}: its stored tensors do not fit together",
        "model.vision_tower: unknown tensor",
        "model-00003-of-00003.safetensors: is listed in the index but is not in the folder",
    )


def test_a_problem_of_every_layer_is_one_paragraph(sample: Bench, refused: Refuse) -> None:
    folder = sample()
    for layer in (1, 2, 3):
        folder.add(f"model.layers.{layer}.mlp.extra.weight")
    folder.save()
    said = refused(folder.path)
    said.says("3 x model.layers.{1..3}.mlp.extra: unknown tensor")
    assert len(said.problems) == 3


def test_inspect_tells_the_same_problems(
    sample: Bench, refused: Refuse, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sample()
    del folder.tensors[EXPERT.format(5)]
    folder.add("model.vision_tower.weight")
    folder.save()
    said = refused(folder.path)
    assert main(["inspect", str(folder.path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == said.problems
    assert main(["inspect", str(folder.path)]) == 1
    assert said.message.removeprefix("error: ") in capsys.readouterr().out


# --- options -----------------------------------------------------------------------------------------


def test_a_group_size_that_does_not_divide_leaves_tensors_unquantized(
    samples: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-q", "--q-group-size", "128"]
    assert main(["plan", str(samples["bf16"]), *flags]) == 0
    text = capsys.readouterr().out
    note = (
        "unquantized, because the group size 128 does not divide its last axis of 64:"
        " 4 x model.layers.{0..3}.self_attn.embed_q"
    )
    assert note in text
    assert main(["plan", str(samples["bf16"]), *flags, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["notes"] == [note]
    dense = {tensor["name"] for tensor in plan["tensors"] if tensor["to"] == "bf16"}
    assert "model.layers.0.self_attn.embed_q.weight" in dense
    assert "model.layers.0.self_attn.unembed_out.weight" not in dense


@pytest.mark.parametrize("kind", ["folder", "file", "link to nowhere"])
def test_an_output_that_exists_is_left_alone(
    samples: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", str(samples["bf16"]), "--mlx-path", str(out)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: Cannot save to the path {out} as it already exists")
    assert sorted(tmp_path.rglob("*")) == before
    assert out.is_symlink() or "mine" in (out / "mine.txt" if out.is_dir() else out).read_text()


WRONG = {
    "both": (["-q", "-d"], "Choose either quantize or dequantize, not both."),
    "bits": (["--q-bits", "8"], "--q-bits: not allowed without -q."),
    "group and mode": (["--q-group-size", "32", "--q-mode", "mxfp4"], "--q-group-size, --q-mode: not"),
    "recipe": (["--quant-predicate", "mixed_2_6"], "not allowed without -q."),
    "recipe and mode": (
        ["-q", "--q-mode", "mxfp4", "--quant-predicate", "mixed_2_6"],
        "only support 'affine'",
    ),
    "seven bits": (["-q", "--q-bits", "7"], "affine quantization has no bits 7; it takes 2, 3, 4, 5, 6, 8"),
    "group": (["-q", "--q-group-size", "48"], "affine quantization has no group size 48"),
    "mxfp4 bits": (["-q", "--q-mode", "mxfp4", "--q-bits", "8"], "mxfp4 quantization has no bits 8"),
    "embed": (["--embed-q", "eight"], "'eight' is not a quantization; write BITS[,GROUP[,MODE]]"),
    "two sources": (["--hf-path", "another"], "Name one checkpoint: as SRC, or with --hf-path."),
}


@pytest.mark.parametrize(("flags", "text"), WRONG.values(), ids=WRONG.keys())
def test_options_that_make_no_sense_are_wrong_usage(
    samples: dict[str, Path], refused: Refuse, flags: list[str], text: str
) -> None:
    refused(samples["bf16"], *flags, code=2).says(text)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["convert", "somewhere", "--quantise"], "unrecognized arguments: --quantise"),
        (["convert", "somewhere", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["convert", "somewhere", "--q-bits", "four"], "invalid int value: 'four'"),
        (["transmogrify", "somewhere"], "invalid choice: 'transmogrify'"),
        ([], "required: COMMAND"),
    ],
    ids=["option", "dtype", "bits", "command", "nothing"],
)
def test_what_the_command_does_not_know_is_wrong_usage(
    argv: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert text in capsys.readouterr().err


def test_a_source_that_is_no_folder(tmp_path: Path, refused: Refuse) -> None:
    refused(tmp_path / "nothing").says(f"{tmp_path / 'nothing'}: no such folder")


# --- scales that are no numbers ----------------------------------------------------------------------

NAN32, INF32, ZERO32 = struct.pack("<f", math.nan), struct.pack("<f", math.inf), bytes(4)
NAN16 = b"\xc0\x7f"  # bfloat16


@pytest.mark.parametrize(
    "module", [EXPERT.removesuffix(".weight").format(3), "model.layers.2.self_attn.o_proj"]
)
@pytest.mark.parametrize(
    ("fmt", "scale", "data", "text"),
    [
        pytest.param("fp8", "_scale_inv", NAN32, "weight_scale_inv holds nan", id="nan"),
        pytest.param("fp8", "_scale_inv", INF32, "weight_scale_inv holds inf", id="infinite"),
        pytest.param("e8m0", "_scale_inv", b"\xff", "weight_scale_inv holds nan", id="e8m0_255"),
        pytest.param("tensor", "_scale_inv", NAN16, "weight_scale_inv holds nan", id="of_a_tensor"),
        pytest.param("channel", "_scale", NAN16, "weight_scale holds nan", id="of_a_channel"),
        pytest.param("mxfp4", "_scale", b"\xff", "an E8M0 scale is 255, which is not", id="mxfp4_255"),
        pytest.param("times", "_scale", b"\x7f", "weight_scale holds nan", id="e4m3_nan"),
        pytest.param("times", "_scale_2", NAN32, "weight_scale_2 holds nan", id="second_nan"),
        pytest.param("times", "_scale_2", INF32, "weight_scale_2 holds inf", id="second_infinite"),
        pytest.param("divided", "_global_scale", ZERO32, "weight_global_scale holds 0.0", id="second_zero"),
        pytest.param(
            "divided", "_global_scale", INF32, "weight_global_scale holds inf", id="divisor_infinite"
        ),
    ],
)
def test_a_scale_that_is_no_number(
    fmt: str, scale: str, data: bytes, text: str, module: str, sample: Bench, refused: Refuse
) -> None:
    folder = sample(fmt)
    name = f"{module}.weight{scale}"
    old = folder.tensors[name]
    folder.tensors[name] = replace(old, data=old.data[: -len(data)] + data)
    folder.save()
    refused(folder.path, begun=True).says(f"error: {module}: {text}", "the checkpoint is damaged")
