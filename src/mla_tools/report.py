"""Plans, surveys and errors for people and for machines."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_tools.errors import CheckpointError
from mla_tools.files.checkpoint import Checkpoint, Skipped
from mla_tools.files.place import shown
from mla_tools.names import NUMBER, fold_files, fold_names, natural, short
from mla_tools.plan import Plan, Step, Steps, Workload

if TYPE_CHECKING:
    from mla_tools.verify import Verified

__all__ = [
    "human_bytes",
    "plan_json",
    "plan_text",
    "summary_text",
    "survey_json",
    "survey_text",
    "verified_json",
    "verified_text",
]

# Lists of files are wrapped at this width.
_WIDTH = 110

_UNITS = ("kB", "MB", "GB", "TB")


def human_bytes(count: int) -> str:
    """Return a number of bytes in decimal units, as disks and the hub count them: "688.6 GB"."""
    if count < 1000:
        return f"{count} B"
    power = 1
    while power < len(_UNITS) and count >= 999.95 * 1000**power:
        power += 1
    return f"{count / 1000**power:.1f} {_UNITS[power - 1]}"


def plan_text(plan: Plan, workload: Workload | None = None, *, long: bool = False) -> str:
    """Return a plan as lines in which tensors that differ in their indices alone are one.

    `long`: every tensor has a line of its own.
    """
    tensors = sum(len(step.targets) for step in plan.steps)
    stored = len(plan.checkpoint.tensors)
    lines = [
        f"{plan.family.name}: {stored:,} stored tensors, {human_bytes(plan.source_nbytes)}"
        f" -> {tensors:,} tensors, {human_bytes(plan.nbytes)} in {_count(len(plan.files), 'file')}",
        "",
        *_step_lines(plan.steps, long),
        *_origin_lines(plan.steps, long),
    ]
    if plan.drops:
        lines += ["", f"dropped: {_count(len(plan.drops), 'tensor')}"]
        lines += _drop_lines(plan, long)
    if plan.config_changes:
        lines += ["", "config.json", *(f"  {line}" for line in plan.config_changes)]
    if plan.added:
        lines += ["", "added files", *(f"  {name}" for name in plan.added)]
    if plan.copied:
        lines += ["", "copied files", *_wrapped([shown(file.name) for file in plan.copied])]
    if skipped := _skipped(plan):
        lines += ["", "skipped files", *_skipped_lines(skipped)]
    if plan.notes:
        lines += ["", "notes", *(f"  {line}" for line in plan.notes)]
    if workload is not None:
        threads = _count(workload.threads, "thread")
        lines += ["", f"memory: up to {human_bytes(workload.peak_bytes)} with {threads} (--max-memory)"]
    return "\n".join(lines)


def summary_text(plan: Plan, folder: Path) -> str:
    """Return what a finished conversion did, in a few lines."""
    words = Counter(target.exactness for step in plan.steps for target in step.targets)
    counts = ", ".join(f"{count:,} {word}" for word, count in words.most_common())
    lines = [
        f"{folder}: {plan.family.name}, {human_bytes(plan.nbytes)} in {_count(len(plan.files), 'file')}",
        f"  {_count(words.total(), 'tensor')}: {counts}; {len(plan.drops):,} dropped",
    ]
    return "\n".join(lines + [f"  {note}" for note in plan.notes])


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def _wrapped(names: Sequence[str], end: str = "") -> list[str]:
    """Return names as a list over lines that are not too long, with an end such as ": why"."""
    lines: list[str] = []
    for number, name in enumerate(names, 1):
        word = name + ("," if number < len(names) else end)
        if lines and len(lines[-1]) + len(word) < _WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(f"  {word}")
    return lines


def _skipped(plan: Plan) -> list[Skipped]:
    """Return what of the source's folder does not go beside the weights, and why."""
    replaced = [file.name for file in plan.checkpoint.companions if file.name in plan.added]
    return [*plan.checkpoint.skipped, *(Skipped(name, "written anew") for name in replaced)]


def _skipped_lines(skipped: Sequence[Skipped]) -> list[str]:
    """Return the skipped files of each reason, the files of a set as one."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for each in skipped:
        reasons[each.reason].append(shown(each.name))
    return [line for reason, names in reasons.items() for line in _wrapped(fold_files(names), f": {reason}")]


def _step_lines(steps: Sequence[Step], long: bool) -> list[str]:
    groups: dict[tuple[str, str, str, int], list[str]] = defaultdict(list)
    for number, step in enumerate(steps):
        before = _formats(step)
        for target in step.targets:
            after = target.codec.name
            change = after if before == after else f"{before} -> {after}"
            shape = f"[{', '.join(map(str, target.spec.shape))}]"
            groups[target.exactness, change, shape, number if long else 0].append(short(target.name))
    rows = [
        (*key[:3], line) for key, names in groups.items() for line in (names if long else fold_names(names))
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)] if rows else []
    lines = []
    for row in rows:
        left = "  ".join(text.ljust(width) for text, width in zip(row[:3], widths, strict=True))
        lines.append(f"{left}  {row[3]}")
    return lines


def _formats(step: Step) -> str:
    return " + ".join(dict.fromkeys(codec.name for codec in step.codecs))


def _origin_lines(steps: Sequence[Step], long: bool) -> list[str]:
    """Return what is renamed or reshaped: the targets and the sources of each group of steps."""
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for number, step in enumerate(steps):
        names = [short(source.name) for source in step.sources]
        targets = [short(target.name) for target in step.targets]
        if names == targets:
            continue
        key = f"{type(step.op).__name__} {_words(targets)} {_words(names[:1])}{number if long else ''}"
        held = groups.setdefault(key, ([], []))
        held[0].extend(names)
        held[1].extend(targets)
    if not groups:
        return []
    lines = ["", "made from"]
    for names, targets in groups.values():
        lines += [f"  {line}" for line in (targets if long else [", ".join(fold_names(targets))])]
        lines += [f"    <- {line}" for line in (names if long else [", ".join(fold_names(names))])]
    return lines


_DIGITS = re.compile("[0-9]+")


def _words(names: Iterable[str]) -> str:
    return " ".join(_DIGITS.sub("", name) for name in names)


# More lines than this for one reason are shown as whole layers; --long names every tensor.
_MAX_DROP_LINES = 4


def _drop_lines(plan: Plan, long: bool) -> list[str]:
    reasons: dict[str, list[str]] = defaultdict(list)
    for drop in plan.drops:
        reasons[drop.reason].append(short(drop.source.name))
    lines = []
    for reason, names in reasons.items():
        lines.append(f"  {reason}")
        folded = sorted(names, key=natural) if long else fold_names(sorted(names))
        if not long and len(folded) > _MAX_DROP_LINES:
            layers = Counter(_layer(name) for name in names)
            if len(layers) > _MAX_DROP_LINES:
                layers = Counter(name.partition(".")[0] for name in names)
            folded = [f"{count:,} under {layer}" for layer, count in sorted(layers.items())]
        lines += [f"    {line}" for line in folded]
    return lines


def _layer(name: str) -> str:
    """Return a name up to its first index."""
    words = NUMBER.split(name, maxsplit=1)
    return f"{words[0]}.{words[1]}" if len(words) > 1 else name


def plan_json(plan: Plan, workload: Workload) -> dict[str, Any]:
    """Return a plan as plain values, every tensor by name."""
    return {
        "family": plan.family.name,
        "source": {
            "path": str(plan.checkpoint.place),
            "stored_tensors": len(plan.checkpoint.tensors),
            "bytes": plan.source_nbytes,
        },
        "tensors": [
            {
                "name": target.name,
                "shape": list(target.spec.shape),
                "from": _formats(step),
                "to": target.codec.name,
                "exactness": target.exactness,
                "sources": [source.name for source in step.sources],
                "stored": {
                    name: {"shape": list(spec.shape), "dtype": spec.dtype.name}
                    for name, spec in target.stored().items()
                },
            }
            for step in plan.steps
            for target in step.targets
        ],
        "dropped": [{"name": drop.source.name, "reason": drop.reason} for drop in plan.drops],
        "files": [{"name": file.name, "bytes": file.layout.size} for file in plan.files],
        "copied_files": [file.name for file in plan.copied],
        "skipped_files": [asdict(each) for each in _skipped(plan)],
        "added_files": list(plan.added),
        "bytes": plan.nbytes,
        "parameters": plan.parameters,
        "peak_bytes": workload.peak_bytes,
        "threads": workload.threads,
        "config": plan.config,
        "config_changes": list(plan.config_changes),
        "embed_q": [asdict(cost) for cost in plan.embed_q_costs],
        "notes": list(plan.notes),
    }


# --- inspect -----------------------------------------------------------------------------------------

# The config keys that say how large a model is, in the order in which people name them.
_GEOMETRY = (
    "num_hidden_layers",
    "num_layers",
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "num_experts",
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "num_nextn_predict_layers",
)


def survey_json(checkpoint: Checkpoint, made: Steps) -> dict[str, Any]:
    """Return what a checkpoint is: family, geometry, formats with counts and bytes, problems, notes."""
    claimed = {source.name for source in made.tensors}
    sources = [*made.tensors, *(drop.source for drop in made.drops if drop.source.name not in claimed)]
    formats: dict[str, Counter[str]] = defaultdict(Counter)
    for source in sources:
        nbytes = sum(checkpoint.tensors[name].spec.nbytes for name in source.parts.values())
        formats[source.codec.name].update(tensors=1, bytes=nbytes)
    config = {**checkpoint.config, **made.family.given(checkpoint.config)}
    return {
        "path": str(checkpoint.place),
        "family": made.family.name,
        "geometry": {key: config[key] for key in _GEOMETRY if config.get(key) is not None},
        "files": len(checkpoint.shards),
        "stored_tensors": len(checkpoint.tensors),
        "bytes": sum(stored.spec.nbytes for stored in checkpoint.tensors.values()),
        "layouts": {", ".join(names): count for names, count in made.layouts.items()},
        "formats": {word: dict(counts) for word, counts in formats.items()},
        "dropped": len(made.drops),
        "notes": [*checkpoint.notes, *made.notes],
        "problems": [problem.values() for problem in (*checkpoint.problems, *made.problems)],
    }


def survey_text(survey: dict[str, Any], error: CheckpointError | None) -> str:
    """Return a survey as lines."""
    lines = [
        f"{survey['path']}: {survey['family']}, {survey['stored_tensors']:,} stored tensors, "
        f"{human_bytes(survey['bytes'])} in {_count(survey['files'], 'file')}",
        "",
        "geometry",
        *(f"  {key:<26} {value}" for key, value in survey["geometry"].items()),
    ]
    if survey["layouts"]:
        lines += ["", "layout", *(f"  {line}" for line in _layout_lines(survey["layouts"]))]
    if survey["formats"]:
        lines += ["", "formats"]
        for word, counts in survey["formats"].items():
            lines.append(f"  {word:<26} {counts['tensors']:>9,} tensors  {human_bytes(counts['bytes']):>10}")
    if survey["dropped"]:
        dropped = _count(survey["dropped"], "tensor")
        lines += ["", f"not part of the model: {dropped} (mla-sanitize plan lists them)"]
    if survey["notes"]:
        lines += ["", "notes", *(f"  {line}" for line in survey["notes"])]
    lines += ["", str(error) if error else "no problems"]
    return "\n".join(lines)


def _layout_lines(layouts: Mapping[str, int]) -> list[str]:
    """Return the layout that a checkpoint is in, or which of its tensors are in which."""
    named = {tuple(names.split(", ")): count for names, count in layouts.items()}
    shared = [name for name in next(iter(named)) if all(name in names for names in named)]
    if shared:
        return [" and ".join(shared) + (", which are the same here" if len(shared) > 1 else "")]
    return [f"{' or '.join(names):<26} {count:>9,} tensors" for names, count in named.items()]


# --- verify ------------------------------------------------------------------------------------------


def verified_json(found: Verified, folder: Path, *, quick: bool) -> dict[str, Any]:
    """Return a check of an output as plain values."""
    return {
        "output": str(folder),
        "files": found.files,
        "bytes": found.nbytes,
        "quick": quick,
        "notes": list(found.notes),
    }


def verified_text(found: Verified, folder: Path, *, quick: bool) -> str:
    """Return a check of an output as lines; `quick`: the data of the weight files was left out."""
    compared = "all except the data of the weight files" if quick else "all bytes"
    size = human_bytes(found.nbytes)
    line = f"{folder}: complete, {found.files} files, {size}; unchanged ({compared} compared)"
    return "\n".join([line, *(f"  {note}" for note in found.notes)])
