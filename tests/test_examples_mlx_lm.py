"""The model files in examples/mlx_lm: loaded by mlx-lm alone, in the formats of the hub, and on two ranks."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import support
from launching import run_ranks
from mlx.utils import tree_flatten
from mlx_lm import utils
from support import loaded, same

import mla_tools
from mla_tools.architectures import MODEL_TYPES

FOLDER = Path(__file__).parent.parent / "examples" / "mlx_lm"

# Example -> the family of the sample.
EXAMPLES = {path.stem: path.stem for path in sorted(FOLDER.glob("*.py"))} | {"bailing": "bailing_hybrid"}

each_example = pytest.mark.parametrize("example", EXAMPLES)


def with_model_file(example: str, fmt: str, folder: Path) -> Path:
    """Return a sample in which config.json names the example, and says what mlx-lm's class needs."""
    family = EXAMPLES[example]
    shutil.copytree(support.sample(family, fmt), folder)
    shutil.copy(FOLDER / f"{example}.py", folder / "model.py")
    config = json.loads((folder / "config.json").read_text())
    needed = {**MODEL_TYPES[family].rewritten(config), "model_file": "model.py"}
    (folder / "config.json").write_text(json.dumps(needed))
    return folder


def test_each_model_is_there() -> None:
    models = "bailing deepseek_v3 deepseek_v32 glm4_moe_lite kimi_k3 kimi_linear longcat_flash"
    assert sorted(EXAMPLES) == models.split()


@each_example
@pytest.mark.parametrize("fmt", ["bf16", "fp8", "fp8-ue8m0", "ct-int4", "awq"])
def test_mlx_lm_loads_it_with_the_example(example: str, fmt: str, tmp_path: Path) -> None:
    folder = with_model_file(example, fmt, tmp_path / "it")
    model, config = utils.load_model(folder, lazy=True, trust_remote_code=True)
    found = dict(tree_flatten(model.parameters()))
    made = mla_tools.sanitize(loaded(folder), config, packed=False)
    if fmt == "awq":
        assert found.keys() >= {name for name in made if ".q" not in name}
        return
    assert found.keys() == made.keys()
    assert all(same(found[name], made[name]) for name in made)


@each_example
def test_a_folder_without_weights(example: str, tmp_path: Path) -> None:
    folder = with_model_file(example, "bf16", tmp_path / "it")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    utils.load_model(folder, lazy=True, strict=False, trust_remote_code=True)


class Three:
    """Stands in for a group of three processes."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 3


@each_example
def test_ranks_that_do_not_divide_the_heads_are_refused_with_the_sentence(
    example: str, tmp_path: Path
) -> None:
    folder = with_model_file(example, "bf16", tmp_path / "it")
    model, _ = utils.load_model(folder, lazy=True, trust_remote_code=True)
    before: dict[str, Any] = dict(tree_flatten(model.parameters()))
    with pytest.raises(ValueError, match=r"^\w+\.num\w*_heads = 4 heads cannot be shared by 3 ranks$"):
        model.shard(Three())
    assert all(array is before[name] for name, array in tree_flatten(model.parameters()))


RANKS = """
import json, sys
import mlx.core as mx
from pathlib import Path
from mlx_lm import utils

group = mx.distributed.init(strict=True)
tokens = mx.array([[5, 9, 300, 17, 2, 44, 101, 7]])
found = {}

def logits(model):
    cache = model.make_cache() if hasattr(model, "make_cache") else [None] * len(model.layers)
    if cache[0] is None:
        return model(tokens)
    parts = [slice(0, 6), slice(6, 7), slice(7, 8)]
    return mx.concatenate([model(tokens[:, part], cache=cache) for part in parts], axis=1)

for folder in map(Path, sys.argv[1:]):
    one, two = (utils.load_model(folder, lazy=True, trust_remote_code=True)[0] for _ in range(2))
    two.shard(group)
    whole = logits(one)
    found[folder.name] = (mx.abs(logits(two) - whole).max() / mx.abs(whole).max()).item()
print(json.dumps(found))
"""


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    folders = [str(with_model_file(example, "f32", tmp_path / example)) for example in EXAMPLES]
    for code, said in run_ranks([sys.executable, "-c", RANKS, *folders], tmp_path):
        assert code == 0, said
        found = json.loads(said.splitlines()[-1])
        assert found.keys() == EXAMPLES.keys()
        # Sums in another order, in float32.
        assert all(difference < 2e-5 for difference in found.values()), found


def test_the_lines_are_counted_in_the_readme() -> None:
    said = dict(
        re.findall(r"^\| `(\w+)\.py` \|.*\| (\d+) \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    )
    counted = {path.stem: sum(map(bool, path.read_text().splitlines())) for path in FOLDER.glob("*.py")}
    assert {name: int(count) for name, count in said.items()} == counted
