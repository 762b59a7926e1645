"""No module is ever imported from the working directory, whatever lies there and however it is started."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from mla_tools.isolation import trusted_path
from mla_tools.samples import write_sample
from mla_tools.verify.asking import child_path

SCRIPTS = Path(sys.executable).parent

# All modules of Python, of what is installed here, and a few that could be tried for.
INSTALLED = {name for name in packages_distributions() if name.isidentifier()}
NAMES = sorted({*sys.stdlib_module_names, *INSTALLED, "sitecustomize", "usercustomize"})
SHADOW = """
import os as _os
_os.write(_os.open({ran!r}, _os.O_WRONLY | _os.O_CREAT | _os.O_APPEND), b"{name}\\n")
"""

COMMANDS = {
    "inspect": ["inspect", "."],
    "plan": ["plan", ".", "-q"],
    "convert": ["convert", ".", "--mlx-path", "../out {way}", "-q"],
    "resume": ["convert", ".", "--mlx-path", "../done", "--resume"],
    "verify": ["verify", "../done"],
    "sample": ["sample", "kimi_linear", "../sample {way}"],
    "hub": ["inspect", "org/name"],
}

WAYS = {
    "script": [str(SCRIPTS / "mla-sanitize")],
    "module": [sys.executable, "-P", "-m", "mla_tools"],
    "launched": [
        *(str(SCRIPTS / "mlx.launch"), "-n", "1", "--backend", "ring", "--"),
        str(SCRIPTS / "mla-sanitize"),
    ],
}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a sample in which each module has a shadow, and with its conversion."""
    home = tmp_path_factory.mktemp("shadows")
    write_sample("deepseek_v3", home / "source", "fp8")
    for name in NAMES:
        text = SHADOW.format(ran=str(home / "ran"), name=name)
        package = home / "source" / name
        if NAMES.index(name) % 2:  # a package comes before a module of the same name
            package.mkdir()
            (package / "__init__.py").write_text(text)
            (package / "__main__.py").write_text(text)
        else:
            package.with_name(f"{name}.py").write_text(text)
    convert = [str(SCRIPTS / "mla-sanitize"), "convert", "source", "--mlx-path", "done"]
    subprocess.run(convert, cwd=home, check=True, capture_output=True)
    assert ran(home) == set()
    return home


def ran(home: Path) -> set[str]:
    """Return the shadows that were imported, and forget them."""
    path = home / "ran"
    names = set(path.read_text().split()) if path.exists() else set()
    path.unlink(missing_ok=True)
    return names


def environment(**more: str) -> dict[str, str]:
    """Return an environment without a path of its own, in which the hub cannot be reached."""
    held = {key: text for key, text in os.environ.items() if key != "PYTHONPATH"}
    return {**held, "HF_HUB_OFFLINE": "1", **more}


def test_a_shadow_would_be_seen(sample: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", "import json, mlx_lm"],
        cwd=sample / "source",
        capture_output=True,
        env=environment(),
    )
    assert {"json", "mlx_lm"} & ran(sample)
    assert len(NAMES) > 300


CALLS = [(command, way) for command in COMMANDS for way in WAYS if way != "launched" or command == "convert"]


@pytest.mark.parametrize(("command", "way"), CALLS)
def test_no_command_imports_from_the_checkpoint_that_it_is_called_in(
    command: str, way: str, sample: Path
) -> None:
    done = subprocess.run(
        [*WAYS[way], *(word.replace("{way}", way) for word in COMMANDS[command])],
        cwd=sample / "source",
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert ran(sample) == set()
    # mlx.launch gives 0 whatever its processes gave.
    assert way == "launched" or done.returncode == (1 if command == "hub" else 0), done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_python_m_drops_the_working_directory_before_it_imports_anything(tmp_path: Path) -> None:
    # Of what Python itself imports for -m nothing lies here; of what the command imports, all.
    own = {"importlib", "contextlib", "collections", "functools", "types", "warnings", "keyword", "operator"}
    own |= {"reprlib", "runpy", "pkgutil", "typing", "encodings", "abc", "mla_tools", "_collections_abc"}
    names = [name for name in NAMES if name not in own]
    for name in names:
        (tmp_path / f"{name}.py").write_text(SHADOW.format(ran=str(tmp_path / "ran"), name=name))
    command = [sys.executable, "-m", "mla_tools", "sample", "deepseek_v3", "sample"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert ran(tmp_path) == set()
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("own", ["", ".", "{here}", "{here}/../source", "/nowhere:"])
def test_a_path_that_names_the_working_directory_is_cut(own: str, tmp_path: Path) -> None:
    here = tmp_path / "source"
    here.mkdir()
    for name in ("json", "argparse", "numpy", "yaml"):
        (here / f"{name}.py").write_text(SHADOW.format(ran=str(tmp_path / "ran"), name=name))
    path = own.replace("{here}", str(here))
    command = [str(SCRIPTS / "mla-sanitize"), "sample", "deepseek_v3", "sample"]
    done = subprocess.run(
        command,
        cwd=here,
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=f"{path}{os.pathsep}"),
    )
    assert ran(tmp_path) == set()
    assert done.returncode == 0, done.stderr


def test_the_path_of_a_child_has_no_relative_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    before = list(sys.path)
    monkeypatch.setattr(sys, "path", ["", ".", str(tmp_path), str(tmp_path / "link"), "lib", *before])
    assert trusted_path() == [entry for entry in before if entry]
    assert child_path()[:-1] == trusted_path()


def test_somebody_may_work_where_packages_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    (home,) = {Path(entry) for entry in sys.path if entry.endswith("site-packages")}
    monkeypatch.chdir(home)
    assert str(home) in trusted_path()
