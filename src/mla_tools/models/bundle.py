"""A model class in one file that needs mlx-lm alone: what an output brings along as its model_file.

The file is made from the text of our modules. The module of the class comes last, and before it those that
it imports from here; their imports are merged, and everything else is left as it is.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["LICENSE", "bundled"]

FOLDER = Path(__file__).parent
PACKAGE = "mla_tools.models"
WIDTH = 110

LICENSE = """\
MIT License

Copyright (c) 2026 The mla-tools authors

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


@dataclass
class Module:
    """A module in parts: its docstring, what it imports from elsewhere and from here, and the rest."""

    docstring: str
    public: str = ""
    body: str = ""
    defined: set[str] = field(default_factory=set)
    plain: set[str] = field(default_factory=set)
    named: dict[str, set[str]] = field(default_factory=dict)
    ours: list[str] = field(default_factory=list)


@functools.cache
def bundled(name: str) -> str:
    """Return the text of one file with the classes of our module `name`.

    ValueError where modules cannot stand in one file: a name that two define, an import of ours that renames,
    and one from __future__, because mlx-lm loads the file under a name by which dataclasses cannot find it.
    """
    modules: dict[str, Module] = {}
    _gather(name, modules)
    defined: set[str] = set()
    for module in modules.values():
        if both := defined & module.defined:
            raise ValueError(f"{name}: two modules define {sorted(both)}")
        defined |= module.defined
    head = f"Made from {PACKAGE}.{name} of mla-tools; it needs mlx-lm, and nothing of mla-tools.\n\n{LICENSE}"
    comment = "".join(f"# {line}".rstrip() + "\n" for line in head.splitlines())
    main = modules[name]
    parts = [f"{comment}\n{main.docstring}\n", _imports(list(modules.values())), f"{main.public}\n\n"]
    bodies = [module.body if module is main else _aside(module) for module in modules.values()]
    return "\n".join([*parts, "\n\n".join(bodies)])


def _aside(module: Module) -> str:
    """Return the body of a module that is not the main one, with its docstring as a comment."""
    lines = module.docstring.strip('"').strip().splitlines()
    return "".join(f"# {line}".rstrip() + "\n" for line in lines) + "\n" + module.body


def _gather(name: str, modules: dict[str, Module]) -> None:
    """Add a module, after those of ours that it imports."""
    module = _read(name)
    for other in module.ours:
        if other not in modules:
            _gather(other, modules)
    modules[name] = module


def _read(name: str) -> Module:
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    first, *nodes = ast.parse(text).body
    lines = text.splitlines()
    module = Module("\n".join(lines[: first.end_lineno]))
    start = first.end_lineno or 0
    for node in nodes:
        if isinstance(node, ast.Import):
            module.plain |= {ast.unparse(ast.Import([alias])) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            _add(node, name, module)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            module.public = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        else:
            module.defined |= _defined(node)
            continue
        # Imports and __all__ stand before the rest.
        start = node.end_lineno or 0
    module.body = "\n".join(lines[start:]).strip("\n") + "\n"
    return module


def _add(node: ast.ImportFrom, name: str, module: Module) -> None:
    """Add an import of names to those of the module, from elsewhere or from here."""
    source = node.module or ""
    if source == "__future__":
        raise ValueError(f"{name}: a model file cannot import from __future__")
    if not source.startswith("mla_tools"):
        module.named.setdefault(source, set()).update(ast.unparse(alias) for alias in node.names)
    elif not source.startswith(f"{PACKAGE}.") or any(alias.asname for alias in node.names):
        raise ValueError(f"{name}: a model file cannot have {ast.unparse(node)!r}")
    else:
        module.ours.append(source.removeprefix(f"{PACKAGE}."))


def _defined(node: ast.stmt) -> set[str]:
    """Return the names that a statement at the top of a module defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    found = [name for name in ast.walk(node) if isinstance(name, ast.Name)]
    return {name.id for name in found if isinstance(name.ctx, ast.Store)}


def _line(source: str, names: list[str]) -> str:
    """Return an import of names, each on a line of its own where they are too many for one."""
    line = f"from {source} import {', '.join(names)}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"from {source} import (", *(f"    {name}," for name in names), ")"])


def _imports(modules: list[Module]) -> str:
    """Return the imports of all modules from elsewhere, sorted; those of the standard library come first."""
    plain = {line for module in modules for line in module.plain}
    named: dict[str, set[str]] = {}
    for module in modules:
        for source, names in module.named.items():
            named.setdefault(source, set()).update(names)
    lines = [(line.split()[1], line) for line in plain]
    lines += [(source, _line(source, sorted(names))) for source, names in named.items()]
    rooms: tuple[list[str], list[str]] = ([], [])
    for source, line in sorted(lines, key=lambda pair: (pair[1].startswith("from"), pair)):
        rooms[source.startswith(("mlx", "numpy"))].append(line)
    return "\n\n".join("\n".join(room) for room in rooms if room) + "\n"
