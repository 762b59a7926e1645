"""From headers to a plan: what becomes of each stored tensor, and where each byte of the output goes.

Nothing here reads tensor data, and nothing here imports mlx: a plan is made in a fraction of a second
and reports everything that is wrong with a checkpoint at once, before a byte is written.

The stages are functions from values to values and problems: `claim` (stored tensors to tensors), `match`
(tensors to applications of rules), `gather` (applications that are complete), `encode` (how each target is
stored) and `lay_out` (where it goes). Problems are added up, and none hides a later one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mla_tools.architectures import DRAFTERS, Family, family_of, table_of
from mla_tools.errors import CheckpointError, Problem, UsageError
from mla_tools.files.checkpoint import Checkpoint, no_collector
from mla_tools.names import natural
from mla_tools.options import Options
from mla_tools.plan.claiming import claim
from mla_tools.plan.config import changes, output_config
from mla_tools.plan.encoding import Encoded, encode
from mla_tools.plan.files import OutputFile, lay_out
from mla_tools.plan.gathering import gather
from mla_tools.plan.matching import match
from mla_tools.plan.memory import MAX_MEMORY, NETWORK_THREADS, SLAB_ELEMENTS, THREADS, Workload
from mla_tools.plan.notes import EmbedQCost, notes
from mla_tools.plan.plan import Plan
from mla_tools.spec import Spec
from mla_tools.steps import Drop, Exactness, Source, Step, Target
from mla_tools.table import Table

__all__ = [
    "MAX_MEMORY",
    "NETWORK_THREADS",
    "SLAB_ELEMENTS",
    "THREADS",
    "Drop",
    "EmbedQCost",
    "Exactness",
    "OutputFile",
    "Plan",
    "Source",
    "Step",
    "Steps",
    "Target",
    "Workload",
    "make_mtp_plan",
    "make_plan",
    "make_steps",
    "steps_of",
]


@dataclass(frozen=True)
class Steps:
    """What becomes of each tensor, with everything that was found wrong or worth saying on the way.

    `tensors` are all that were claimed, also those with which something is wrong. `layouts` counts those
    whose names are known by the layouts that hold them so; several are alike there. `foreign` are stored
    tensors that are nothing of the family's.
    """

    family: Family
    tensors: tuple[Source, ...]
    encoded: Encoded
    drops: tuple[Drop, ...]
    layouts: Mapping[tuple[str, ...], int]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    foreign: tuple[str, ...] = ()

    @property
    def steps(self) -> list[Step]:
        """The steps in the order of the output."""
        return self.encoded.steps


def make_mtp_plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """Return the plan that makes a model of its own of a checkpoint's MTP layers.

    Raises UsageError where it has none that could be kept, and CheckpointError as `make_plan`.
    """
    name = family_of(checkpoint.config).name
    prefix, drafter = DRAFTERS.get(name, ("", None))
    held = {name: entry for name, entry in checkpoint.tensors.items() if prefix and name.startswith(prefix)}
    family = drafter({name: entry.spec.shape for name, entry in held.items()}) if drafter else None
    if drafter is None:
        raise UsageError(f"--keep-mtp: only MTP layers of {', '.join(DRAFTERS)} can be kept, not of {name}.")
    if family is None:
        raise UsageError(f"--keep-mtp: there are no MTP layers here ({name}).")
    lost = {name: reason for name, reason in checkpoint.lost.items() if name.startswith(prefix)}
    alone = replace(checkpoint, tensors=held, lost=lost, notes=())
    return make_plan(alone, replace(options, keep_vision=False), family)


def make_plan(checkpoint: Checkpoint, options: Options, family: Family | None = None) -> Plan:
    """Return the plan that converts a checkpoint, as one of its own family or of the given one.

    Raises CheckpointError that lists everything that is wrong with it.
    """
    config = checkpoint.config
    try:
        own = family or family_of(config)
    except CheckpointError as error:
        raise CheckpointError([*checkpoint.problems, *error.problems]) from error
    made = steps_of(checkpoint, options.with_dtype_of(config, own.given(config)), family)
    problems = [*checkpoint.problems, *made.problems]
    if problems:
        raise CheckpointError(problems)
    encoded = made.encoded
    idle = [pattern for pattern, _ in options.overrides if pattern not in encoded.overridden]
    # What an MTP layer lacks, the model may have.
    if idle and family is None:
        raise UsageError(
            f"--q-override {', '.join(idle)}: matches no module. A path looks like"
            f" model.layers.3.self_attn.embed_q; the last override that matches a path counts."
        )
    if options.keep_vision and not encoded.vision:
        raise UsageError(f"--keep-vision: there are no vision tensors here ({made.family.name}).")
    new_config = output_config(config, made.family, encoded, options)
    return Plan(
        checkpoint,
        made.family,
        options,
        tuple(encoded.steps),
        made.drops,
        lay_out(encoded.steps),
        new_config,
        changes(config, new_config),
        (*checkpoint.notes, *made.notes),
        sum(target.spec.size for step in encoded.steps for target in step.targets),
        frozenset(encoded.vision),
    )


def steps_of(checkpoint: Checkpoint, options: Options, family: Family | None = None) -> Steps:
    """Return what becomes of each stored tensor of a checkpoint, whose own problems are not among those.

    Raises CheckpointError, with those, where `make_steps` does.
    """
    stored = ((name, entry.spec) for name, entry in checkpoint.tensors.items())
    lost, blind = checkpoint.lost, checkpoint.blind
    try:
        made = _make_steps(stored, checkpoint.config, options, lost, blind, family)
        # An output is for a class that is made from its config; a class that sanitizes has been made.
        return replace(made, problems=(*made.family.lacking(checkpoint.config), *made.problems))
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
    partial: bool = False,
    packed: bool = True,
) -> Steps:
    """Return what becomes of each stored tensor; problems are collected, not raised.

    `lost` names tensors that an index promises and that cannot be read, with the reason; `blind` says
    that some of them could not even be named, so missing tensors are expected. With `partial`, the
    tensors are some of a checkpoint, and others may be among them, which become `foreign`. Without
    `packed`, formats that are not MLX's own are decoded. Raises
    CheckpointError only where the config is of no known family or lacks the numbers of a table.
    """
    return _make_steps(
        stored.items(), config, options, lost or {}, blind, family, partial=partial, packed=packed
    )


def _make_steps(
    stored: Iterable[tuple[str, Spec]],
    config: Mapping[str, Any],
    options: Options,
    lost: Mapping[str, str],
    blind: bool,
    family: Family | None,
    *,
    partial: bool = False,
    packed: bool = True,
) -> Steps:
    with no_collector():
        family, table = table_of(config, family)
        if options.layout != table.layout:
            table = _aimed(table, options.layout, family)
        claimed = claim(stored, _section(family, config), table, zeros=options.missing_biases == "zero")
        matched = match(claimed, table, family, keep_vision=options.keep_vision, lost=lost, partial=partial)
        gathered = gather(matched, table, lost, blind=blind, partial=partial)
        encoded = encode(gathered.groups, matched.vision, options, table.layers(), packed=packed)
        encoded.steps.sort(key=lambda step: natural(step.targets[0].name))
        stages = (claimed, matched, gathered, encoded)
        problems = (*family.refusals(config), *(problem for stage in stages for problem in stage.problems))
        whole = not (problems or lost or partial)
        found = notes(encoded, family, config, options, matched.dropped_layers, claimed.bare, whole=whole)
        return Steps(
            family,
            tuple(source for source, _ in claimed.tensors),
            encoded,
            tuple(matched.drops),
            matched.layouts,
            problems,
            tuple(found),
            tuple(matched.foreign),
        )


def _aimed(table: Table, layout: str, family: Family) -> Table:
    try:
        return table.aimed(layout)
    except ValueError as error:
        raise UsageError(f"{family.name}: {error}") from error


def _section(family: Family, config: Mapping[str, Any]) -> Mapping[str, object]:
    """Return what config.json says of the quantization, at the top or beside the language model's numbers."""
    section = config.get("quantization_config")
    if section is None:
        section = family.given(config).get("quantization_config")
    return section if isinstance(section, Mapping) else {}
