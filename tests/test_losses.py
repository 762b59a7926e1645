"""A file that is missing, in every format: reported once and in a few lines, and what follows is counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from mla_tools.errors import CheckpointError
from mla_tools.files.checkpoint import open_checkpoint
from mla_tools.options import Options
from mla_tools.plan import make_plan
from mla_tools.samples import write_sample

SAMPLES = [
    ("deepseek_v3", "bf16"),
    ("deepseek_v3", "fp8"),
    ("deepseek_v3", "modelopt-nvfp4"),
    ("deepseek_v3", "quark-mxfp4"),
    ("deepseek_v3", "ct-int4-asym"),
    ("deepseek_v3", "awq"),
    ("deepseek_v3", "gptq"),
    ("deepseek_v4", "deepseek-v4"),
]


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        make_plan(open_checkpoint(folder), Options())
    return caught.value


@pytest.mark.parametrize(("family", "fmt"), SAMPLES, ids=[fmt for _, fmt in SAMPLES])
def test_a_file_that_is_missing_is_told_once(family: str, fmt: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_sample(family, folder, fmt)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 2
    for path in files:
        held = path.read_bytes()
        path.unlink()
        error = refusal(folder)
        lines = str(error).splitlines()
        follow = len(error.problems) - 1
        assert follow > 30
        assert lines[0].startswith(f"1 problem, and {follow} that ")
        assert lines[2] == f"{path.name}: is listed in the index but is not in the folder"
        assert len(lines) <= 12
        path.write_bytes(held)


def test_what_has_nothing_to_do_with_the_file_is_told_too(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_sample("deepseek_v3", folder, "fp8")
    (folder / "model-00001-of-00002.safetensors").unlink()
    config = folder / "config.json"
    text = config.read_text()
    assert '"vocab_size": 512' in text
    config.write_text(text.replace('"vocab_size": 512', '"vocab_size": 510'))
    said = str(refusal(folder))
    assert said.startswith("3 problems, and ")
    assert said.endswith(
        "  needed  [510, 256]  (vocab_size 510, hidden_size 256 in config.json)\n  found   [512, 256]"
    )
    assert "\nmodel.embed_tokens: " in said


def test_without_an_index_a_missing_file_may_be_the_cause(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_sample("deepseek_v3", folder, "fp8")
    (folder / "model-00001-of-00002.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()
    error = refusal(folder)
    assert str(error) == (
        f"1 problem, and {len(error.problems) - 1} that may follow from it (--json lists them)\n\n"
        "model-*-of-00002.safetensors: 1 of 2 files are missing\n"
        "  needed  model-00001-of-00002.safetensors\n  found   1 of 2\n  Download the missing files."
    )
