"""From headers to a plan: what becomes of each stored tensor, and where each byte of the output goes.

Nothing here reads tensor data, and nothing here imports mlx: a plan is made in a fraction of a second
and tells everything that is wrong with a checkpoint in one go, before a byte is written.
"""

from __future__ import annotations

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from mla_tools.architectures import DRAFTERS, Family, family_of, table_of
from mla_tools.architectures.geometry import label
from mla_tools.codecs import (
    GLOBAL_SCALE,
    SCALES,
    Bundle,
    Codec,
    Dense,
    MlxQuantized,
    Module,
    bundle,
    part_name,
    repacking,
)
from mla_tools.errors import (
    CheckpointError,
    MlaToolsError,
    Problem,
    UsageError,
    clipped,
)
from mla_tools.files.checkpoint import Checkpoint, Planned, no_collector
from mla_tools.files.safetensors import Layout, layout
from mla_tools.kernels import AFFINE_BLOCK, BLOCK
from mla_tools.names import NUMBER, fold_indices, fold_names, natural
from mla_tools.ops import Indices, Op, Same
from mla_tools.precision import expected_error
from mla_tools.quantization import QuantSpec, recipe_spec
from mla_tools.rules import Match, Param, Rule, Table, short
from mla_tools.rules import name as template
from mla_tools.spec import DType, Spec

__all__ = [
    "MAX_MEMORY",
    "NETWORK_THREADS",
    "SLAB_ELEMENTS",
    "THREADS",
    "Drop",
    "EmbedQ",
    "EmbedQCost",
    "Exactness",
    "Options",
    "OutputFile",
    "Plan",
    "Source",
    "Step",
    "Steps",
    "Target",
    "Workload",
    "make_draft_plan",
    "make_plan",
    "make_steps",
    "steps_of",
]

# How many elements are worked on at a time: 16 MB of bf16.
SLAB_ELEMENTS = 8 << 20

# Below this, starting the work on a slab costs as much as the work.
_WORTH_A_THREAD = 1 << 20

# Two MLX streams keep two cores busy and overlap reading with computing; a third gains nothing there.
# What comes over a network is mostly waited for, and each thread waits for a request of its own.
THREADS = 2
NETWORK_THREADS = 8

MAX_MEMORY = 2 * 10**9

# What the process takes before the first slab: the interpreter with MLX and numpy, and what a plan
# holds for each stored tensor. Measured, as growth of the resident size.
_BASE_BYTES = 90 * 10**6
_BYTES_PER_TENSOR = 1200

# Bytes of working memory for each element of a slab beyond what is read and what is written, the growth
# of mx.get_peak_memory. Codes that are decoded, at worst; codes that are packed in another way; and, for
# each byte of the float dtype, what encoders need. Some of them work on a block at a time: its elements,
# and the same for each of these.
_DECODED = 13
_REPACKED = 5
_ENCODED = {"affine": 0.7, "mxfp8": 2.5, "mxfp4": 2.0, "nvfp4": 2.0}
_BLOCK_ENCODED = {"affine": (AFFINE_BLOCK, 8), "mxfp4": (BLOCK, 20), "nvfp4": (BLOCK, 20)}

# MLX takes whole pages for its buffers, of which a slab has a few.
_PAGES = 1 << 16

# The share of the slabs' memory that MLX may keep of freed buffers to use them again.
_CACHED = 4

# Output files are filled up to this, as mlx-lm does it.
SHARD_BYTES = 5 << 30

_DTYPE_NAMES = {"float16": DType.F16, "bfloat16": DType.BF16, "float32": DType.F32}

EmbedQ = Literal["source", "float"] | QuantSpec

Exactness = Literal["copied", "repacked", "rounded", "decoded", "encoded", "requantized"]


@dataclass(frozen=True)
class Options:
    """What the user asks of a conversion; the defaults are those of `mlx_lm.convert`.

    `dtype`: of the tensors that are not quantized; None for what config.json says, or the
    checkpoint's own. `quantize` and `recipe`: the target encoding. `embed_q`: what becomes of the K
    half of a quantized kv_b_proj, whose groups lie across the new axis: encoded like the source, with
    a QuantSpec of its own, or left in floats.
    `overrides`: pairs of a regular expression and what becomes of the modules in whose path it is found,
    None for floats; the last that is found counts. `keep_vision`: the tensors for images are copied;
    mlx-lm's classes leave them out when they load.
    """

    quantize: QuantSpec | None = None
    recipe: str | None = None
    dtype: DType | None = None
    dequantize: bool = False
    embed_q: EmbedQ = field(default_factory=lambda: QuantSpec("affine", 8, 32))
    overrides: tuple[tuple[str, QuantSpec | None], ...] = ()
    keep_vision: bool = False

    def __post_init__(self) -> None:
        if self.quantize and self.dequantize:
            raise UsageError("Choose either quantize or dequantize, not both.")
        if self.recipe and not self.quantize:
            raise UsageError("--quant-predicate says how to quantize; it needs -q.")
        if self.recipe and self.quantize and self.quantize.mode != "affine":
            raise UsageError("Quant predicates only support 'affine' quantization.")
        for pattern, _ in self.overrides:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"--q-override {pattern}: not a regular expression: {error}") from error

    def described(self) -> dict[str, object]:
        """Return the options as plain values."""
        embed_q = self.embed_q if isinstance(self.embed_q, str) else dict(self.embed_q.config)
        return {
            "quantize": None if self.quantize is None else dict(self.quantize.config),
            "recipe": self.recipe,
            "dtype": None if self.dtype is None else self.dtype.name,
            "dequantize": self.dequantize,
            "embed_q": embed_q,
            "overrides": [[pattern, spec and dict(spec.config)] for pattern, spec in self.overrides],
            "keep_vision": self.keep_vision,
        }

    def overriding(self, path: str) -> tuple[str, QuantSpec | None] | None:
        """Return the override that decides on the module at this path, or None."""
        found = None
        for override in self.overrides:
            if re.search(override[0], path):
                found = override
        return found


class Source(NamedTuple):
    """A tensor of the checkpoint: what it is nominally, how it is spelled, where its parts are."""

    name: str
    spec: Spec
    codec: Codec
    parts: Mapping[str, str]

    @property
    def label(self) -> str:
        """The name as people say it."""
        return short(self.name)


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the output.

    `spec` is the nominal one (shape and the float dtype computed in); `parts` are stored names.
    `moved`: the source's packed rows are taken over without decoding.
    """

    name: str
    spec: Spec
    codec: Codec
    parts: Mapping[str, str]
    exactness: Exactness
    moved: bool

    def stored(self) -> dict[str, Spec]:
        """Return the stored tensors that it is written as, by name."""
        return {self.parts[part]: spec for part, spec in self.codec.encoded(self.spec).items()}

    def offset(self, part: str, start: int, stored: Spec) -> int:
        """Return the byte of a part, stored as this spec, at which the rows from `start` on begin."""
        if part == GLOBAL_SCALE and isinstance(self.codec, MlxQuantized) and self.codec.shared:
            return -(-start // self.codec.shared) * stored.dtype.nbytes
        return start * stored.row_bytes


@dataclass(frozen=True, slots=True)
class Step:
    """One application of a rule."""

    op: Op
    sources: tuple[Source, ...]
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class Drop:
    """A tensor that is left out, and why."""

    source: Source
    reason: str


@dataclass(frozen=True)
class EmbedQCost:
    """What the choice of --embed-q costs for tensors of one encoding: bytes, and the expected error of K.

    The errors are parts of the norm of K: of this choice, and of "source" and "float". None: not measured.
    """

    before: str
    after: str
    tensors: int
    nbytes: int
    error: float | None
    error_as_source: float | None
    error_as_float: float | None


@dataclass
class Steps:
    """What becomes of each tensor, with everything that was found wrong or worth saying on the way."""

    family: Family
    steps: list[Step]
    drops: list[Drop]
    problems: list[Problem]
    notes: list[str]
    # Module path -> the quantization of its weight, and the paths that a recipe or the class names.
    quantized: dict[str, QuantSpec]
    named: set[str]
    # The patterns of the overrides that were found in a path.
    overridden: set[str]
    # The stored tensors for images that are kept, which mlx-lm's class does not have as parameters.
    images: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class OutputFile:
    """A file of the output and what stands where in it."""

    name: str
    layout: Layout
    tensors: Mapping[str, Spec]


@dataclass(frozen=True)
class Workload:
    """How a plan is carried out: threads, elements of a slab, and the bytes of memory that this takes.

    MLX may keep `cache_bytes` of buffers that were freed, to use them again; they are among `peak_bytes`.
    """

    threads: int
    slab_elements: int
    peak_bytes: int
    cache_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion will do."""

    checkpoint: Checkpoint
    family: Family
    options: Options
    steps: tuple[Step, ...]
    drops: tuple[Drop, ...]
    files: tuple[OutputFile, ...]
    config: Mapping[str, Any]
    config_changes: tuple[str, ...]
    notes: tuple[str, ...]
    parameters: int
    images: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        """The bytes of tensor data that will be written."""
        return sum(spec.nbytes for file in self.files for spec in file.tensors.values())

    @property
    def source_nbytes(self) -> int:
        """The bytes of tensor data in the checkpoint."""
        return sum(stored.spec.nbytes for stored in self.checkpoint.tensors.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that mlx-lm's class must declare as parameters, with their shapes."""
        written = {name: spec.shape for file in self.files for name, spec in file.tensors.items()}
        return {name: shape for name, shape in written.items() if name not in self.images}

    @property
    def copied(self) -> tuple[Planned, ...]:
        """The files of the source that go beside the weights as they are."""
        return tuple(file for file in self.checkpoint.companions if file.name not in self.added)

    @property
    def added(self) -> dict[str, str]:
        """The files that are written beside the weights and are not the checkpoint's, with their text."""
        return self.family.added()

    @property
    def embed_q_costs(self) -> tuple[EmbedQCost, ...]:
        """What the K halves of packed kv_b_proj become, in bytes and precision."""
        return _embed_q_costs(self.steps)

    def workload(self, max_memory: int = MAX_MEMORY, threads: int | None = None) -> Workload:
        """Return how to work within so many bytes of memory, with at most so many threads.

        Left out, these are 2, or 8 where data comes over a network. Slabs become smaller before threads
        become fewer, as long as slabs are worth a thread. Raises MlaToolsError that names the smallest
        budget, if this one is too small.
        """
        threads = threads or (THREADS if self.checkpoint.place.local else NETWORK_THREADS)
        base = _BASE_BYTES + _BYTES_PER_TENSOR * len(self.checkpoint.tensors)
        unlike = self._unlike_steps()

        def work(count: int, elements: int) -> Workload:
            slabs = count * max((_slab_bytes(step, elements) for step in unlike), default=0)
            return Workload(count, elements, base + slabs + slabs // _CACHED, slabs // _CACHED)

        sizes = [SLAB_ELEMENTS >> shift for shift in range(SLAB_ELEMENTS.bit_length())]
        worth = [size for size in sizes if size >= _WORTH_A_THREAD]
        choices = [(count, size) for count in range(threads, 0, -1) for size in worth]
        choices += [(1, size) for size in sizes if size < _WORTH_A_THREAD]
        for choice in choices:
            if (found := work(*choice)).peak_bytes <= max_memory:
                return found
        raise MlaToolsError(
            f"This conversion does not work in {max_memory:,} bytes of memory;"
            f" the least is --max-memory {-(-work(1, 1).peak_bytes // 10**6)}MB."
        )

    def _unlike_steps(self) -> list[Step]:
        """Return a step of each kind: of those that differ in nothing but names, the first."""
        kinds: dict[tuple[object, ...], Step] = {}
        for step in self.steps:
            sources = step.sources[:1]
            kind = (step.op, len(step.sources), *((s.spec, s.codec) for s in sources))
            targets = tuple((target.codec, target.spec, target.moved) for target in step.targets)
            kinds.setdefault((*kind, targets), step)
        return list(kinds.values())


def make_draft_plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """Return the plan that makes a model of its own of a checkpoint's draft layers.

    Raises UsageError where it has none that could be kept, and CheckpointError as `make_plan`.
    """
    name = family_of(checkpoint.config).name
    prefix, drafter = DRAFTERS.get(name, ("", None))
    held = {name: entry for name, entry in checkpoint.tensors.items() if prefix and name.startswith(prefix)}
    family = drafter({name: entry.spec.shape for name, entry in held.items()}) if drafter else None
    if family is None:
        raise UsageError(f"--keep-mtp: there are no draft layers here that could be kept ({name}).")
    lost = {name: reason for name, reason in checkpoint.lost.items() if name.startswith(prefix)}
    alone = replace(checkpoint, tensors=held, lost=lost, notes=())
    return make_plan(alone, replace(options, keep_vision=False), family)


def make_plan(checkpoint: Checkpoint, options: Options, family: Family | None = None) -> Plan:
    """Return the plan that converts a checkpoint, as one of its own family or of the given one.

    Raises CheckpointError that lists everything that is wrong with it.
    """
    config = checkpoint.config
    made = steps_of(checkpoint, _with_config_dtype(options, config), family)
    problems = [*checkpoint.problems, *made.problems]
    if problems:
        raise CheckpointError(problems)
    idle = [pattern for pattern, _ in options.overrides if pattern not in made.overridden]
    # What a draft does not have, the model may.
    if idle and family is None:
        raise UsageError(
            f"--q-override {', '.join(idle)}: decides on no module. A path looks like"
            " model.layers.3.self_attn.embed_q; the last override that is found in a path counts."
        )
    if options.keep_vision and not made.images:
        raise UsageError(
            f"--keep-vision: there are no tensors for images here that could be kept ({made.family.name})."
        )
    new_config = _output_config(config, made, options)
    return Plan(
        checkpoint,
        made.family,
        options,
        tuple(made.steps),
        tuple(made.drops),
        _output_files(made.steps),
        new_config,
        _changes(config, new_config),
        (*checkpoint.notes, *made.notes),
        sum(target.spec.size for step in made.steps for target in step.targets),
        frozenset(made.images),
    )


def steps_of(checkpoint: Checkpoint, options: Options, family: Family | None = None) -> Steps:
    """Return what becomes of each stored tensor of a checkpoint, whose own problems are not among those.

    Raises CheckpointError, with those, where `make_steps` does.
    """
    stored = {name: entry.spec for name, entry in checkpoint.tensors.items()}
    try:
        return make_steps(
            stored,
            checkpoint.config,
            options,
            lost=checkpoint.lost,
            blind=checkpoint.blind,
            family=family,
        )
    except CheckpointError as error:
        raise CheckpointError([*checkpoint.problems, *error.problems]) from error


def make_steps(
    stored: Mapping[str, Spec],
    config: Mapping[str, Any],
    options: Options,
    *,
    lost: Mapping[str, str] | None = None,
    blind: bool = False,
    family: Family | None = None,
) -> Steps:
    """Return what becomes of each stored tensor; problems are collected, not raised.

    `lost` names tensors that an index promises and that cannot be read, with the reason; `blind` says
    that some of them could not even be named, so that missing tensors are no news. Raises
    CheckpointError only where the config is of no known family or lacks the numbers of a table.
    """
    with no_collector():
        return _make_steps(stored, config, options, lost or {}, blind, family)


def _make_steps(
    stored: Mapping[str, Spec],
    config: Mapping[str, Any],
    options: Options,
    lost: Mapping[str, str],
    blind: bool,
    family: Family | None,
) -> Steps:
    family, table = table_of(config, family)
    made = Steps(family, [], [], family.refusals(config), family.remarked(config), {}, set(), set())
    inputs: dict[tuple[int, tuple[int, ...]], dict[int, Source]] = defaultdict(dict)
    claimed = _claimed(stored, config, table, made)
    made.problems += _without_biases(claimed)
    for source, match in claimed:
        if match is None:
            made.problems.append(_unknown(source, family))
            continue
        rule = table.rule(match)
        if rule is None:
            drop = table.drop(match)
            shape = drop.shape
            if options.keep_vision and drop.image is not None:
                made.steps.append(_kept(source, drop.source, drop.image, made))
            else:
                made.drops.append(Drop(source, drop.reason))
        else:
            shape = rule.shapes[match.position]
            key, slot = table.slot(match)
            inputs[match.claim, key][slot] = source
        if (
            shape is not None
            and source.spec.shape != shape
            and not (rule and rule.is_done(source.spec.shape))
        ):
            made.problems.append(_misshapen(source, shape))
    _check_markers(table, made, lost)
    _say_how_many_mtp_layers(table, made, config)

    targets = table.targets()
    causes = _causes(table, lost)
    makers: dict[str, Rule] = {}
    for (claim, key), found in inputs.items():
        rule = table.rules[claim]
        count = len(rule.source_shapes())
        for name in rule.targets(key):
            if name in makers:
                made.problems.append(_doubled(name, rule, makers[name], key))
            makers[name] = rule
        if len(found) < count:
            if not blind:
                made.problems.append(_incomplete(rule, key, found, lost))
        elif not made.problems:
            made.steps.append(_step(rule, key, found, table, options, made))
    for rule in table.rules:
        if not rule.alternative and not blind:
            for key in rule.applications():
                if not all(name in makers for name in rule.targets(key)):
                    made.problems.append(_missing(rule, key, makers, causes))
    made.steps.sort(key=lambda step: natural(step.targets[0].name))
    if made.steps and all(_is_there(step) for step in made.steps):
        made.notes.append("in mlx-lm's own layout already: no tensor is renamed or reshaped")
    _say_what_stays_dense(made, targets, options)
    if made.images:
        modules = ", ".join(sorted({name.partition(".")[0] for name in made.images}))
        made.notes.append(
            f"kept as they are, {len(made.images):,} tensors under {modules}: {made.family.images}"
        )
    words = Counter(target.exactness for step in made.steps for target in step.targets)
    if options.quantize is not None and words["requantized"]:
        made.notes.append(
            f"requantized, from a quantized source to another quantization: {words['requantized']:,} of"
            f" {words.total():,} tensors"
        )
    _say_which_numbers_are_narrower(made)
    _say_where_quantization_disagrees(made, config)
    made.notes += map(_cost_text, _embed_q_costs(made.steps))
    _say_where_second_scales_go(made, targets, options)
    return made


def _claimed(
    stored: Mapping[str, Spec], config: Mapping[str, Any], table: Table, made: Steps
) -> list[tuple[Source, Match | None]]:
    """Bundle stored tensors into tensors and look each up."""
    section = _quantization_section(config)
    modules: dict[str, dict[str, Spec]] = defaultdict(dict)
    for name, spec in stored.items():
        module, _, leaf = name.rpartition(".")
        modules[module][leaf] = spec
    # Most modules look like thousands of others, so what the codecs say is remembered.
    seen: dict[Any, Bundle | str] = {}
    found: list[tuple[Source, Match | None]] = []
    for module, leaves in modules.items():
        prefix = f"{module}." if module else ""
        weight = table.lookup(f"{prefix}weight")
        shape = table.shape(weight) if weight else None
        width = int(shape[-1]) if shape else None
        look = (*leaves.items(), width)
        answer = seen.get(look)
        if answer is None:
            try:
                answer = bundle(Module(leaves, width, section))
            except ValueError as error:
                answer = str(error)
            seen[look] = answer
        if isinstance(answer, str):
            made.problems.append(Problem(module, "its stored tensors do not fit together", found=answer))
            continue
        for leaf, reason in answer.unread.items():
            unread = table.lookup(prefix + leaf)
            if unread is not None and table.rule(unread) is None:
                # Whatever it is, it is left out.
                found.append((_plain(prefix + leaf, leaves[leaf]), unread))
                continue
            there = str(leaves[leaf])
            made.problems.append(Problem(prefix + leaf, "cannot be read", found=there, cause=reason))
        for leaf, reason in answer.drops.items():
            made.drops.append(Drop(_plain(prefix + leaf, leaves[leaf]), reason))
        for claim in answer.claims:
            name = prefix + claim.leaf
            match = weight if claim.leaf == "weight" else table.lookup(name)
            parts = {part: prefix + leaf for part, leaf in claim.parts.items()}
            found.append((Source(name, claim.spec, claim.codec, parts), match))
    return found


def _without_biases(claimed: Sequence[tuple[Source, Match | None]]) -> list[Problem]:
    """Return the problems of affine tensors whose biases are missing where others have them.

    Where no affine tensor has any, all of them are zero.
    """
    affine = [s for s, _ in claimed if isinstance(s.codec, MlxQuantized) and s.codec.spec.has_biases]
    bare = [source for source in affine if "biases" not in source.parts]
    if len(bare) == len(affine):
        return []
    found = f"scales without biases, and {len(affine) - len(bare):,} other affine tensors have both"
    return [
        Problem(source.label, "its biases are missing", part_name(source.name, "biases"), found)
        for source in bare
    ]


def _plain(name: str, spec: Spec) -> Source:
    """Return a stored tensor that is left out as the tensor that it is by itself."""
    return Source(name, spec, Dense(spec.dtype), {"weight": name})


def _quantization_section(config: Mapping[str, Any]) -> Mapping[str, object]:
    section = config.get("quantization_config")
    if section is None and isinstance(config.get("text_config"), Mapping):
        section = config["text_config"].get("quantization_config")
    return section if isinstance(section, Mapping) else {}


def _with_config_dtype(options: Options, config: Mapping[str, Any]) -> Options:
    """Return options whose dtype is what mlx_lm.convert would take from config.json."""
    if options.dtype is not None:
        return options
    named = config.get("torch_dtype")
    if named is None and isinstance(config.get("text_config"), Mapping):
        named = config["text_config"].get("dtype")
    if isinstance(named, str) and named in _DTYPE_NAMES:
        return replace(options, dtype=_DTYPE_NAMES[named])
    return options


# --- what a tensor becomes ---------------------------------------------------------------------------


def _step(
    rule: Rule,
    key: tuple[int, ...],
    found: Mapping[int, Source],
    table: Table,
    options: Options,
    made: Steps,
) -> Step:
    sources = tuple(found[slot] for slot in range(len(found)))
    if rule.is_done(sources[0].spec.shape):
        rule = replace(rule, op=Same())
    specs = rule.op.infer([source.spec for source in sources])
    forms = {source.codec for source in sources}
    targets = []
    for output, (name, spec) in enumerate(zip(rule.targets(key), specs, strict=True)):
        codec, dtype = _choose(name, spec, rule, output, forms, table, options, made)
        moved = rule.op.keeps_last_axis(output) and all(
            form.quantized and repacking(form, codec) is not None for form in forms
        )
        parts = {part: part_name(name, part) for part in codec.encoded(spec)}
        exactness = _exactness(sources, codec, dtype, moved)
        targets.append(Target(name, Spec(spec.shape, dtype), codec, parts, exactness, moved))
    return Step(rule.op, sources, tuple(targets))


def _kept(source: Source, place: str, image: str, made: Steps) -> Step:
    """Return the step of a tensor for images: its bits, or its numbers where MLX has no such format."""
    name = image + source.name.removeprefix(place)
    codec = Dense(source.spec.dtype)
    moved = source.codec == codec
    exactness = _exactness([source], codec, source.spec.dtype, moved)
    if name in made.images:
        made.problems.append(
            Problem(name, "is there twice", "one of them", cause="The checkpoint mixes two layouts.")
        )
    made.images.add(name)
    return Step(Same(), (source,), (Target(name, source.spec, codec, {"weight": name}, exactness, moved),))


def _choose(
    name: str,
    spec: Spec,
    rule: Rule,
    output: int,
    forms: Collection[Codec],
    table: Table,
    options: Options,
    made: Steps,
) -> tuple[Codec, DType]:
    """Return how a target is stored, and the float dtype in which it is computed.

    `forms` are those of the tensors that it is made of.
    """
    param = rule.param
    dtype = spec.dtype
    if dtype.kind == "float" and param.cast and options.dtype is not None:
        dtype = options.dtype
    wanted: QuantSpec | None = None
    keeps = param.quantizable and not param.raw and not options.dequantize
    kept = _common_form(forms, param) if keeps else None
    override = options.overriding(short(name)) if param.quantizable else None
    if override is not None:
        made.overridden.add(override[0])
        wanted = override[1]
        if wanted is not None and not wanted.divides(spec.width):
            made.problems.append(_indivisible(name, spec.width, wanted, override[0]))
            wanted = None
    elif options.quantize is not None and param.quantizable and not _left_dense(param, options):
        wanted, named = _quantized_as(name, param, table, options)
        if spec.width % options.quantize.group_size or not wanted.divides(spec.width):
            wanted = None
        elif named:
            made.named.add(short(name))
    elif kept is not None:
        across = not rule.op.keeps_last_axis(output)
        wanted = _embed_q(kept.spec, spec.width, options) if across else kept.spec
    if wanted is None:
        return Dense(dtype), dtype
    made.quantized[short(name)] = wanted
    if not wanted.has_biases:
        # The block-float modes hold no float dtype, so none can be changed. A second scale is held
        # where there is one and it can be; experts without one get one that changes nothing.
        shared = spec.shape[-2] if param.global_scale and rule.op.keeps_last_axis(output) else None
        for rows in (None, shared):
            codec = MlxQuantized(wanted, DType.BF16, False, rows)
            if all(repacking(form, codec) is not None for form in forms):
                return codec, DType.BF16
    return MlxQuantized(wanted, dtype, wanted.has_biases), dtype


def _common_form(forms: Collection[Codec], param: Param) -> MlxQuantized | None:
    """Return a form in which MLX holds the numbers of all these formats in one tensor, if it has one."""
    found = [form.kept for form in forms]
    first = found[0]
    if first is None or any(kept is None or kept.spec != first.spec for kept in found):
        return None
    has_second = any(kept is not None and kept.shared is not None for kept in found)
    return first if param.global_scale or not has_second else None


def _quantized_as(name: str, param: Param, table: Table, options: Options) -> tuple[QuantSpec, bool]:
    """Return the quantization of a target, and whether config.json must name it even if it is the default."""
    assert options.quantize is not None
    if options.recipe:
        path = short(name)
        return recipe_spec(options.recipe, path, table.layers(), options.quantize.group_size), True
    if param.spec is not None:
        return param.spec, True
    return options.quantize, False


def _left_dense(param: Param, options: Options) -> bool:
    """Whether the model class keeps a tensor in floats; like the class's widths, recipes override it."""
    return param.dense and options.recipe is None


def _embed_q(source: QuantSpec, width: int, options: Options) -> QuantSpec | None:
    if options.embed_q == "float":
        return None
    wanted = source if options.embed_q == "source" else options.embed_q
    return wanted if wanted.divides(width) else None


def _exactness(sources: Sequence[Source], codec: Codec, dtype: DType, moved: bool) -> Exactness:
    quantized = any(source.codec.quantized for source in sources)
    nominal = {source.spec.dtype for source in sources}
    if dtype.kind == "int":
        # An op has looked whether the numbers fit.
        return "copied" if nominal == {dtype} else "repacked"
    if moved:
        # The form that holds a source's numbers exactly can be wider than the dtype of its scales.
        exact = {source.codec.kept.dtype for source in sources if source.codec.kept is not None}
        if any(_narrower(dtype, other) for other in exact):
            return "rounded"
        return "copied" if all(source.codec == codec for source in sources) else "repacked"
    if codec.quantized:
        return "requantized" if quantized else "encoded"
    if quantized:
        return "decoded"
    if nominal == {dtype}:
        return "copied"
    return "rounded" if any(_narrower(dtype, other) for other in nominal) else "repacked"


def _narrower(dtype: DType, other: DType) -> bool:
    """Whether not every number of `other` is one of `dtype`; bf16 and f16 do not hold each other."""
    return dtype is not other and dtype is not DType.F32


def _indivisible(name: str, width: int, spec: QuantSpec, pattern: str) -> Problem:
    return Problem(
        short(name),
        f"cannot be quantized as {spec}",
        needed=f"a last axis that is a multiple of {spec.group_size}",
        found=f"{width}",
        cause=f"The override {pattern!r} asks for it.",
    )


# --- problems ----------------------------------------------------------------------------------------


def _unknown(source: Source, family: Family) -> Problem:
    cause = f"No rule of {family.name} names it. Is model_type in config.json right?"
    if source.name.endswith(SCALES):
        cause = "It looks like a scale whose weight is missing or stored in a format not known here."
    found = f"{source.spec} ({source.codec.word})"
    return Problem(source.label, "unknown tensor", found=found, cause=cause)


def _misshapen(source: Source, shape: tuple[int, ...]) -> Problem:
    return Problem(source.label, "wrong shape", _shape_text(shape), f"{list(source.spec.shape)}")


def _shape_text(shape: tuple[int, ...]) -> str:
    """Return a shape with the config keys that it is made of."""
    labels = ", ".join(label(number) for number in shape)
    return f"[{', '.join(str(int(number)) for number in shape)}]  ({labels} in config.json)"


def _check_markers(table: Table, made: Steps, lost: Mapping[str, str]) -> None:
    """Refuse to drop layers as MTP layers that are not."""
    present = {drop.source.name for drop in made.drops}
    for name in sorted(present):
        match = table.lookup(name)
        drop = table.drop(match) if match else None
        if drop is None or drop.marker is None or match is None:
            continue
        values = dict(zip(template(drop.source).indices, match.values, strict=True))
        marker = template(drop.marker).format(values)
        if marker not in present and marker not in lost:
            made.problems.append(
                Problem(
                    short(name),
                    "would be dropped as what it is not",
                    needed=f"{short(marker)} beside it, if this is {drop.reason}",
                    found="no such tensor",
                    cause="Does config.json give the right number of layers?",
                )
            )


def _say_how_many_mtp_layers(table: Table, made: Steps, config: Mapping[str, Any]) -> None:
    """Note a num_nextn_predict_layers that is not the number of such layers; they are dropped anyway."""
    key = "num_nextn_predict_layers"
    said = made.family.numbers(config).get(key)
    layers = set()
    for dropped in made.drops:
        match = table.lookup(dropped.source.name)
        drop = table.drop(match) if match and table.rule(match) is None else None
        if drop is not None and drop.marker is not None and match is not None:
            layers.add(match.values[0])
    if layers and said is not None and said != len(layers):
        made.notes.append(
            f"{key} is {clipped(said)} in config.json, and the tensors hold {len(layers)}: layers"
            f" {fold_indices(layers)}, dropped"
        )


def _say_which_numbers_are_narrower(made: Steps) -> None:
    """Note which whole numbers are written in another dtype than the checkpoint's."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for step in made.steps:
        for target in step.targets:
            before = step.sources[0].spec.dtype
            if target.spec.dtype.kind == "int" and before is not target.spec.dtype:
                found[before.name, target.spec.dtype.name].append(short(target.name))
    for (before_name, after), names in found.items():
        made.notes.append(
            f"stored as {before_name} and written as {after}, which the class reads; a number that does not"
            f" fit ends the conversion: {', '.join(fold_names(names))}"
        )


def _say_where_quantization_disagrees(made: Steps, config: Mapping[str, Any]) -> None:
    """Note what config.json says about MLX's quantization and the tensors do not bear out."""
    given = config.get("quantization")
    other = config.get("quantization_config")
    if not isinstance(given, Mapping):
        return
    # With a quant_method it is the section of another format, which the codecs read.
    if isinstance(other, Mapping) and "quant_method" not in other and other != given:
        made.notes.append(
            f"quantization ({_brief(given)}) and quantization_config ({_brief(other)}) in config.json"
            " disagree; mlx_lm.load uses the first. The output has what the tensors are"
        )
    wrong: dict[tuple[str, str], list[str]] = defaultdict(list)
    for step in made.steps:
        for source in step.sources:
            if isinstance(source.codec, MlxQuantized):
                paths = (source.label, *(short(target.name) for target in step.targets))
                entry = next((given[path] for path in paths if isinstance(given.get(path), Mapping)), given)
                said = _entry_text(entry)
                if said != str(source.codec.spec):
                    wrong[said, source.codec.word].append(source.label)
    for (text, word), names in wrong.items():
        made.notes.append(
            f"quantization in config.json says {text} and the tensors are {word}, which counts: "
            + ", ".join(fold_names(names))
        )


def _entry_text(entry: Mapping[str, Any]) -> str:
    """Return the quantization that mlx_lm.load takes from an entry, with the mode's defaults."""
    given = {key: entry.get(key) for key in ("mode", "bits", "group_size")}
    try:
        return str(QuantSpec(given["mode"] or "affine", given["bits"], given["group_size"]))
    except UsageError:
        return str(given)


def _doubled(name: str, rule: Rule, other: Rule, key: tuple[int, ...]) -> Problem:
    known = dict(zip(rule.shared, key, strict=True))
    origins = sorted(short(template(r.source[0]).fold(known, r.where)) for r in (other, rule))
    return Problem(
        short(name),
        "is there twice",
        needed="one of them",
        found=" and ".join(origins),
        cause="The checkpoint mixes two layouts.",
    )


def _incomplete(
    rule: Rule, key: tuple[int, ...], found: Mapping[int, Source], lost: Mapping[str, str]
) -> Problem:
    names = rule.sources(key)
    missing = [name for slot, name in enumerate(names) if slot not in found]
    known = dict(zip(rule.shared, key, strict=True))
    needed = short(template(rule.source[0]).fold(known, rule.where))
    gathered = rule.gathered
    word = "expert" if gathered[-1:] == ("e",) else "part"
    numbers = [NUMBER.split(name)[-2] for name in missing]
    few = ", ".join(numbers[:8]) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    what = f"{word} {few} is missing" if len(missing) == 1 else f"{word}s {few} are missing"
    causes = sorted({lost[name] for name in missing if name in lost})
    return Problem(
        short(rule.targets(key)[0]),
        what,
        needed + (f"  ({rule.because})" if rule.because else ""),
        f"{len(found)} of {len(names)}",
        "\n  ".join(causes),
    )


def _causes(table: Table, lost: Mapping[str, str]) -> dict[tuple[str, ...], set[str]]:
    """Return why tensors are lost, by the names of what they would have become."""
    causes: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for name, reason in lost.items():
        match = table.lookup(name)
        rule = table.rule(match) if match else None
        if match is not None and rule is not None:
            causes[tuple(rule.targets(table.slot(match)[0]))].add(reason)
    return causes


def _missing(
    rule: Rule,
    key: tuple[int, ...],
    makers: Mapping[str, Rule],
    causes: Mapping[tuple[str, ...], Collection[str]],
) -> Problem:
    absent = [short(name) for name in rule.targets(key) if name not in makers]
    known = dict(zip(rule.shared, key, strict=True))
    name = short(template(rule.source[0]).fold(known, rule.where))
    purpose = "" if absent == [name] else f", for {' and '.join(absent)}"
    return Problem(
        name,
        "missing",
        needed=_shape_text(rule.shapes[0]) + purpose,
        found="no such tensor",
        cause="\n  ".join(sorted(causes.get(tuple(rule.targets(key)), ()))),
    )


def _is_there(step: Step) -> bool:
    names = [source.name for source in step.sources]
    return isinstance(step.op, Same | Indices) and names == [target.name for target in step.targets]


def _say_what_stays_dense(
    made: Steps, targets: Mapping[str, tuple[tuple[int, ...], Param]], options: Options
) -> None:
    if options.quantize is None:
        return
    dense: dict[int, list[str]] = defaultdict(list)
    wanted: list[str] = []
    for name, (shape, param) in targets.items():
        if param.quantizable and short(name) not in made.quantized and not options.overriding(short(name)):
            found = wanted if _left_dense(param, options) else dense[int(shape[-1])]
            found.append(short(name))
    if wanted:
        folded = ", ".join(fold_names(wanted))
        made.notes.append(f"stays dense, because mlx-lm's class does not quantize it: {folded}")
    group = options.quantize.group_size
    for width, names in dense.items():
        made.notes.append(
            f"stays dense, because the group size {group} does not divide its last axis of {width}: "
            + ", ".join(fold_names(names))
        )


def _embed_q_costs(steps: Sequence[Step]) -> tuple[EmbedQCost, ...]:
    """Return what becomes of packed rows that have to be decoded because their axis changes."""
    sizes: dict[tuple[Codec, Codec, DType], list[int]] = defaultdict(list)
    for step in steps:
        source = step.sources[0].codec
        for output, target in enumerate(step.targets):
            kept = source.kept
            if kept is not None and kept.shared is None and not step.op.keeps_last_axis(output):
                nbytes = sum(spec.nbytes for spec in target.stored().values())
                sizes[source, target.codec, target.spec.dtype].append(nbytes)
    return tuple(
        EmbedQCost(
            source.word,
            target.word,
            len(each),
            sum(each),
            _k_error(source, target.spec if isinstance(target, MlxQuantized) else None, dtype),
            _k_error(source, source.kept.spec, dtype),
            _k_error(source, None, dtype),
        )
        for (source, target, dtype), each in sizes.items()
        if source.kept is not None
    )


def _k_error(source: Codec, target: QuantSpec | None, dtype: DType) -> float | None:
    assert source.kept is not None
    in_dtype = isinstance(source, MlxQuantized) and source.dtype is dtype
    return expected_error(source.kept.spec, target, dtype, decoded_in_dtype=in_dtype)


def _cost_text(cost: EmbedQCost) -> str:
    if cost.error is None:
        error = "not measured for this source"
    else:
        error = (
            f"about {cost.error:.2g} of its norm (source: {cost.error_as_source:.2g}, "
            f"float: {cost.error_as_float:.2g})"
        )
    return (
        f"the K half of kv_b_proj changes its axis: {cost.before} is decoded and stored as {cost.after}, "
        f"{cost.nbytes:,} bytes in {cost.tensors} tensors; expected error of K: {error} (--embed-q)"
    )


def _say_where_second_scales_go(
    made: Steps, targets: Mapping[str, tuple[tuple[int, ...], Param]], options: Options
) -> None:
    """Note which tensors keep a scale beyond those of their groups, and which are decoded for want of it."""
    held = decoded = 0
    for step in made.steps:
        for target in step.targets:
            held += isinstance(target.codec, MlxQuantized) and target.codec.shared is not None
            kept = step.sources[0].codec.kept
            lacks = kept is not None and kept.shared is not None and not targets[target.name][1].global_scale
            decoded += lacks and target.exactness == "decoded" and not options.overriding(short(target.name))
    if held:
        made.notes.append(
            f"nvfp4 with a second scale: {_tensors(held)} of experts keep codes and E4M3 scales bit for bit,"
            " and the second scale as MLX's global_scale, equal to within one unit of float32;"
            " MLX multiplies with it on a GPU only"
        )
    if decoded and not options.dequantize:
        made.notes.append(
            f"nvfp4 with a second scale: {_tensors(decoded)} decoded to floats, because MLX has no such scale"
            " outside of experts; multiplied into the E4M3 scales it would leave those of weights below"
            " 0.09 in steps of 2^-9 (subnormal)"
        )


def _tensors(count: int) -> str:
    return f"{count:,} tensor" + ("" if count == 1 else "s")


# --- the output --------------------------------------------------------------------------------------


def _output_files(steps: Sequence[Step]) -> tuple[OutputFile, ...]:
    """Fill files in the order of the steps, the parts of a tensor together."""
    shards: list[dict[str, Spec]] = []
    room = 0
    for step in steps:
        for target in step.targets:
            stored = target.stored()
            nbytes = sum(spec.nbytes for spec in stored.values())
            if not shards or nbytes > room:
                shards.append({})
                room = SHARD_BYTES
            shards[-1].update(stored)
            room -= nbytes
    count = len(shards)
    names = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    )
    return tuple(
        OutputFile(name, layout(tensors, {"format": "mlx"}), tensors)
        for name, tensors in zip(names, shards, strict=True)
    )


def _output_config(config: Mapping[str, Any], made: Steps, options: Options) -> dict[str, Any]:
    """Return the config.json that mlx-lm reads the output with, keys sorted as mlx-lm writes them."""
    new = copy.deepcopy(made.family.rewritten(config))
    old = new.pop("quantization", None)
    for key in ("quantization_config", "_name_or_path"):
        new.pop(key, None)
    if not made.family.runtime:
        # With model_file, mlx_lm.load would run that file of the checkpoint; the only one that an output
        # asks for is ours.
        new.pop("model_file", None)
    if not options.keep_vision:
        # With this key some readers would look for the modules that are left out.
        new.pop("vision_config", None)
    if place := made.family.place(config):
        for key in ("quantization_config", "model_file"):
            new[place].pop(key, None)
    if options.dtype is not None:
        new["torch_dtype"] = next(name for name, dtype in _DTYPE_NAMES.items() if dtype is options.dtype)
    shared = {
        short(target.name)
        for step in made.steps
        for target in step.targets
        if isinstance(target.codec, MlxQuantized) and target.codec.shared is not None
    }
    images = _image_entries(old, made)
    if made.quantized or images:
        section: dict[str, Any] = _default_entry(old)
        default = options.quantize
        if made.quantized:
            default = default or _source_default(old, made)
            section = dict(default.config)
        section |= images
        for path in sorted(made.quantized, key=natural):
            spec = made.quantized[path]
            if spec != default or path in made.named or path in shared:
                section[path] = {**spec.config, **({GLOBAL_SCALE: True} if path in shared else {})}
        new["quantization"] = section
        # The second name is what the hub shows a model's quantization by.
        new["quantization_config"] = copy.deepcopy(section)
    return dict(sorted(new.items()))


def _default_entry(old: object) -> dict[str, Any]:
    """Return what an MLX source's config says of modules that it does not name."""
    given = old if isinstance(old, Mapping) else {}
    return {"mode": "affine"} | {key: given[key] for key in ("group_size", "bits", "mode") if given.get(key)}


def _image_entries(old: object, made: Steps) -> dict[str, Any]:
    """Return the entries of modules for images that are kept with MLX's quantization."""
    paths = (name.removesuffix(".scales") for name in made.images if name.endswith(".scales"))
    given = old if isinstance(old, Mapping) else {}
    entries = {path: given.get(path, True) for path in sorted(paths, key=natural)}
    default = _default_entry(old)
    return {path: entry if isinstance(entry, Mapping) else default for path, entry in entries.items()}


def _source_default(old: object, made: Steps) -> QuantSpec:
    """Return the quantization that config.json names first: the source's own default, or the commonest."""
    moved = [
        t.codec.spec for s in made.steps for t in s.targets if t.moved and isinstance(t.codec, MlxQuantized)
    ]
    counted = Counter(moved or made.quantized.values())
    if isinstance(old, Mapping):
        for spec in counted:
            if all((old.get(key) or "affine") == value for key, value in spec.config.items()):
                return spec
    return counted.most_common(1)[0][0]


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], place: str = "") -> tuple[str, ...]:
    """Return a line for each key that differs; of an object with further objects, for each of its keys."""
    lines = [f"{place}{key}: removed" for key in sorted(old.keys() - new.keys())]
    lines += [f"{place}{key}: added, {_brief(new[key])}" for key in sorted(new.keys() - old.keys())]
    for key in sorted(old.keys() & new.keys()):
        before, after = old[key], new[key]
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping) and "model_type" in after:
            lines += _changes(before, after, f"{place}{key}.")
        else:
            lines.append(f"{place}{key}: {_brief(before)} -> {_brief(after)}")
    return tuple(lines)


def _brief(value: object) -> str:
    if isinstance(value, Mapping):
        plain = {key: item for key, item in value.items() if not isinstance(item, Mapping)}
        more = len(value) - len(plain)
        return f"{plain}" + (f" and {more} modules of their own" if more else "")
    return repr(value)


def _slab_bytes(step: Step, limit: int) -> int:
    """Return the working set of the first slab of a step, which is the largest."""
    slab = next(iter(step.op.slabs([source.spec for source in step.sources], limit)), None)
    if slab is None:
        return 0
    read = sum(_rows_bytes(step.sources[block.index], block.start, block.stop) for block in slab.reads)
    elements = sum((b.stop - b.start) * step.sources[b.index].spec.width for b in slab.reads)
    written = sum(_rows_bytes(step.targets[b.index], b.start, b.stop) for b in slab.writes) + _PAGES
    made = [target for target in step.targets if not target.moved]
    if not made:
        same = all(target.codec == source.codec for target in step.targets for source in step.sources)
        return read + written + (0 if same else elements * _REPACKED)
    width = max(target.spec.dtype.nbytes for target in made)
    each = 0.0 if isinstance(step.op, Same) else width
    if any(source.codec.quantized for source in step.sources):
        each += _DECODED
    elif any(source.spec.dtype is not target.spec.dtype for source in step.sources for target in made):
        each += width
    modes = [target.codec.spec.mode for target in made if isinstance(target.codec, MlxQuantized)]
    each += width * max((_ENCODED[mode] for mode in modes), default=0.0)
    blocks = [_BLOCK_ENCODED.get(mode, (0, 0)) for mode in modes]
    block = max((min(elements, most) * needed for most, needed in blocks), default=0)
    return read + written + int(elements * each) + width * block


def _rows_bytes(tensor: Source | Target, start: int, stop: int) -> int:
    encoded = tensor.codec.encoded(tensor.spec)
    return sum(
        (last - first) * encoded[part].row_bytes
        for part, (first, last) in tensor.codec.cut(start, stop).items()
    )
