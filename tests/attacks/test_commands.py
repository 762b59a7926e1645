"""Hostile files through the command: each has its sentence and exit code 1, no traceback, no output."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attacks.hostile import entry, folder_with_config, index, packed, shard, table

from mla_tools.architectures import MODEL_TYPES
from mla_tools.cli import main
from mla_tools.samples import sample_config, write_sample

COMMANDS = ("inspect", "plan", "convert")
CONFIG = sample_config("deepseek_v3")
NGRAM = {**sample_config("longcat_flash_ngram"), "model_type": "longcat_flash_ngram"}
ONE = "model.safetensors"
AGAIN = "  Download the file again; an interrupted download leaves files like this."
NO_NUMBER = "  Other readers of JSON refuse the file or read something else: correct the number."
STORED = f"  It is stored in {ONE}."
KNOWN = f"  needed  one of {', '.join(MODEL_TYPES)}"
PLAIN = (
    "  needed  the plain name of a .safetensors file in the folder\n  Correct the index or download it again."
)
NO_RULE = (
    "  found   BF16 [2, 4] (bf16)\n  No rule of deepseek_v3 names it. Is model_type in config.json right?"
)

FOUR = bytes(4)
GOOD = entry("U8", [4], [0, 4])
TWICE = b'{"a":%b,"a":%b}' % ((json.dumps(GOOD).encode(),) * 2)

# Puts files into a new folder that holds a sound config.json.
Attack = Callable[[Path], None]


def file(data: bytes) -> Attack:
    """The only weight file is this."""
    return lambda folder: void((folder / ONE).write_bytes(data))


def tensors(*names: str) -> Attack:
    """The only weight file holds these tensors."""
    return lambda folder: shard(folder, ONE, *names)


def config(data: bytes | dict[str, Any]) -> Attack:
    """The config is this, beside a sound file."""

    def attack(folder: Path) -> None:
        shard(folder, ONE, "a")
        text = data if isinstance(data, bytes) else json.dumps({**CONFIG, **data}).encode()
        (folder / "config.json").write_bytes(text)

    return attack


def pointed(to: str, *before: Attack) -> Attack:
    """The index says that a tensor lies there, and there are a sound file and what is made before."""

    def attack(folder: Path) -> None:
        for make in before:
            make(folder)
        shard(folder, "b.safetensors", "b")
        index(folder, {"a": to, "b": "b.safetensors"})

    return attack


def outside(folder: Path) -> None:
    """A sound file beside the folder, and a link to where it lies."""
    shard(folder.parent, "a.safetensors", "a")
    (folder / "link").symlink_to("..")


def leads(to: str) -> Attack:
    return lambda folder: (folder / ONE).symlink_to(to)


def files(**names: str) -> Attack:
    """Sound files of one tensor each, in a set where the names are numbers."""

    def attack(folder: Path) -> None:
        for name, tensor in names.items():
            shard(folder, f"{name.replace('_', '-')}.safetensors", tensor)

    return attack


def void(_: object) -> None:
    """Return nothing, whatever a call returned."""


def not_in_the_folder(name: str) -> str:
    return f"{name}: the index names this file, but it is not in the folder\n{PLAIN}\n  lost with it: a"


NOT_A_LENGTH = (
    f"{ONE}: is not a safetensors file: it does not start with the length of a header\n"
    "  needed  a length from 2 to 100,000,000\n  found   {}\n" + AGAIN
)
NO_SIZE = "config.json: {} cannot be used\n  needed  an integer between 1 and {}\n  found   {}"

ATTACKS: dict[str, tuple[Attack, str]] = {
    "header past the end": (
        file(packed(b"{}", length=1000)),
        f"{ONE}: is truncated inside its header: 998 bytes of it are missing\n"
        f"  needed  1,008 bytes for the header\n  found   a file of 10 bytes\n{AGAIN}",
    ),
    "header of 2^63": (
        file(packed(b"{}", length=1 << 63)),
        NOT_A_LENGTH.format(
            r"9,223,372,036,854,775,808 (the file starts with b'\x00\x00\x00\x00\x00\x00\x00\x80{}')"
        ),
    ),
    "deep header": (
        file(packed(b'{"a":' + b"[" * 200_000)),
        f"{ONE}: is not a safetensors file: its header is nested too deeply\n{AGAIN}",
    ),
    "tensor twice": (file(packed(TWICE, FOUR)), f"{ONE}: the header has a duplicate key: a\n{AGAIN}"),
    "offsets negative": (
        file(table({"a": entry("U8", [4], [-4, 0])})),
        "a: data_offsets is not a range\n  needed  two integers in order, 0 or more\n"
        f"  found   [-4, 0]\n{STORED}",
    ),
    "offsets overlap": (
        file(table({"a": GOOD, "b": entry("U8", [4], [2, 6])}, bytes(6))),
        f"b: the bytes overlap those of a\n{STORED}",
    ),
    "offsets with a gap": (
        file(table({"a": GOOD, "b": entry("U8", [4], [6, 10])}, bytes(10))),
        f"{ONE}: 2 bytes after a belong to no tensor\n{AGAIN}",
    ),
    "dtype unknown": (
        file(table({"a": entry("F4", [8], [0, 4])}, FOUR)),
        "a: the dtype is unknown\n  needed  BOOL, U8, I8, F8_E4M3, F8_E5M2, F8_E8M0, U16, I16, F16, BF16,"
        f" U32, I32, F32, U64, I64, F64\n  found   'F4'\n{STORED}",
    ),
    "product overflows": (
        file(table({"a": entry("U8", [1 << 32, 1 << 32], [0, 0])})),
        "a: the number of bytes does not fit the shape and the dtype\n"
        f"  needed  about 2^64 bytes for U8 [4294967296, 4294967296]\n  found   0\n{STORED}",
    ),
    "range of another size": (
        file(table({"a": entry("BF16", [2, 4], [0, 15])}, bytes(15))),
        "a: the number of bytes does not fit the shape and the dtype\n"
        f"  needed  16 bytes for BF16 [2, 4]\n  found   15\n{STORED}",
    ),
    "name leads up": (tensors("../../a"), f"../../a: unknown tensor\n{NO_RULE}"),
    "name is a path": (tensors("/etc/passwd"), f"/etc/passwd: unknown tensor\n{NO_RULE}"),
    "name with NUL": (
        tensors("a\0b"),
        rf"'a\x00b': the name of a tensor contains the character '\x00'" f"\n{STORED}",
    ),
    "name of 1 MB": (
        tensors("n" * (1 << 20)),
        f"'{'n' * 256}'... (1,048,576 characters): the name of a tensor has more than 4096 characters\n"
        + STORED,
    ),
    "name of 2000 indices": (tensors("a" + ".0" * 2000), f"a{'.0' * 2000}: unknown tensor\n{NO_RULE}"),
    "index leads up": (pointed("../a.safetensors", outside), not_in_the_folder("../a.safetensors")),
    "index leads away": (pointed("/etc/passwd"), not_in_the_folder("/etc/passwd")),
    "index through a linked folder": (
        pointed("link/a.safetensors", outside),
        not_in_the_folder("link/a.safetensors"),
    ),
    "index names a folder": (
        pointed("a.safetensors", lambda folder: (folder / "a.safetensors").mkdir()),
        "a.safetensors: is not a regular file\n  found   a folder\n  lost with it: a",
    ),
    "index names a linked folder": (
        pointed("a.safetensors", lambda folder: (folder / "a.safetensors").symlink_to("..")),
        "a.safetensors: is not a regular file\n  found   a folder\n  lost with it: a",
    ),
    "link to a device": (leads("/dev/zero"), f"{ONE}: is not a regular file\n  found   a pipe or a device"),
    "link to another file": (
        lambda folder: void(
            ((folder.parent / "secret").write_text("secret" * 4), leads("../secret")(folder))
        ),
        NOT_A_LENGTH.format("7,310,314,599,212,082,547 (the file starts with b'secretsecretsecr')"),
    ),
    "index names a tensor that is nowhere": (
        lambda folder: void((shard(folder, ONE, "a"), index(folder, {"a": ONE, "b": ONE}))),
        f"b: the index places it in {ONE}, but it is not there\n"
        "  found   in no file that could be read\n"
        "  The index and the files do not belong together: download them again.",
    ),
    "index names another file than the tensor's": (
        lambda folder: void(
            (files(x="a", y="b")(folder), index(folder, dict.fromkeys("ab", "y.safetensors")))
        ),
        "a: the index places it in y.safetensors, but it is not there\n"
        "  found   in no file that could be read\n"
        "  The index and the files do not belong together: download them again.",
    ),
    "index names a file that is not there": (
        pointed("gone.safetensors"),
        "gone.safetensors: is listed in the index but is not in the folder\n"
        "  Download it into {folder}.\n  lost with it: a",
    ),
    "stray file": (
        files(model_00001_of_00002="a", model_00002_of_00002="b", model="a"),
        "a: is stored in two files\n  needed  one place\n"
        f"  found   model-00001-of-00002.safetensors and {ONE}\n"
        "  Remove the file that does not belong to this model.",
    ),
    "config too large": (
        config(b'{"a":"' + b"x" * (16 << 20) + b'"}'),
        "config.json: is too large\n  needed  at most 16,777,216 bytes\n  found   16,777,224 bytes",
    ),
    "config a list": (config(b"[]"), f"config.json: is not a JSON object\n{AGAIN}"),
    "config deep": (
        config(b'{"a":' + b"[" * 64 + b"]" * 64 + b"}"),
        "config.json: is nested too deeply\n  needed  at most 64 levels",
    ),
    "config too deep to be read": (
        config(b'{"a":' * 200_000),
        f"config.json: is nested too deeply\n{AGAIN}",
    ),
    "config with a key twice": (
        config(b'{"model_type": "deepseek_v3", "model_type": "llama"}'),
        "config.json: has a duplicate key: model_type\n"
        "  Readers disagree on which of the two counts: remove one.",
    ),
    **{
        f"config with {number.decode()}": (
            config(b'{"model_type": "deepseek_v3", "rope_theta": [%b]}' % number),
            f"config.json: is not JSON: it holds {number.decode()}, and JSON has no such number\n{NO_NUMBER}",
        )
        for number in (b"NaN", b"Infinity", b"-Infinity")
    },
    **{
        f"config with {number.decode()}": (
            config(b'{"model_type": "deepseek_v3", "rope_theta": %b}' % number),
            f"config.json: holds the number {number.decode()}, which is read as infinity\n{NO_NUMBER}",
        )
        for number in (b"1e999", b"-1.5E+309")
    },
    "index with NaN": (
        lambda folder: void((shard(folder, ONE, "a"), index(folder, {"a": ONE}, total_size=math.nan))),
        "model.safetensors.index.json: is not JSON: it holds NaN, and JSON has no such number\n" + NO_NUMBER,
    ),
    "header with Infinity": (
        file(table({"a": entry("U8", [math.inf], [0, 4])}, FOUR)),
        f"{ONE}: is not a safetensors file: its header is not JSON: it holds Infinity, and JSON has no such"
        f" number\n{AGAIN}",
    ),
    "header with 1e999": (
        file(packed(b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,0]}}')),
        f"{ONE}: is not a safetensors file: its header holds the number 1e999, which is read as infinity\n"
        f"{AGAIN}",
    ),
    "config with a name of 1 MB": (
        config({"model_type": "x" * (1 << 20), "architectures": "\x1b[2J\ud800"}),
        f"config.json: this architecture is not known\n{KNOWN}\n"
        f"  found   model_type '{'x' * 37}...{'x' * 38}', architectures '\\x1b[2J\\ud800'",
    ),
    "pickle": (
        lambda folder: void((folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")),
        "{folder}: holds no safetensors files\n  needed  model*.safetensors\n  found   pytorch_model.bin\n"
        "  Pickle files are refused, because loading one can run code: convert to safetensors first.",
    ),
    "pickle in the index": (
        pointed("pytorch_model.bin"),
        "pytorch_model.bin: the index names this file, but it is not a safetensors file\n"
        f"{PLAIN}\n  lost with it: a",
    ),
    "pickle by another name": (
        file(b"\x80\x04\x95cposix\nsystem\n."),
        NOT_A_LENGTH.format(
            r"7,598,539,524,801,889,408 (the file starts with b'\x80\x04\x95cposix\nsystem')"
        ),
    ),
    **{
        f"{key} {value}": (config({key: value}), NO_SIZE.format(key, most, value))
        for key, value, most in (
            ("num_hidden_layers", 10**9, 4096),
            ("n_routed_experts", 10**12, 4096),
            ("num_attention_heads", 10**9, 4096),
            ("hidden_size", 1 << 62, 1 << 28),
            ("vocab_size", 1 << 62, 1 << 28),
            ("kv_lora_rank", 10**30, 1 << 28),
        )
    },
    "layers and experts together": (
        config({"num_hidden_layers": 4096, "n_routed_experts": 4096}),
        "config.json: the model would have too many tensors\n  needed  a model of at most 4,000,000 tensors\n"
        "  found   50,376,705\n  Are the numbers of layers and experts right?",
    ),
    "tables of embeddings": (
        config({**NGRAM, "emb_split_num": 4096}),
        NO_SIZE.format("emb_split_num", 16, 4096),
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("attack", "paragraph"), ATTACKS.values(), ids=ATTACKS.keys())
def test_each_attack_has_its_sentence(
    attack: Attack, paragraph: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_with_config(tmp_path / "model", json.dumps(CONFIG))
    attack(folder)
    before = sorted(tmp_path.rglob("*"))
    flags = ["--mlx-path", str(tmp_path / "out")] if command == "convert" else []
    assert main([command, str(folder), *flags]) == 1
    said = capsys.readouterr()
    # A survey, where one can be made, has the problems at its end.
    text = said.err or said.out
    assert paragraph.replace("{folder}", str(folder)) in text.rstrip("\n").split("\n\n")
    assert "Traceback" not in said.err
    assert len(text) < 20_000
    assert sorted(tmp_path.rglob("*")) == before


MANY = {
    "lists in the config": config(b'{"a":[' + b"[]," * 300_000 + b"0]}"),
    "objects in the header": file(packed(b'{"a":[' + b"{}," * 300_000 + b"0]}")),
    "tensors in the header": file(table({f"t.{n}": GOOD for n in range(20_000)}, FOUR)),
}


@pytest.mark.parametrize(
    "attack", [*(attack for attack, _ in ATTACKS.values()), *MANY.values()], ids=[*ATTACKS, *MANY]
)
def test_memory_is_a_matter_of_the_size_of_the_files(attack: Attack, tmp_path: Path) -> None:
    folder = folder_with_config(tmp_path / "model", json.dumps(CONFIG))
    attack(folder)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    tracemalloc.start()
    try:
        assert main(["plan", str(folder)]) == 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # An empty object takes three bytes in JSON and 72 in memory, with its place in a list.
    assert peak < (8 << 20) + 32 * size


def test_sizes_are_refused_within_bounded_memory(tmp_path: Path) -> None:
    folders = [name for name in ATTACKS if any(c.isdigit() for c in name) or " and " in name]
    for number, name in enumerate(folders):
        folder = tmp_path / str(number) / "model"
        ATTACKS[name][0](folder_with_config(folder, json.dumps(CONFIG)))
    # Python, numpy and the threads of its BLAS reserve most of this.
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30));"
        "from mla_tools.cli import main; sys.exit(sum(main(['plan', path]) != 1 for path in sys.argv[1:]))"
    )
    paths = [str(tmp_path / str(number) / "model") for number in range(len(folders))]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", limited, *paths], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(folders)
    assert "Traceback" not in done.stderr


# --- what is accepted, and what becomes of it ----------------------------------------------------------


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "sample"
    write_sample("deepseek_v3", folder, "fp8")
    return folder


@pytest.fixture(scope="module")
def expected(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return what becomes of the sample where it lies in a plain folder."""
    out = tmp_path_factory.mktemp("expected") / "out"
    return converted(sample, out)


def converted(folder: Path, out: Path) -> dict[str, bytes]:
    """Return the files that a conversion wrote, after asserting that the user can change them.

    All but the record beside them, which names the source.
    """
    assert main(["convert", str(folder), "--mlx-path", str(out)]) == 0
    assert all(path.stat().st_mode & 0o200 and not path.is_symlink() for path in out.iterdir())
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "mla_tools.json"}


def weights(held: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in held.items() if name.endswith(".safetensors")}


def test_tensors_at_odd_offsets_are_converted_alike(
    sample: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(sample, folder)
    paths = [*folder.glob("*.safetensors")]
    assert paths
    for path in paths:
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        odd = raw[8:start].rstrip() + b" " * (len(raw[8:start].rstrip()) % 2 == 0)
        assert len(odd) % 2 == 1
        path.write_bytes(packed(odd, raw[start:]))
    assert weights(converted(folder, tmp_path / "out")) == weights(expected)


def test_tensors_that_the_index_does_not_name_are_taken_and_stray_files_left_out(
    sample: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sample, folder)
    shard(folder, "model-00003-of-00003.safetensors", "model.norm.weight")
    path = folder / "model.safetensors.index.json"
    held = json.loads(path.read_text())
    file = held["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(held))
    assert weights(converted(folder, tmp_path / "out")) == weights(expected)
    said = capsys.readouterr().out
    assert (
        f"  {file} holds tensors that the index does not name; they are used: 1 tensor"
        f" (model.norm.weight)\n" in said
    )
    assert "  model-00003-of-00003.safetensors: not named by the index, ignored\n" in said


def test_code_of_a_checkpoint_never_runs(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(sample, folder)
    code = f"open({str(ran)!r}, 'w')\n"
    # Also under the names of modules that a conversion and mlx-lm import.
    for name in ("modeling_evil.py", "tokenization_evil.py", "numpy.py", "mlx_lm.py", "json.py"):
        (folder / name).write_text(code)
    path = folder / "config.json"
    asked = {"model_file": "modeling_evil.py", "auto_map": {"AutoModel": "modeling_evil.Evil"}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **asked}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    out = tmp_path / "out"

    assert main(["inspect", str(folder)]) == 0
    assert main(["plan", str(folder), "--trust-remote-code"]) == 0
    assert "\n  model_file: removed\n" in capsys.readouterr().out
    assert main(["convert", str(folder), "--mlx-path", str(out), "--trust-remote-code"]) == 0
    # Nor when the output is loaded, even by one who trusts all of it: the tokenizer's code is for those
    # who ask transformers for it.
    load = "import sys; from mlx_lm.utils import load_model; from pathlib import Path;"
    load += "load_model(Path(sys.argv[1]), trust_remote_code=True)"
    subprocess.run([sys.executable, "-c", load, str(out)], check=True, cwd=tmp_path)
    assert not ran.exists()
    written = json.loads((out / "config.json").read_text())
    assert "model_file" not in written
    assert written["auto_map"] == asked["auto_map"]
    assert (out / "tokenization_evil.py").read_text() == code


def test_a_companion_that_is_a_link_out_of_the_folder_is_reported(
    sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sample, folder)
    (tmp_path / "private.txt").write_text("mine")
    (folder / "notes.txt").symlink_to("../private.txt")
    (folder / "same.txt").symlink_to("config.json")
    assert main(["plan", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "\n  notes.txt is a link out of the folder; the file that it points to is copied\n" in said
    assert "\n  generation_config.json, notes.txt, same.txt, tokenizer.json" in said
    assert "same.txt is" not in said


# --- where checkpoints lie -----------------------------------------------------------------------------


def cached(sample: Path, root: Path) -> Path:
    """Return the snapshot of a hub cache with the sample's files: links to blobs that nobody may write."""
    snapshot = root / "models--org--name" / "snapshots" / ("0" * 40)
    blobs = root / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sample.iterdir()):
        blob = blobs / f"{number:064x}"
        shutil.copy(path, blob)
        blob.chmod(0o444)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def read_only_files(sample: Path, root: Path) -> Path:
    """Return a folder of files that nobody may write."""
    folder = root / "files"
    shutil.copytree(sample, folder)
    for path in folder.iterdir():
        path.chmod(0o444)
    return folder


def read_only_folder(sample: Path, root: Path) -> Path:
    """Return a folder that nobody may write, as on read-only media."""
    folder = read_only_files(sample, root)
    folder.chmod(0o555)
    return folder


class Watch:
    """Audits what this process does to files under a folder, because root may write what nobody may."""

    def __init__(self) -> None:
        self.folder = ""
        self.touched: list[tuple[str, object]] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.folder or not args or not str(args[0]).startswith(self.folder):
            return
        if event == "open":
            writes = isinstance(args[2], int) and args[2] & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
            )
        else:
            writes = event in {
                "os.mkdir",
                "os.remove",
                "os.rename",
                "os.rmdir",
                "os.truncate",
                "os.utime",
                "os.chmod",
            }
        if writes:
            self.touched.append((event, args))


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.mark.parametrize("make", [cached, read_only_files, read_only_folder], ids=lambda make: make.__name__)
def test_a_source_that_nobody_may_write_is_converted_and_left_alone(
    make: Callable[[Path, Path], Path],
    sample: Path,
    expected: dict[str, bytes],
    watch: Watch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "source"
    root.mkdir()
    folder = make(sample, root)
    before = {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in root.rglob("*")}
    watch.folder = str(root)
    try:
        (root / "probe").touch()
        assert watch.touched, "the watch sees nothing"
        (root / "probe").unlink()
        watch.touched.clear()
        assert main(["inspect", str(folder)]) == 0
        assert main(["plan", str(folder)]) == 0
        assert "link" not in capsys.readouterr().out
        held = converted(folder, tmp_path / "out")
    finally:
        watch.folder = ""
    assert held == expected
    assert not watch.touched
    assert {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in root.rglob("*")} == before
    folder.chmod(0o755)  # so that pytest can clean up
