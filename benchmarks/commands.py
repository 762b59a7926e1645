"""What mlx-lm's commands do with our outputs, beside what they do with those of mlx_lm.convert.

    python benchmarks/commands.py [FAMILY ...]     # writes docs/commands.md if no family is named

A cell is a family in an encoding: its sample is converted by both tools with the same flags, and every
command runs on both outputs on the CPU. The tokenizer of all samples is a tokenizer.json, so that none needs
code of its own. Each output has a process of its own, which answers in a line of JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path

ENCODINGS = {
    "f32": [],
    "q4": ["-q"],
    "mxfp4": ["-q", "--q-mode", "mxfp4"],
    "nvfp4": ["-q", "--q-mode", "nvfp4"],
}
COMMANDS = ("generate", "cache_prompt", "server", "lora", "fuse", "convert", "dwq")
DOCUMENT = Path(__file__).parents[1] / "docs" / "commands.md"
WORDS = {(True, True): "both", (True, False): "ours", (False, True): "theirs", (False, False): "—"}
TEXT = "The quick brown fox jumps over the lazy dog. "


def main() -> None:
    """Try every cell, and write or print the table."""
    from mla_tools.architectures import MODEL_TYPES

    families = sys.argv[1:] or [name for name, family in MODEL_TYPES.items() if family.name == name]
    cells = list(product(families, ENCODINGS))
    rows, failures = [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        answers = pool.map(lambda one: ask(*one[0], one[1]), product(cells, ("ours", "theirs")))
        for family, encoding in cells:
            ours, theirs = next(answers), next(answers)
            marks = []
            for command in COMMANDS:
                good, other = ours[command], theirs[command]
                works = (good == "ok", other == "ok")
                marks.append(WORDS[works])
                if not works[0]:
                    failures.append(f"- `{family}` {encoding} `{command}`: ours: {good}; theirs: {other}")
            rows.append(f"| {family} | {encoding} | {' | '.join(marks)} |")
            print(rows[-1], flush=True)
    text = "\n".join([HEAD, *rows, "", "What fails on our outputs:", "", *(failures or ["nothing."]), ""])
    print("\n".join(failures))
    if not sys.argv[1:]:
        DOCUMENT.write_text(text)


HEAD = f"""\
# mlx-lm's commands on our outputs

Written by `python benchmarks/commands.py`. Each sample is converted with the same flags (`--dtype float32`,
and those of the encoding) by `mla-sanitize convert` and by `mlx_lm.convert`, and mlx-lm's commands run on
both. *both*: they work on both outputs; *ours*: only on ours, most often because `mlx_lm.convert` cannot read
the source; *theirs*: only on theirs; —: on neither.

| family | encoding | {" | ".join(COMMANDS)} |
|---|---|{"---|" * len(COMMANDS)}"""


def ask(family: str, encoding: str, who: str) -> dict[str, str]:
    """Return what each command says of an output, from a process of its own."""
    command = [sys.executable, __file__, "--cell", family, encoding, who]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    try:
        found: dict[str, str] = json.loads(lines[-1])
    except (ValueError, IndexError):
        return dict.fromkeys(COMMANDS, f"the process ended with {done.returncode}")
    return found


def cell(family: str, encoding: str, who: str) -> None:
    """Convert a sample, run the commands on the output and print what they say."""
    import mlx.core as mx

    from mla_tools.samples import write_sample, write_tokenizer

    mx.set_default_device(mx.cpu)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        source = folder / "source"
        write_sample(family, source, "f32", changes={"num_nextn_predict_layers": 0})
        for path in source.glob("*token*"):
            path.unlink()
        write_tokenizer(source)
        (folder / "data").mkdir()
        for split in ("train", "valid", "test"):
            lines = [json.dumps({"text": TEXT * 3}) for _ in range(8)]
            (folder / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        flags = ["--dtype", "float32", *ENCODINGS[encoding]]
        found: dict[str, str] = {}
        if who == "ours":
            made = attempt(lambda: ours(source, folder / "model", flags))
        else:
            made = attempt(
                lambda: run("convert", "--hf-path", source, "--mlx-path", folder / "model", *flags)
            )
        for command in COMMANDS:
            found[command] = attempt(partial(TRIES[command], folder)) if made == "ok" else f"convert: {made}"
        print(json.dumps(found), flush=True)
        os._exit(0)  # the server is still there


def ours(source: Path, out: Path, flags: list[str]) -> None:
    from mla_tools.cli import main as command

    assert command(["convert", str(source), "--mlx-path", str(out), *flags]) == 0


def attempt(call: Callable[[], object]) -> str:
    """Return "ok", or the error in a line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            call()
    except SystemExit as error:
        if error.code:
            return (said.getvalue().strip().splitlines() or [str(error.code)])[-1][:160]
    except BaseException as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:140]}"
    return "ok"


def run(module: str, *argv: object) -> None:
    """Run a command of mlx-lm in this process."""
    sys.argv = [module, *map(str, argv)]
    import_module(f"mlx_lm.{module}").main()


def generate(folder: Path, model: str = "model") -> None:
    trusted = ["--trust-remote-code"]
    run("generate", "--model", folder / model, "--prompt", "Hello", "--max-tokens", 4, *trusted)


def cache_prompt(folder: Path) -> None:
    cache = folder / "cache.safetensors"
    model = ["--model", folder / "model", "--trust-remote-code"]
    run("cache_prompt", *model, "--prompt-cache-file", cache, "--prompt", TEXT)
    run("generate", "--prompt-cache-file", cache, "--prompt", "Go on", "--max-tokens", 4, *model[2:])


def server(folder: Path) -> None:
    from mlx_lm import server as module

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    sys.argv = ["server", "--model", str(folder / "model"), "--port", str(port), "--trust-remote-code"]
    threading.Thread(target=module.main, daemon=True).start()
    body = {"prompt": "Hello", "max_tokens": 4}
    url = f"http://127.0.0.1:{port}/v1/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for _ in range(600):
        try:
            answer = json.load(urllib.request.urlopen(request, timeout=120))
            break
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.1)
    assert answer["usage"]["completion_tokens"] > 0


def lora(folder: Path) -> None:
    model = ["--model", folder / "model", "--trust-remote-code", "--adapter-path", folder / "adapter"]
    data = ["--data", folder / "data", "--batch-size", 1, "--iters", 2, "--num-layers", 2]
    run("lora", "--train", *model, *data, "--val-batches", 1)


def fuse(folder: Path) -> None:
    model = ["--model", folder / "model", "--adapter-path", folder / "adapter", "--trust-remote-code"]
    run("fuse", *model, "--save-path", folder / "fused")
    generate(folder, "fused")


def convert(folder: Path) -> None:
    flags = ["--trust-remote-code", "--dtype", "float32"]
    config = json.loads((folder / "model" / "config.json").read_text())
    flags += [] if config.get("quantization") else ["-q"]
    run("convert", "--hf-path", folder / "model", "--mlx-path", folder / "again", *flags)
    generate(folder, "again")


def dwq(folder: Path) -> None:
    model = ["--model", folder / "model", "--trust-remote-code", "--mlx-path", folder / "dwq"]
    data = ["--data-path", folder / "data", "--num-samples", 4, "--batch-size", 1, "--max-seq-length", 64]
    run("quant.dwq", *model, *data)
    generate(folder, "dwq")


TRIES: dict[str, Callable[[Path], None]] = {
    "generate": generate,
    "cache_prompt": cache_prompt,
    "server": server,
    "lora": lora,
    "fuse": fuse,
    "convert": convert,
    "dwq": dwq,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--cell"]:
        cell(*sys.argv[2:5])
    else:
        main()
