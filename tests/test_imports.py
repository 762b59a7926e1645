"""The rooms of the package import one another in one direction, and nothing loads MLX before it is needed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "mla_tools"

# Room -> the rooms that it may import. A folder is one room; a new file needs a line here.
# Everything may import errors and names.
PICTURE: dict[str, set[str]] = {
    "__init__": {"convert", "kv_b", "mla", "options", "quantization", "spec", "weights"},
    "__main__": {"cli", "isolation"},
    "cli": {
        "architectures",
        "codecs",
        "console",
        "convert",
        "files",
        "options",
        "plan",
        "progress",
        "quantization",
        "report",
        "samples",
    },
    "progress": {"console", "convert", "report"},
    "convert": {"distributed", "execute", "files", "options", "output", "plan", "verify"},
    "report": {"files", "plan", "rules", "verify"},
    "console": set(),
    "isolation": set(),
    "weights": {"architectures", "files", "ops", "options", "plan", "spec", "transform"},
    "integrations": {"architectures", "isolation", "mla", "weights"},
    "kv_b": {"codecs", "mla", "ops", "quantization", "spec", "steps", "transform"},
    "execute": {"distributed", "files", "ops", "output", "plan", "transform"},
    "transform": {"codecs", "ops", "overflow", "spec", "steps"},
    "steps": {"codecs", "ops", "spec"},
    "output": {"distributed", "files", "plan"},
    "plan": {
        "architectures",
        "codecs",
        "files",
        "ops",
        "options",
        "precision",
        "quantization",
        "rules",
        "spec",
        "steps",
        "table",
    },
    "options": {"codecs", "files", "quantization", "spec"},
    "overflow": {"spec"},
    "precision": {"quantization", "spec"},
    "samples": {"architectures", "codecs", "files", "ops", "rules", "spec", "table"},
    "architectures": {"models", "ops", "quantization", "rules", "table"},
    "table": {"ops", "rules"},
    "rules": {"ops", "quantization", "spec"},
    "ops": {"mla", "spec"},
    "mla": set(),
    "codecs": {"kernels", "quantization", "spec"},
    "files": {"spec"},
    "quantization": {"kernels"},
    "kernels": set(),
    "models": set(),
    "spec": set(),
    "verify": {"architectures", "files", "isolation", "models", "output"},
    "distributed": set(),
    "errors": set(),
    "names": set(),
}

FOLDERS = {
    "architectures",
    "codecs",
    "files",
    "integrations",
    "models",
    "output",
    "plan",
    "samples",
    "verify",
}

# Folders that never import one another.
APART = {"architectures", "codecs", "files"}

# What costs seconds or hundreds of megabytes to import, or may be missing on a machine.
HEAVY = {"mlx", "mlx_lm", "huggingface_hub", "rich"}
NEVER = {"torch", "transformers"}
# Runtimes: nothing but mlx-lm imports them, when it has long been loaded.
LIGHT = {path for path in PACKAGE.rglob("*.py") if "models" not in path.parts}

MODULES = sorted(PACKAGE.rglob("*.py"))


@dataclass(frozen=True)
class Import:
    """One import: the dotted name, its line, and when it happens."""

    name: str
    line: int
    at_start: bool


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> list[Import]:
    return list(_imports(ast.parse(path.read_text()).body, path, at_start=True))


def _imports(nodes: list[ast.stmt], path: Path, *, at_start: bool) -> Iterator[Import]:
    """Yield every import, also those within functions and conditions."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_start)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = ["mla_tools", *path.relative_to(PACKAGE).parent.parts]
                base = ".".join([*home[: len(home) - node.level + 1], *([base] if base else [])])
            # "from mla_tools import ops" imports a module; "from mla_tools.ops import Op" a name of it.
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "mla_tools" else [base]
            for name in names:
                yield Import(name, node.lineno, at_start)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from _imports(node.body, path, at_start=False)
            yield from _imports(node.orelse, path, at_start=at_start)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _imports(node.body, path, at_start=False)
        else:
            inside = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            handlers = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.ExceptHandler)]
            yield from _imports(inside, path, at_start=at_start)
            for handler in handlers:
                yield from _imports(handler.body, path, at_start=at_start)


def test_every_import_is_seen() -> None:
    for path in MODULES:
        nodes = ast.walk(ast.parse(path.read_text()))
        lines = {node.lineno for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))}
        assert {found.line for found in imports(path)} == lines, path


def test_every_room_is_in_the_picture() -> None:
    assert {room_of(path) for path in MODULES} == PICTURE.keys()
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == FOLDERS


def test_the_picture_points_one_way() -> None:
    list(TopologicalSorter(PICTURE).static_order())
    for folder in APART:
        assert not PICTURE[folder] & (APART - {folder})


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_what_the_picture_allows(path: Path) -> None:
    room = room_of(path)
    allowed = {*PICTURE[room], "errors", "names"} | ({room} if room in FOLDERS else set())
    for found in imports(path):
        package, _, rest = found.name.partition(".")
        if package == "mla_tools":
            assert rest.partition(".")[0] in allowed, f"{path.name}:{found.line} imports {found.name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_heavy_is_imported_at_the_start(path: Path) -> None:
    for found in imports(path):
        package = found.name.partition(".")[0]
        assert package not in NEVER, f"{path.name}:{found.line}"
        heavy = found.at_start and package in HEAVY and path in LIGHT
        assert not heavy, f"{path.name}:{found.line} imports {found.name}"
