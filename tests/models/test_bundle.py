"""The model file of DeepSeek V4 outputs: what is in it, and mlx-lm's commands where mla_tools is missing."""

from __future__ import annotations

import ast
import http.client
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_ports
from support import sample

from mla_tools.convert import convert
from mla_tools.models import bundle
from mla_tools.models.bundle import LICENSE, bundled
from mla_tools.options import Options
from mla_tools.spec import DType

ROOT = Path(__file__).parents[2]


def test_the_file_begins_with_the_license_and_imports_mlx_lm_alone() -> None:
    text = bundled("deepseek_v4")
    comment = [line for line in text.splitlines() if line.startswith("#")]
    assert "\n".join(line.removeprefix("#").removeprefix(" ") for line in comment).find(LICENSE.strip()) > 0
    assert (ROOT / "LICENSE").read_text() == LICENSE
    nodes = list(ast.walk(ast.parse(text)))
    imported = {node.module.partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {
        alias.name.partition(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names
    }
    assert imported - sys.stdlib_module_names == {"mlx", "mlx_lm", "numpy"}


def test_the_file_is_formatted_and_linted_as_our_modules_are(tmp_path: Path) -> None:
    (tmp_path / "deepseek_v4.py").write_text(bundled("deepseek_v4"))
    for command in (["check"], ["format", "--diff"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml")]
        done = subprocess.run([*ruff, "deepseek_v4.py"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


REFUSED = {
    "a name twice": (
        "X = 1\n",
        "from mla_tools.models.other import X\n\nX = 2\n",
        r"two modules define \['X'\]",
    ),
    "another name": ("X = 1\n", "from mla_tools.models.other import X as Y\n", "cannot have"),
    "another room": ("X = 1\n", "from mla_tools.errors import MlaToolsError\n", "cannot have"),
    "the future": ("X = 1\n", "from __future__ import annotations\n", "__future__"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_modules_that_cannot_stand_in_one_file(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, main, message = REFUSED[case]
    for name, text in (("other", other), ("main", main)):
        (tmp_path / f"{name}.py").write_text(f'"""A module."""\n\n{text}')
    monkeypatch.setattr(bundle, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=message):
        bundled("main")
    bundled.cache_clear()


# ---- without mla_tools

MISSING = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mla_tools":
            raise ModuleNotFoundError("mla_tools is missing here")

sys.meta_path.insert(0, Missing())
"""

# Several commands in one process: importing mlx-lm takes most of the time of each.
COMMANDS = """
import json, runpy, sys

try:
    import mla_tools
except ModuleNotFoundError:
    print("missing")
for command in json.loads(sys.argv[1]):
    sys.argv = command
    print(command[0])
    runpy.run_module(f"mlx_lm.{command[0]}", run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of a sample, with the numbers as they are and in float32, texts, and a process without us."""
    folder = tmp_path_factory.mktemp("v4")
    source = sample("deepseek_v4", "deepseek-v4")
    convert(source, folder / "packed")
    convert(source, folder / "dense", Options(dequantize=True, dtype=DType.F32))
    (folder / "texts").mkdir()
    for name in ("train", "valid"):
        lines = [json.dumps({"text": f"text number {i}"}) + "\n" for i in range(4)]
        (folder / "texts" / f"{name}.jsonl").write_text("".join(lines))
    (folder / "without").mkdir()
    (folder / "without" / "sitecustomize.py").write_text(MISSING)
    return folder


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder / "without")}


def test_commands_of_mlx_lm_without_mla_tools(folder: Path) -> None:
    packed, dense = (["--model", str(folder / name), "--trust-remote-code"] for name in ("packed", "dense"))
    train = ["lora", "--train", "--data", str(folder / "texts"), "--iters", "1", "--batch-size", "1"]
    train += ["--num-layers", "4", "--val-batches", "1", "--max-seq-length", "16"]
    adapter = ["--adapter-path", str(folder / "adapter")]
    asked = ["--prompt", "Hello", "--max-tokens", "3"]
    commands = [
        ["generate", *packed, *asked],
        [*train, *packed, *adapter, "--grad-checkpoint"],
        ["generate", *packed, *asked, *adapter],
        [*train, *dense, "--fine-tune-type", "full", "--adapter-path", str(folder / "full")],
    ]
    command = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("missing\ngenerate\n")
    assert done.stdout.count("Generation: 3 tokens") == 2
    assert (folder / "adapter" / "adapters.safetensors").exists()
    assert (folder / "full" / "adapters.safetensors").exists()


def test_the_server_of_mlx_lm_without_mla_tools(folder: Path) -> None:
    port = free_ports(1)
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(folder / "packed")]
    command += ["--trust-remote-code", "--port", str(port), "--log-level", "INFO"]
    with subprocess.Popen(command, env=environment(folder), stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            said = next(line for line in server.stderr if "httpd" in line)
            assert str(port) in said
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            body = json.dumps({"prompt": "Hello", "max_tokens": 3})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
            assert answer["usage"]["completion_tokens"] == 3
        finally:
            server.terminate()
            server.stderr.close()
