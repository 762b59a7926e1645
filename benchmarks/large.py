"""Large checkpoints of random bytes, and what it costs to run a command: shared by the benchmarks."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from mla_tools.spec import Spec

# The widths of GLM-4.7-Flash, with a smaller vocabulary: 1.0 GB of bf16 a layer.
CONFIG = {
    "model_type": "glm4_moe_lite",
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "hidden_size": 2048,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "rope_theta": 1000000,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}

# Wide enough for every format's groups, and no wider: for checkpoints of very many tensors.
NARROW = {
    "hidden_size": 64,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "vocab_size": 1024,
}


def build(*args: Any, **kwargs: Any) -> None:
    """Write a checkpoint, see `write`, in a process of its own.

    On Linux the peak memory of a command counts that of the process that started it, so this one imports
    nothing that is large.
    """
    child = get_context("spawn").Process(target=write, args=args, kwargs=kwargs)
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit("the checkpoint could not be written")


def weights(folder: Path) -> int:
    """Return the bytes of the safetensors files in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write(
    folder: Path,
    layers: int,
    fmt: str = "bf16",
    changes: Mapping[str, Any] | None = None,
    shards: int | None = None,
    sparse: bool = False,
) -> None:
    """Write a checkpoint in a format, in so many files or one for each layer; `sparse`: of holes alone."""
    from mla_tools.architectures import table_of
    from mla_tools.codecs import FORMATS
    from mla_tools.codecs.codec import part_name
    from mla_tools.files.safetensors import layout
    from mla_tools.files.writer import Writer
    from mla_tools.samples import format_of, write_tokenizer
    from mla_tools.spec import Spec

    config: dict[str, Any] = {**CONFIG, "num_hidden_layers": layers, **(changes or {})}
    family, table = table_of(config)
    stored: dict[str, tuple[Spec, tuple[int, ...]]] = {}
    for rule in table.rules:
        if rule.alternative:
            continue
        for key in rule.applications():
            for name, shape in zip(rule.sources(key), rule.source_shapes(), strict=True):
                shape = tuple(map(int, shape))
                codec, dtype = format_of(name, shape, family, fmt)
                for part, spec in codec.encoded(Spec(shape, dtype)).items():
                    stored[part_name(name, part)] = spec, shape
    files: dict[str, list[str]] = {}
    for number, name in enumerate(stored):
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(layer if shards is None else str(number * shards // len(stored)), []).append(name)
    folder.mkdir(parents=True)
    pool = _noise()
    for number, names in enumerate(files.values(), start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        specs = {name: stored[name][0] for name in names}
        laid = layout(specs, {"format": "pt"})
        if sparse:
            with (folder / file).open("wb") as holes:
                holes.write(laid.header)
                holes.truncate(laid.size)
            continue
        with Writer(folder / file, laid) as writer:
            for name in names:
                writer.write(name, 0, _bytes(name, *stored[name], pool))
            writer.finish()
    sample = FORMATS[fmt]
    if sample.section is not None:
        config["quantization_config"] = dict(sample.section)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)


def _noise() -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Return bf16 numbers of the size of weights. Every tensor is a piece of it: random enough, and quick."""
    import numpy as np

    rng = np.random.default_rng(0)
    values = (rng.standard_normal(1 << 24).astype(np.float32) * 0.02).view(np.uint32) >> 16
    return values.astype(np.uint16)


def _bytes(
    name: str, spec: Spec, shape: tuple[int, ...], pool: np.ndarray[Any, np.dtype[np.uint16]]
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    import numpy as np

    from mla_tools.spec import DType

    if name.endswith("_shape"):
        return np.array(shape, spec.dtype.numpy).view(np.uint8)
    if spec.dtype is DType.F32:
        return np.full(spec.size, 0.01, np.float32).view(np.uint8)
    if spec.dtype is DType.F8_E8M0 or name.endswith(("_scale", ".scale", "_scale_inv")):
        one = {"F8_E8M0": 120, "U8": 120, "BF16": 0x3C23, "F16": 0x211F}[spec.dtype.name]
        return np.full(spec.size, one, f"u{spec.dtype.nbytes}").view(np.uint8)
    start = sum(name.encode()) % 1000
    noise = pool.view(np.uint8)[2 * start :]
    return noise[: spec.nbytes] if spec.nbytes <= noise.size else np.resize(noise, spec.nbytes)


class Cost(NamedTuple):
    """Wall seconds, peak resident bytes, and the seconds until there was a file of weights to be seen."""

    seconds: float
    peak: int
    first: float


def run(command: list[str], out: Path | None = None, enough: Callable[[], bool] = lambda: False) -> Cost:
    """Run a command, which writes to `out`, and interrupt it when it has done enough.

    What a command starts is not counted where Linux tells the two apart.
    """
    start = time.perf_counter()
    first, interrupted = 0.0, False
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        status, peak = Path(f"/proc/{child.pid}/status"), 0
        while (ended := os.wait4(child.pid, os.WNOHANG))[0] == 0:
            with suppress(OSError, IndexError):  # it may end meanwhile
                peak = int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
            if out and not first and any(out.glob("*.safetensors*")):
                first = time.perf_counter() - start
            if not interrupted and enough():
                child.send_signal(signal.SIGINT)
                interrupted = True
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        said.seek(0)
        if ended[1] and not interrupted:
            raise SystemExit(f"{' '.join(command)} failed:\n{said.read().decode(errors='replace')[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(seconds, peak or ended[2].ru_maxrss * unit, first)


def ours(source: Path, out: Path, *flags: str) -> list[str]:
    """Return the command that converts a checkpoint with this package."""
    return [sys.executable, "-P", "-m", "mla_tools", "convert", str(source), "--mlx-path", str(out), *flags]


def theirs(source: Path, out: Path, *flags: str) -> list[str]:
    """Return the command that converts a checkpoint with mlx-lm."""
    paths = ["--hf-path", str(source), "--mlx-path", str(out)]
    return [sys.executable, "-m", "mlx_lm", "convert", *paths, *flags]


def machine() -> str:
    """Return what the figures were measured on."""
    return f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
