"""The name grammar, the look-up, and the tables of every family, there and back."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tools.architectures import MODEL_TYPES, table_of
from mla_tools.names import Domain, short, template
from mla_tools.ops import Split, SplitKvB, Stack, SwapLastAxes
from mla_tools.rules import Drop, Form, Param, Route, Rule
from mla_tools.samples import sample_config
from mla_tools.table import Match, Table

UP = "layers.{l}.experts.{e}.up.weight"
STACKED = "layers.{l}.switch.up.weight"

each_family = pytest.mark.parametrize("family", MODEL_TYPES)


def rule(source: str, target: str | None = None, **where: Domain) -> Rule:
    return Rule.of(source, target or source, (2, 3), where=where)


def experts(layers: Domain = range(1, 3), count: int = 12) -> Rule:
    return Rule.of(UP, STACKED, (2, 3), Stack(), {"l": layers, "e": range(count)})


def route(rule: Rule) -> Route:
    """Return the one route of a rule with one form."""
    (only,) = rule.routes()
    return only


def sample_table(family: str) -> Table:
    return table_of(sample_config(family))[1]


# --- templates ---------------------------------------------------------------------------------------


def test_a_template_is_words_and_indices() -> None:
    parsed = template("model.layers.{l}.experts.{e}.up.weight")
    assert parsed.words == ("model.layers", ".experts", ".up.weight")
    assert parsed.indices == ("l", "e")
    assert parsed.format({"e": 17, "l": 3}) == "model.layers.3.experts.17.up.weight"
    where = {"l": range(4), "e": range(8)}
    assert parsed.fold({"l": 3}, where) == "model.layers.3.experts.{0..7}.up.weight"


def test_an_index_at_the_end_and_none_at_all() -> None:
    assert template("norm.{i}").format({"i": 1}) == "norm.1"
    assert template("lm_head.weight").indices == ()


@given(st.dictionaries(st.sampled_from("lei"), st.integers(0, 10**6), min_size=3))
def test_a_formatted_name_is_found_with_its_values(values: dict[str, int]) -> None:
    text = "a.{l}.b1.{e}.c2d.{i}"
    domains = {index: range(value, value + 1) for index, value in values.items()}
    match = Table([rule(text, **domains)]).lookup(template(text).format(values))
    assert match is not None
    assert match.values == (values["l"], values["e"], values["i"])


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("layers.3.weight", id="literal_number"),
        pytest.param("layers.{l}.x.0", id="literal_number_at_the_end"),
        pytest.param("layers.{l}_proj.weight", id="part_of_a_component"),
        pytest.param("layers.x{l}.weight", id="end_of_a_component"),
        pytest.param("layers.{l.weight", id="open_brace"),
        pytest.param("layers.{}.weight", id="no_name"),
        pytest.param("{l}.weight", id="first_component"),
    ],
)
def test_templates_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="whole components"):
        template(text)


@pytest.mark.parametrize(
    ("long", "wanted"), [("a.up.weight", "a.up"), ("a.weight.bias", "a.weight.bias"), ("A_log", "A_log")]
)
def test_short(long: str, wanted: str) -> None:
    assert short(long) == wanted


# --- rules -------------------------------------------------------------------------------------------


def test_an_index_on_the_left_alone_is_gathered_in_the_order_of_numbers() -> None:
    gather = route(experts())
    assert (gather.gathered, gather.scattered, gather.shared) == (("e",), (), ("l",))
    assert gather.applications() == [(1,), (2,)]
    assert gather.sources((2,)) == [f"layers.2.experts.{e}.up.weight" for e in range(12)]
    assert gather.targets((2,)) == ["layers.2.switch.up.weight"]
    assert gather.source_shapes() == ((2, 3),) * 12
    assert gather.target_shapes() == ((12, 2, 3),)


def test_an_index_on_the_right_alone_is_scattered() -> None:
    scatter = route(experts()).inverse()
    assert (scatter.gathered, scatter.scattered, scatter.shared) == ((), ("e",), ("l",))
    assert scatter.shapes == ((12, 2, 3),)
    assert scatter.targets((1,)) == route(experts()).sources((1,))
    assert scatter.target_shapes() == ((2, 3),) * 12


def test_several_gathered_indices_and_templates_run_with_the_last_fastest() -> None:
    form = Form(
        "hub",
        ("a.{l}.{i}.{e}.x", "b.{l}.{i}.{e}.x"),
        ((1,), (1,)),
        Stack(),
        {"i": range(2), "e": range(11)},
    )
    both = Rule(("c.{l}.x",), (form,), {"l": range(1)})
    wanted = [f"{letter}.0.{i}.{e}.x" for letter, i, e in product("ab", range(2), range(11))]
    assert route(both).sources((0,)) == wanted
    table = Table([both])
    slots = [table.slot(found) for found in map(table.lookup, wanted) if found]
    assert slots == [((0,), slot) for slot in range(len(wanted))]


def test_the_slots_follow_the_numbers_where_a_domain_has_gaps() -> None:
    table = Table([Rule.of("x.{e}.w", "y.w", (1,), Stack(), {"e": frozenset({7, 30, 2})})])
    order = {e: table.slot(match)[1] for e in (2, 7, 30) if (match := table.lookup(f"x.{e}.w"))}
    assert order == {2: 0, 7: 1, 30: 2}


# --- look-up -----------------------------------------------------------------------------------------


def test_rules_may_divide_the_layers_of_one_template() -> None:
    table = Table([rule("l.{l}.w", l=range(0, 3)), rule("l.{l}.w", l=frozenset({3, 5}))])
    claims = [match.claim if (match := table.lookup(f"l.{k}.w")) else None for k in range(7)]
    assert claims == [0, 0, 0, 1, None, 1, None]


UNKNOWN = [
    pytest.param("layers.0.experts.0.up.weight", id="layer_outside"),
    pytest.param("layers.1.experts.12.up.weight", id="expert_outside"),
    pytest.param("layers.1.experts.0.up.bias", id="other_leaf"),
    pytest.param("layers.1.experts.0.up", id="too_short"),
    pytest.param("layers.1.experts.0.up.weight.3", id="too_long"),
    pytest.param("xlayers.1.experts.0.up.weight", id="other_word"),
    pytest.param("layers.-1.experts.0.up.weight", id="negative"),
    pytest.param("layers.one.experts.0.up.weight", id="word_for_number"),
    pytest.param("layers.1_0.experts.0.up.weight", id="underscore"),
    pytest.param(f"layers.{'1' * 10_000}.experts.0.up.weight", id="ten_thousand_digits"),
    pytest.param(f"layers.{'1' * 4_000}.experts.0.up.weight", id="four_thousand_digits"),
    pytest.param("layers.01.experts.0.up.weight", id="leading_zero"),
    pytest.param("layers.\u0661.experts.0.up.weight", id="arabic_digit"),
    pytest.param("", id="empty"),
    pytest.param("." * 50, id="dots"),
]


@pytest.mark.parametrize("tensor", UNKNOWN)
def test_names_that_no_rule_names_are_not_found(tensor: str) -> None:
    assert Table([experts()]).lookup(tensor) is None


def test_two_ways_to_write_a_number_are_not_one_tensor() -> None:
    table = Table([rule("layers.{l}.w", l=range(3))])
    found = [spelt for spelt in ("1", "01", "001", "\u0661") if table.lookup(f"layers.{spelt}.w")]
    assert found == ["1"]


def test_a_match_leads_to_its_rule_drop_and_shape() -> None:
    drop = Drop("layers.{l}.mtp.weight", "beyond the last", {"l": range(3, 1 << 31)}, (4,))
    table = Table([experts()], [drop])
    stacked, dropped = table.lookup("layers.1.experts.3.up.weight"), table.lookup("layers.70.mtp.weight")
    assert stacked is not None
    assert dropped is not None
    assert table.route(stacked) == route(experts())
    assert table.shape(stacked) == (2, 3)
    assert table.route(dropped) is None
    assert table.drop(dropped) is drop
    assert table.shape(dropped) == (4,)
    assert table.slot(stacked) == ((1,), 3)


# --- conflicts ---------------------------------------------------------------------------------------

CONFLICTS: list[Any] = [
    pytest.param([rule("x.w"), rule("x.w", "y.w")], [], id="same_name"),
    pytest.param([rule("a.{l}.w", l=range(3)), rule("a.{l}.w", "b.{l}.w", l=range(2, 4))], [], id="overlap"),
    pytest.param([rule("a.{l}.w", l=range(3)), rule("a.{k}.w", k=frozenset({2}))], [], id="other_letter"),
    pytest.param([rule("a.{l}.w", l=range(3))], [Drop("a.{l}.w", "", {"l": range(2, 1 << 31)})], id="drop"),
    pytest.param([], [Drop("a.w", "one"), Drop("a.w", "two")], id="two_drops"),
]


@pytest.mark.parametrize(("rules", "drops"), CONFLICTS)
def test_two_rules_that_claim_one_name_are_refused(rules: list[Rule], drops: list[Drop]) -> None:
    with pytest.raises(ValueError, match="two rules claim"):
        Table(rules, drops)


def test_two_rules_that_make_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two rules (make|claim) c\.w"):
        Table([rule("a.w", "c.w"), rule("b.w", "c.w")]).targets()


# --- layouts -----------------------------------------------------------------------------------------


def test_a_target_that_is_there_already_is_in_the_layout_mlx() -> None:
    table = Table([experts(), rule("a.w")])
    match = table.lookup("layers.2.switch.up.weight")
    assert match is not None
    there = table.route(match)
    assert there is not None
    assert there.layouts == ("mlx",)
    assert not there.first
    assert there.source == there.target == (STACKED,)
    assert table.shape(match) == (12, 2, 3)
    # Nothing is made twice, and what is the same in both layouts is one route.
    assert list(table.targets()) == ["layers.1.switch.up.weight", "layers.2.switch.up.weight", "a.w"]
    assert [found.layouts for found in table.routes] == [("hub",), ("hub", "mlx"), ("mlx",)]


def test_a_name_that_another_rule_reads_is_that_ones() -> None:
    # b is made from a; but a checkpoint's own b becomes c.
    table = Table([rule("a.w", "b.w"), rule("b.w", "c.w")])
    assert table.lookup("b.w") == Match(1, 0, ())
    assert [found.source for found in table.routes if not found.first] == [("c.w",)]


def test_the_shape_tells_what_a_name_stands_for() -> None:
    swap = Rule.of("c.{l}.w", "c.{l}.w", (8, 1, 4), SwapLastAxes(), {"l": range(2)})
    table = Table([swap])
    stored, there = table.lookup("c.1.w", (8, 1, 4)), table.lookup("c.1.w", (8, 4, 1))
    assert stored is not None
    assert there is not None
    assert (table.shape(stored), table.shape(there)) == ((8, 1, 4), (8, 4, 1))
    assert [table.route(match).layouts for match in (stored, there)] == [("hub",), ("mlx",)]  # type: ignore[union-attr]
    # Without a shape, or with one that fits neither, it is what the hub has.
    assert table.lookup("c.1.w") == table.lookup("c.1.w", (5,)) == stored


PAIR = Rule(
    ("q.{l}.w", "k.{l}.w"),
    (
        Form("hub", ("wq.{l}.w", "wk.{l}.w"), ((4, 3), (2, 3)), each=True),
        Form("fused", ("qk.{l}.w",), ((6, 3),), Split((4, 2))),
        Form("transposed", ("wq.t.{l}.w", "wk.t.{l}.w"), ((3, 4), (3, 2)), SwapLastAxes(), each=True),
    ),
    {"l": range(3)},
)


def test_a_form_may_hold_each_target_by_itself() -> None:
    first, second, fused, *_ = PAIR.routes()
    assert [(one.source, one.target) for one in (first, second)] == [
        (("wq.{l}.w",), ("q.{l}.w",)),
        (("wk.{l}.w",), ("k.{l}.w",)),
    ]
    assert (fused.source, fused.target, fused.target_shapes()) == (
        ("qk.{l}.w",),
        PAIR.target,
        ((4, 3), (2, 3)),
    )
    table = Table([PAIR])
    wanted = {"wq.1.w": "hub", "wk.1.w": "hub", "qk.1.w": "fused", "q.1.w": "mlx", "wq.t.1.w": "transposed"}
    for text, layout in wanted.items():
        match = table.lookup(text)
        assert match is not None
        found = table.route(match)
        assert found is not None
        assert found.layouts == (layout,)
    assert next(iter(table.targets().items())) == ("q.0.w", ((4, 3), Param()))
    assert len(table.targets()) == 6


def test_a_rule_without_applications_is_left_out() -> None:
    table = Table([experts(range(0)), rule("a.w")])
    assert [found.source for found in table.routes] == [("a.w",)]
    assert table.lookup("layers.0.switch.up.weight") is None


@pytest.mark.parametrize(
    ("rules", "layers"),
    [([], 0), ([rule("a.w")], 0), ([rule("a.{l}.w", l=range(7)), rule("b.{l}.w", l=frozenset({2}))], 7)],
    ids=["nothing", "no_layers", "seven"],
)
def test_layers(rules: list[Rule], layers: int) -> None:
    assert Table(rules).layers() == layers


# --- the other way -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "shapes"),
    [
        (experts(), ((12, 2, 3),)),
        (Rule.of("kv.w", ("k.w", "v.w"), (4 * 5, 6), SplitKvB(3, 2)), ((4, 6, 3), (4, 2, 6))),
        (Rule.of("c.w", "d.w", (8, 1, 4), SwapLastAxes()), ((8, 4, 1),)),
    ],
    ids=["stack", "split", "swap"],
)
def test_a_route_inverted_twice_is_itself(there: Rule, shapes: tuple[tuple[int, ...], ...]) -> None:
    back = route(there).inverse()
    assert back.shapes == shapes
    assert (back.source, back.target) == (route(there).target, route(there).source)
    assert back.inverse() == route(there)


@pytest.mark.parametrize(
    ("layout", "made"),
    [("fused", ["qk.{l}.w"]), ("hub", ["wq.{l}.w", "wk.{l}.w"]), ("mlx", ["q.{l}.w", "k.{l}.w"])],
)
def test_a_table_can_aim_at_each_of_its_layouts(layout: str, made: list[str]) -> None:
    table = Table([PAIR]).aimed(layout)
    assert table.layout == layout
    wanted = [template(text).format({"l": layer}) for layer in range(3) for text in made]
    assert sorted(table.targets()) == sorted(wanted)
    # It is made of the layout mlx, and understood where it is there already.
    for text, number in (("q.1.w", 0), (wanted[0], 0)):
        match = table.lookup(text)
        assert match is not None
        assert table.slot(match)[1] == number


def test_a_layout_that_nobody_has_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no layout gguf here, only hub, fused, transposed, mlx"):
        Table([PAIR]).aimed("gguf")


def concrete(table: Table) -> tuple[list[str], list[str]]:
    """Return every source and every target of a table's first forms, sorted."""
    routes = [found for found in table.routes if found.first]
    return (
        sorted(text for found in routes for key in found.applications() for text in found.sources(key)),
        sorted(text for found in routes for key in found.applications() for text in found.targets(key)),
    )


@each_family
def test_the_table_of_a_family_aimed_at_the_hub_swaps_sources_and_targets(family: str) -> None:
    table = sample_table(family)
    sources, targets = concrete(table)
    assert len(set(sources)) == len(sources)
    assert len(set(targets)) == len(targets)
    assert concrete(table.aimed("hub")) == (targets, sources)
    back = table.aimed("hub").aimed("mlx")
    assert concrete(back) == (sources, targets)
    assert back.targets() == table.targets()


@each_family
def test_every_source_of_a_family_is_found_at_its_own_place(family: str) -> None:
    table = sample_table(family)
    for claim, found in enumerate(table.routes):
        for key in found.applications():
            for slot, (text, shape) in enumerate(zip(found.sources(key), found.source_shapes(), strict=True)):
                match = table.lookup(text, shape)
                assert match is not None
                assert match.claim == claim
                assert table.slot(match) == (key, slot)
                assert table.shape(match) == shape


@each_family
def test_every_target_of_a_family_is_known_as_a_source_too(family: str) -> None:
    # So that a checkpoint which was converted already, and has the config written then, is understood.
    _, table = table_of(MODEL_TYPES[family].rewritten(sample_config(family)))
    for target, (shape, param) in table.targets().items():
        # Where both layouts have one name, the shape tells which it is.
        match = table.lookup(target, shape)
        assert match is not None, target
        found = table.route(match)
        assert found is not None
        assert found.targets(table.slot(match)[0]) == [target]
        assert found.param == param
        assert table.shape(match) == shape
        assert "mlx" in found.layouts


def test_params_go_along_on_the_way_back() -> None:
    there = Rule.of(UP, STACKED, (2, 3), Stack(), {"l": range(1), "e": range(2)}, Param(True))
    assert route(there).inverse().param == Param(True)
