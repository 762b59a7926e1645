"""Rules and forms: which tensors of a checkpoint become which tensors of the model.

A rule states its targets once, and its forms: how a layout holds them, under which names and in which
shapes, and the op that makes the targets of that. The first form is that of the checkpoints on the hub;
the form "mlx", every target as it is, need not be stated. The values that an index may take are part of the
rule, so two rules can share a template and divide the layers among them. An index that stands only on the
left is gathered, in order; one that stands only on the right is scattered.

A rule names tensors as in a dense checkpoint; how stored tensors hold them is the codecs' business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product

from mla_tools.names import Domain, template
from mla_tools.ops import Op, Same
from mla_tools.quantization import QuantSpec
from mla_tools.spec import DType, Spec

__all__ = ["HUB", "MLX", "Drop", "Form", "Param", "Route", "Rule", "Shape", "combinations"]

# The layouts that every family has: what mlx-lm's model class declares, and what the hub's checkpoints hold.
MLX = "mlx"
HUB = "hub"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Param:
    """What a target tensor is in the model that loads it.

    `quantizable`: it is the weight of a module that MLX can quantize (Linear, Embedding, SwitchLinear,
    MultiLinear). `spec`: the width that the model class itself prescribes when it is quantized.
    `cast`: whether a conversion to another float dtype touches it. `unquantized`: the model class leaves it
    in floats where the rest is quantized, unless a predicate decides. `raw`: the class reads the weight
    itself and not through its module, so that packed codes are no use to it. `global_scale`: the
    module (SwitchLinear) can hold a float32 scale for each expert beside nvfp4 codes. `integer`: it holds
    integers, and every other tensor floats.
    """

    quantizable: bool = False
    spec: QuantSpec | None = None
    cast: bool = True
    unquantized: bool = False
    raw: bool = False
    global_scale: bool = False
    integer: bool = False


@dataclass(frozen=True)
class Form:
    """How a layout holds the targets of a rule.

    `shapes` are those of the source templates, one each, and `op` makes the targets of them. With `each`,
    the op makes each target separately, from the source at its place. `where` gives the values of the indices
    that are gathered, and `because` says where their number comes from.
    """

    layout: str
    source: tuple[str, ...]
    shapes: tuple[Shape, ...]
    op: Op = field(default_factory=Same)
    where: Mapping[str, Domain] = field(default_factory=dict)
    each: bool = False
    because: str = ""


@dataclass(frozen=True)
class Rule:
    """Targets that are made together in some layout, and the forms in which layouts hold them.

    `where` gives the values of the targets' indices.
    """

    target: tuple[str, ...]
    forms: tuple[Form, ...]
    where: Mapping[str, Domain] = field(default_factory=dict)
    param: Param = field(default_factory=Param)

    @classmethod
    def of(
        cls,
        source: str,
        target: str | tuple[str, ...],
        shape: Shape,
        op: Op | None = None,
        where: Mapping[str, Domain] | None = None,
        param: Param | None = None,
        because: str = "",
    ) -> Rule:
        """Return the rule of targets that the hub holds as one template; `where` has all indices of both."""
        targets = (target,) if isinstance(target, str) else target
        there = {index for text in targets for index in template(text).indices}
        where = where or {}
        gathered = {index: domain for index, domain in where.items() if index not in there}
        form = Form(HUB, (source,), (shape,), op or Same(), gathered, because=because)
        kept = {index: domain for index, domain in where.items() if index in there}
        return cls(targets, (form,), kept, param or Param())

    def also(self, *forms: Form) -> Rule:
        """Return the rule with further forms."""
        return replace(self, forms=(*self.forms, *forms))

    def hub_routes(self) -> list[Route]:
        """Return the routes of the hub's form."""
        return [route for route in self.routes() if route.first]

    def routes(self) -> Iterator[Route]:
        """Yield a route for each form, or for each target of a form that makes each separately."""
        for number, form in enumerate(self.forms):
            whole = Route(
                form.source,
                form.shapes,
                self.target,
                form.op,
                {**self.where, **form.where},
                self.param,
                (form.layout,),
                number == 0,
                form.because,
            )
            if form.each:
                for source, shape, target in zip(form.source, form.shapes, self.target, strict=True):
                    yield whole.of((source,), (shape,), (target,))
            else:
                yield whole.of(form.source, form.shapes, self.target)


@dataclass(frozen=True)
class Route:
    """One form of a rule: from its sources to the targets that its op makes of them.

    `where` gives the values of every index. `layouts` are those that hold the targets so, and `first` says
    whether it is the rule's first form.
    """

    source: tuple[str, ...]
    shapes: tuple[Shape, ...]
    target: tuple[str, ...]
    op: Op = field(default_factory=Same)
    where: Mapping[str, Domain] = field(default_factory=dict)
    param: Param = field(default_factory=Param)
    layouts: tuple[str, ...] = (HUB,)
    first: bool = True
    because: str = ""

    def of(self, source: tuple[str, ...], shapes: tuple[Shape, ...], target: tuple[str, ...]) -> Route:
        """Return the route between these names alone, with the indices that they have."""
        used = {index for text in (*source, *target) for index in template(text).indices}
        where = {index: domain for index, domain in self.where.items() if index in used}
        return replace(self, source=source, shapes=shapes, target=target, where=where)

    @cached_property
    def gathered(self) -> tuple[str, ...]:
        """The indices that stand only on the left."""
        return _only(self.source, self.target)

    @cached_property
    def scattered(self) -> tuple[str, ...]:
        """The indices that stand only on the right."""
        return _only(self.target, self.source)

    @cached_property
    def shared(self) -> tuple[str, ...]:
        """The indices that stand on both sides: each combination of them is an application."""
        free = {*self.gathered, *self.scattered}
        return tuple(index for index in self.where if index not in free)

    def applications(self) -> list[tuple[int, ...]]:
        """Return the values of the shared indices, one tuple for each application."""
        return combinations(self.shared, self.where)

    def sources(self, values: tuple[int, ...]) -> list[str]:
        """Return the concrete names of the sources of one application."""
        return self._names(self.source, self.gathered, values)

    def targets(self, values: tuple[int, ...]) -> list[str]:
        """Return the concrete names of the targets of one application."""
        return self._names(self.target, self.scattered, values)

    def _names(self, templates: Sequence[str], free: tuple[str, ...], values: tuple[int, ...]) -> list[str]:
        known = dict(zip(self.shared, values, strict=True))
        found = [dict(zip(free, values, strict=True)) for values in combinations(free, self.where)]
        return [template(text).format({**known, **more}) for text in templates for more in found]

    @cached_property
    def source_count(self) -> int:
        """The number of sources of one application."""
        return len(self.source_shapes())

    def source_shapes(self) -> tuple[Shape, ...]:
        """Return the shapes of all sources of one application, gathered indices written out."""
        count = len(combinations(self.gathered, self.where))
        return tuple(shape for shape in self.shapes for _ in range(count))

    def target_shapes(self) -> tuple[Shape, ...]:
        """Return the shapes of all targets of one application, scattered indices written out."""
        specs = [Spec(shape, DType.BF16) for shape in self.source_shapes()]
        return tuple(spec.shape for spec in self.op.infer(specs))

    def per_target(self) -> list[tuple[str, Shape]]:
        """Return the target templates, each with its shape."""
        shapes = self.target_shapes()
        return list(zip(self.target, shapes[:: len(shapes) // len(self.target)], strict=True))

    def inverse(self) -> Route:
        """Return the route from the targets back to the sources."""
        shapes = tuple(shape for _, shape in self.per_target())
        return replace(self, source=self.target, shapes=shapes, target=self.source, op=self.op.inverse())


@dataclass(frozen=True)
class Drop:
    """Tensors that the model has no place for, and why.

    `marker`: a template that must be present too, for the same values of its indices, or the tensors
    are not what the reason says (a layer beyond the last is an MTP layer only if it has `eh_proj`).
    `usual`: whether the family's checkpoints on the hub have them, so that samples do too.
    `inside`: the drop is of a whole module, everything whose name begins with `source` and a dot; these
    are the rest of some of the names, for samples. `whole`: the drop is of everything in a layer whose
    marker is there and that no other drop names; `source` is the layer. `vision`: these are vision tensors,
    and this is what `source` is called in the output with --keep-vision.
    """

    source: str
    reason: str
    where: Mapping[str, Domain] = field(default_factory=dict)
    shape: Shape | None = None
    marker: str | None = None
    usual: bool = True
    inside: tuple[str, ...] = ()
    whole: bool = False
    vision: str | None = None


def _only(these: Sequence[str], those: Sequence[str]) -> tuple[str, ...]:
    other = {index for text in those for index in template(text).indices}
    return tuple(dict.fromkeys(i for text in these for i in template(text).indices if i not in other))


def combinations(indices: tuple[str, ...], where: Mapping[str, Domain]) -> list[tuple[int, ...]]:
    """Return all values of these indices together, the last index fastest."""
    return list(product(*(sorted(where[index]) for index in indices)))
