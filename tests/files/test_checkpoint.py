"""open_checkpoint on the folders that people have: with and without an index, whole and half downloaded."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from attacks.hostile import SHARDS, folder_with_config, folder_with_shards, index, shard

from mla_tools.files.checkpoint import Skipped, open_checkpoint
from mla_tools.files.place import Folder
from mla_tools.samples import write_sample
from mla_tools.spec import DType, Spec

ONE, TWO, THREE = SHARDS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a config, three shards of two layers each, and the index of them."""
    return folder_with_shards(tmp_path / "model", '{"num_hidden_layers": 6, "x": 1.5}')


def layers(*numbers: int) -> set[str]:
    return {f"model.layers.{number}.weight" for number in numbers}


def test_a_sound_folder(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.place == Folder(folder)
    assert checkpoint.config["num_hidden_layers"] == 6
    assert checkpoint.tensors.keys() == layers(0, 1, 2, 3, 4, 5)
    assert [shard.name for shard in checkpoint.shards] == [ONE, TWO, THREE]
    assert (checkpoint.problems, checkpoint.notes, checkpoint.lost) == ((), (), {})
    stored = checkpoint.tensors["model.layers.3.weight"]
    assert (stored.file.path, stored.spec) == (folder / TWO, Spec((2, 4), DType.BF16))
    assert stored.offset == (folder / TWO).stat().st_size - 16


def test_a_shard_is_known_by_its_size_and_the_digest_of_its_header(folder: Path) -> None:
    before = open_checkpoint(folder).shards
    for path, found in zip((folder / ONE, folder / TWO, folder / THREE), before, strict=True):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        digest = hashlib.sha256(data[8 : 8 + length]).hexdigest()
        assert (found.name, found.size, found.digest, found.tag) == (path.name, len(data), digest, "")
    shard(folder, TWO, "model.layers.3.weight", "model.layers.2.weight")  # the same size, another header
    after = open_checkpoint(folder).shards
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]
    assert before[1].size == after[1].size


def test_links_into_a_blob_store_are_followed(folder: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:x}")
        path.symlink_to(blobs / f"{number:x}")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.problems == ()
    assert checkpoint.tensors.keys() == layers(0, 1, 2, 3, 4, 5)
    assert [shard.name for shard in checkpoint.shards] == [ONE, TWO, THREE]


def test_a_missing_shard_is_one_problem_and_loses_its_tensors(folder: Path) -> None:
    (folder / TWO).unlink()
    checkpoint = open_checkpoint(folder)
    reason = f"{TWO} is listed in the index but is not in the folder"
    assert [str(problem) for problem in checkpoint.problems] == [
        f"{TWO}: is listed in the index but is not in the folder\n"
        f"  Download it into {folder}.\n"
        "  lost with it: 2 x model.layers.{2,3}.weight"
    ]
    assert checkpoint.lost == dict.fromkeys(layers(2, 3), reason)
    assert checkpoint.tensors.keys() == layers(0, 1, 4, 5)


def test_a_damaged_shard_loses_its_tensors(folder: Path) -> None:
    (folder / TWO).write_bytes((folder / TWO).read_bytes()[:-5])
    checkpoint = open_checkpoint(folder)
    text = "is truncated: 5 bytes are missing at the end"
    assert [(problem.subject, problem.what) for problem in checkpoint.problems] == [(TWO, text)]
    assert checkpoint.lost == dict.fromkeys(layers(2, 3), f"{TWO} is damaged or unreadable: {text}")
    assert [shard.name for shard in checkpoint.shards] == [ONE, THREE]


def test_tensors_that_the_index_lacks_are_taken_with_a_note(folder: Path) -> None:
    scales = [f"model.layers.{layer}.weight_scale" for layer in (2, 3)]
    shard(folder, TWO, "model.layers.2.weight", "model.layers.3.weight", *scales)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.problems == ()
    assert checkpoint.tensors.keys() == layers(0, 1, 2, 3, 4, 5) | set(scales)
    assert checkpoint.notes == (
        f"{TWO} holds tensors that the index does not name; they are used: "
        "2 tensors (2 x model.layers.{2,3}.weight_scale)",
    )


def test_a_tensor_that_its_shard_lacks_is_a_problem(folder: Path) -> None:
    shard(folder, TWO, "model.layers.2.weight")
    checkpoint = open_checkpoint(folder)
    (problem,) = checkpoint.problems
    what = f"the index places it in {TWO}, but it is not there"
    assert (problem.subject, problem.what) == ("model.layers.3.weight", what)
    assert problem.found == "in no file that could be read"
    assert checkpoint.lost == {"model.layers.3.weight": what}


def test_a_tensor_in_another_shard_is_a_problem_that_says_where(folder: Path) -> None:
    shard(folder, TWO, "model.layers.2.weight")
    shard(folder, THREE, *sorted(layers(3, 4, 5)))
    checkpoint = open_checkpoint(folder)
    (problem,) = checkpoint.problems
    assert problem.subject == "model.layers.3.weight"
    assert problem.found == f"in {THREE}"
    assert checkpoint.lost == {}
    assert checkpoint.tensors["model.layers.3.weight"].file.name == THREE


def test_a_tensor_of_a_missing_shard_that_lies_elsewhere_is_not_lost(folder: Path) -> None:
    (folder / TWO).unlink()
    shard(folder, THREE, *sorted(layers(3, 4, 5)))
    checkpoint = open_checkpoint(folder)
    assert [problem.subject for problem in checkpoint.problems] == [TWO]
    assert checkpoint.lost.keys() == layers(2)


def test_a_tensor_in_two_shards_is_a_problem_that_names_both(folder: Path) -> None:
    shard(folder, ONE, *sorted(layers(0, 1, 5)))
    checkpoint = open_checkpoint(folder)
    (problem,) = checkpoint.problems
    assert (problem.subject, problem.what) == ("model.layers.5.weight", "is stored in two files")
    assert problem.found == f"{ONE} and {THREE}"
    assert checkpoint.tensors["model.layers.5.weight"].file.name == THREE  # where the index has it


def test_files_that_the_index_does_not_name_are_left_out(folder: Path) -> None:
    (folder / "consolidated.safetensors").write_bytes(b"not even read")
    shard(folder, "extra.safetensors", "extra")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.problems == ()
    assert checkpoint.notes == (
        "consolidated.safetensors, extra.safetensors: not named by the index, ignored",
    )
    assert "extra" not in checkpoint.tensors


def test_hidden_files_are_ignored(folder: Path) -> None:
    for name in (f"._{ONE}", "._config.json", ".x.safetensors", "._model.safetensors.index.json"):
        (folder / name).write_bytes(b"\0\5\26\7")
    assert open_checkpoint(folder).notes == ()
    (folder / "model.safetensors.index.json").unlink()
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.notes, checkpoint.problems) == ((), ())
    assert checkpoint.tensors.keys() == layers(0, 1, 2, 3, 4, 5)


def test_the_only_index_of_another_name_is_used(folder: Path) -> None:
    (folder / "model.safetensors.index.json").rename(folder / "fp8.safetensors.index.json")
    (folder / TWO).unlink()
    assert open_checkpoint(folder).lost.keys() == layers(2, 3)


def test_of_several_indexes_the_usual_one_counts_or_none(folder: Path) -> None:
    index(folder, {"a": "a.safetensors"}, "a.safetensors.index.json")
    assert open_checkpoint(folder).problems == ()
    (folder / "model.safetensors.index.json").rename(folder / "b.safetensors.index.json")
    checkpoint = open_checkpoint(folder)
    (problem,) = checkpoint.problems
    assert problem.what == "has several indexes"
    assert problem.found == "a.safetensors.index.json, b.safetensors.index.json"
    assert checkpoint.tensors.keys() == layers(0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("files", "taken", "note"),
    [
        pytest.param(["model.safetensors"], ["model.safetensors"], "", id="one file"),
        pytest.param(["weights.safetensors"], ["weights.safetensors"], "", id="any name"),
        pytest.param(["consolidated.safetensors"], ["consolidated.safetensors"], "", id="consolidated alone"),
        pytest.param(
            [
                "adapter_model.safetensors",
                "consolidated.safetensors",
                "model.safetensors",
                "other.safetensors",
            ],
            ["model.safetensors"],
            "adapter_model.safetensors, consolidated.safetensors, other.safetensors: "
            "not part of model.safetensors, left out",
            id="model first",
        ),
        pytest.param(
            ["adapters.safetensors", "consolidated-1.safetensors", "a.safetensors", "b.safetensors"],
            ["a.safetensors", "b.safetensors"],
            "adapters.safetensors, consolidated-1.safetensors: "
            "not part of a.safetensors, b.safetensors, left out",
            id="others next",
        ),
    ],
)
def test_without_an_index_the_names_decide(
    tmp_path: Path, files: list[str], taken: list[str], note: str
) -> None:
    folder = folder_with_config(tmp_path / "model")
    for file in files:
        shard(folder, file, f"tensor of {file}")
    checkpoint = open_checkpoint(folder)
    assert [shard.name for shard in checkpoint.shards] == taken
    assert checkpoint.tensors.keys() == {f"tensor of {file}" for file in taken}
    assert checkpoint.notes == ((note,) if note else ())
    assert checkpoint.problems == ()


@pytest.mark.parametrize(
    ("there", "total", "what", "needed"),
    [
        pytest.param([1, 3], 3, "1 of 3 files are missing", "m-00002-of-00003.safetensors", id="hole"),
        pytest.param([0, 1, 2], 3, "", "", id="from zero"),
        pytest.param(
            [0, 2], 3, "1 of 3 files are missing", "m-00001-of-00003.safetensors", id="hole from zero"
        ),
        pytest.param([1], 1, "", "", id="one"),
        pytest.param(
            [2],
            20,
            "19 of 20 files are missing",
            ", ".join(f"m-{k:05}-of-00020.safetensors" for k in (1, 3, 4, 5, 6, 7, 8, 9)) + " and 11 more",
            id="many",
        ),
    ],
)
def test_a_set_of_files_with_holes_names_the_missing(
    tmp_path: Path, there: list[int], total: int, what: str, needed: str
) -> None:
    folder = folder_with_config(tmp_path / "model")
    for number in there:
        shard(folder, f"m-{number:05}-of-{total:05}.safetensors", f"t.{number}")
    problems = open_checkpoint(folder).problems
    found = [(problem.subject, problem.what, problem.needed) for problem in problems]
    assert found == ([(f"m-*-of-{total:05}.safetensors", what, needed)] if what else [])


def test_companions_are_everything_but_weights(folder: Path) -> None:
    wanted = [
        "LICENSE",
        "LICENSE.txt",
        "NOTICE",
        "README.md",
        "additional_chat_templates/rag.jinja",
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "configuration_deepseek.py",
        "generation_config.json",
        "merges.txt",
        "other.model",
        "qwen.tiktoken",
        "tiktoken.model",
        "tokenization_kimi.py",
        "tokenizer.json",
        "tokenizer.model",
        "tool.jsonl",
    ]
    others = [
        "fp8.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        ".gitattributes",
        "additional_chat_templates/.hidden.jinja",
    ]
    (folder / "additional_chat_templates" / "older").mkdir(parents=True)
    for name in wanted + others:
        (folder / name).write_text("{}")
    (folder / "assets.json").mkdir()
    (folder / "linked.json").symlink_to(folder / "tokenizer.json")
    (folder / "vocab.json").symlink_to(folder / "nowhere")
    checkpoint = open_checkpoint(folder)
    assert [path.name for path in checkpoint.companions] == sorted([*wanted, "linked.json"])
    assert checkpoint.notes == ("vocab.json is a link to a missing file, not copied",)
    skipped = {each.name: each.reason for each in checkpoint.skipped}
    assert skipped == {
        ".gitattributes": "hidden",
        "additional_chat_templates/.hidden.jinja": "hidden",
        "additional_chat_templates/older/": "a folder",
        "assets.json/": "a folder",
        "config.json": "written anew",
        "fp8.safetensors.index.json": "written anew",
        "model.safetensors.index.json": "written anew",
        "pytorch_model.bin": "weights in another format",
        "pytorch_model.bin.index.json": "the index of weights in another format",
        "vocab.json": "is a link to a missing file",
    }
    shards = {shard.name for shard in checkpoint.shards}
    copied = {each.name for each in checkpoint.companions}
    templates = folder / "additional_chat_templates"
    there = [path for path in (*folder.iterdir(), *templates.iterdir()) if path != templates]
    names = {f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}" for path in there}
    assert skipped.keys() == names - shards - copied


SKIPPED = [
    pytest.param("hf_quant_config.json", "describes the quantization", id="quantization"),
    pytest.param("extra.safetensors", "weights that are not part of the model", id="other weights"),
    pytest.param("mla_tools.json", "describes another output of mla-sanitize", id="record"),
    pytest.param("config.json.partial", "named as a file that is not complete", id="partial"),
    pytest.param("Config.json", "differs from config.json only in upper and lower case", id="case"),
    *(
        pytest.param(f"model.{ending}", "weights in another format", id=ending)
        for ending in ("bin", "ckpt", "gguf", "h5", "msgpack", "npz", "onnx", "pkl", "pt", "pth")
    ),
]


@pytest.mark.parametrize(("name", "reason"), SKIPPED)
def test_a_file_that_is_not_copied_has_a_reason(folder: Path, name: str, reason: str) -> None:
    (folder / name).write_text("{}")
    checkpoint = open_checkpoint(folder)
    (found,) = [each.reason for each in checkpoint.skipped if each.name == name]
    assert found.startswith(reason)
    assert name not in {each.name for each in checkpoint.companions}


def test_a_file_that_cannot_be_copied_is_skipped_and_noted(folder: Path) -> None:
    os.mkfifo(folder / "pipe.json")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.notes == ("pipe.json is not a regular file, not copied",)
    assert Skipped("pipe.json", "is not a regular file") in checkpoint.skipped


def test_sections_on_the_old_quantization_are_not_copied(folder: Path) -> None:
    # mlx-lm reads hf_quant_config.json where config.json has no section of its own.
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    checkpoint = open_checkpoint(folder)
    assert "hf_quant_config.json" not in {path.name for path in checkpoint.companions}
    assert (
        "hf_quant_config.json describes the quantization that the checkpoint came with" in checkpoint.notes[0]
    )


# --- total_size --------------------------------------------------------------------------------------

# The folder holds 48 elements in 96 bytes.
SIZES = [
    pytest.param(48, " is 48, the number of elements; the tensors have 96 bytes", id="elements"),
    pytest.param(7, " is 7; the tensors have 96 bytes", id="neither"),
    pytest.param(-(10**30), " is absurd; the tensors have 96 bytes", id="absurd"),
    *(pytest.param(size, "", id=repr(size)) for size in (96, None, "48", 48.0, True, [48])),
]


@pytest.mark.parametrize(("size", "note"), SIZES)
def test_a_total_size_that_is_not_bytes_is_a_note(folder: Path, size: object, note: str) -> None:
    places = {name: stored.file.name for name, stored in open_checkpoint(folder).tensors.items()}
    index(folder, places, total_size=size)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.problems == ()
    wanted = f"total_size in model.safetensors.index.json{note}, and this number is used"
    assert checkpoint.notes == ((wanted,) if note else ())


def test_two_bytes_for_each_element_is_said_where_the_elements_are_wider(tmp_path: Path) -> None:
    write_sample("deepseek_v3", tmp_path / "model", "f32")
    specs = [stored.spec for stored in open_checkpoint(tmp_path / "model").tensors.values()]
    path = tmp_path / "model" / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    index(tmp_path / "model", places, total_size=2 * sum(spec.size for spec in specs))
    (note,) = open_checkpoint(tmp_path / "model").notes
    assert "two bytes for each element" in note


@pytest.mark.parametrize("metadata", [None, [], "x", {"total_size": None}])
def test_metadata_of_any_kind_is_no_error(folder: Path, metadata: object) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "metadata": metadata}))
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.notes, checkpoint.problems) == ((), ())


def test_a_total_size_is_not_told_of_a_folder_that_is_not_whole(folder: Path) -> None:
    places = {name: stored.file.name for name, stored in open_checkpoint(folder).tensors.items()}
    index(folder, places, total_size=48)
    (folder / TWO).unlink()
    assert open_checkpoint(folder).notes == ()
