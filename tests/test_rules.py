"""The name grammar, the look-up, and the tables of every family, there and back."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tools.architectures import MODEL_TYPES, table_of
from mla_tools.ops import SplitKvB, Stack, SwapLastAxes
from mla_tools.rules import Domain, Drop, Match, Param, Rule, Table, name, short
from mla_tools.samples import sample_config

UP = "layers.{l}.experts.{e}.up.weight"
STACKED = "layers.{l}.switch.up.weight"

each_family = pytest.mark.parametrize("family", MODEL_TYPES)


def rule(source: str, target: str | None = None, **where: Domain) -> Rule:
    return Rule((source,), (target or source,), ((2, 3),), where=where)


def experts(layers: Domain = range(1, 3), count: int = 12) -> Rule:
    return Rule((UP,), (STACKED,), ((2, 3),), Stack(), {"l": layers, "e": range(count)})


def sample_table(family: str) -> Table:
    return table_of(sample_config(family))[1]


# --- templates ---------------------------------------------------------------------------------------


def test_a_template_is_words_and_indices() -> None:
    template = name("model.layers.{l}.experts.{e}.up.weight")
    assert template.words == ("model.layers", ".experts", ".up.weight")
    assert template.indices == ("l", "e")
    assert template.format({"e": 17, "l": 3}) == "model.layers.3.experts.17.up.weight"
    where = {"l": range(4), "e": range(8)}
    assert template.fold({"l": 3}, where) == "model.layers.3.experts.{0..7}.up.weight"


def test_an_index_at_the_end_and_none_at_all() -> None:
    assert name("norm.{i}").format({"i": 1}) == "norm.1"
    assert name("lm_head.weight").indices == ()


@given(st.dictionaries(st.sampled_from("lei"), st.integers(0, 10**6), min_size=3))
def test_a_formatted_name_is_found_with_its_values(values: dict[str, int]) -> None:
    text = "a.{l}.b1.{e}.c2d.{i}"
    domains = {index: range(value, value + 1) for index, value in values.items()}
    match = Table([rule(text, **domains)]).lookup(name(text).format(values))
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
        name(text)


@pytest.mark.parametrize(
    ("long", "wanted"), [("a.up.weight", "a.up"), ("a.weight.bias", "a.weight.bias"), ("A_log", "A_log")]
)
def test_short(long: str, wanted: str) -> None:
    assert short(long) == wanted


# --- rules -------------------------------------------------------------------------------------------


def test_an_index_on_the_left_alone_is_gathered_in_the_order_of_numbers() -> None:
    gather = experts()
    assert (gather.gathered, gather.scattered, gather.shared) == (("e",), (), ("l",))
    assert gather.applications() == [(1,), (2,)]
    assert gather.sources((2,)) == [f"layers.2.experts.{e}.up.weight" for e in range(12)]
    assert gather.targets((2,)) == ["layers.2.switch.up.weight"]
    assert gather.source_shapes() == ((2, 3),) * 12
    assert gather.target_shapes() == ((12, 2, 3),)


def test_an_index_on_the_right_alone_is_scattered() -> None:
    scatter = experts().inverse()
    assert (scatter.gathered, scatter.scattered, scatter.shared) == ((), ("e",), ("l",))
    assert scatter.shapes == ((12, 2, 3),)
    assert scatter.targets((1,)) == experts().sources((1,))
    assert scatter.target_shapes() == ((2, 3),) * 12


def test_several_gathered_indices_and_templates_run_with_the_last_fastest() -> None:
    both = Rule(("a.{l}.{i}.{e}.x", "b.{l}.{i}.{e}.x"), ("c.{l}.x",), ((1,), (1,)), Stack(),
                {"l": range(1), "i": range(2), "e": range(11)})  # fmt: skip
    wanted = [f"{letter}.0.{i}.{e}.x" for letter, i, e in product("ab", range(2), range(11))]
    assert both.sources((0,)) == wanted
    table = Table([both])
    slots = [table.slot(found) for found in map(table.lookup, wanted) if found]
    assert slots == [((0,), slot) for slot in range(len(wanted))]


def test_the_slots_follow_the_numbers_where_a_domain_has_gaps() -> None:
    table = Table([Rule(("x.{e}.w",), ("y.w",), ((1,),), Stack(), {"e": frozenset({7, 30, 2})})])
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


def test_two_spellings_of_a_number_are_not_one_tensor() -> None:
    table = Table([rule("layers.{l}.w", l=range(3))])
    found = [spelt for spelt in ("1", "01", "001", "\u0661") if table.lookup(f"layers.{spelt}.w")]
    assert found == ["1"]


def test_a_match_leads_to_its_rule_drop_and_shape() -> None:
    drop = Drop("layers.{l}.mtp.weight", "beyond the last", {"l": range(3, 1 << 31)}, (4,))
    table = Table([experts()], [drop])
    stacked, dropped = table.lookup("layers.1.experts.3.up.weight"), table.lookup("layers.70.mtp.weight")
    assert stacked is not None
    assert dropped is not None
    assert table.rule(stacked) == experts()
    assert table.shape(stacked) == (2, 3)
    assert table.rule(dropped) is None
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
    table = Table([rule("a.w", "c.w"), rule("b.w", "c.w")], identities=False)
    with pytest.raises(ValueError, match=r"two rules make c\.w"):
        table.targets()


# --- what is converted already -----------------------------------------------------------------------


def test_a_name_that_has_its_target_form_already_is_an_alternative() -> None:
    table = Table([experts(), rule("a.w")])
    match = table.lookup("layers.2.switch.up.weight")
    assert match is not None
    identity = table.rule(match)
    assert identity is not None
    assert identity.alternative
    assert identity.source == identity.target == (STACKED,)
    assert table.shape(match) == (12, 2, 3)
    # Nothing is made twice, and a rule that changes nothing needs no alternative.
    assert list(table.targets()) == ["layers.1.switch.up.weight", "layers.2.switch.up.weight", "a.w"]
    assert [r.alternative for r in table.rules] == [False, False, True]


def test_a_name_that_another_rule_reads_gets_no_alternative() -> None:
    # b is made from a; but a checkpoint's own b becomes c.
    table = Table([rule("a.w", "b.w"), rule("b.w", "c.w")])
    match = table.lookup("b.w")
    assert match == Match(1, 0, ())
    assert [r.source for r in table.rules if r.alternative] == [("c.w",)]


def test_a_rule_without_applications_is_left_out() -> None:
    table = Table([experts(range(0)), rule("a.w")])
    assert [r.source for r in table.rules] == [("a.w",)]
    assert table.lookup("layers.0.switch.up.weight") is None


@pytest.mark.parametrize(
    ("rules", "layers"),
    [([], 0), ([rule("a.w")], 0), ([rule("a.{l}.w", l=range(7)), rule("b.{l}.w", l=frozenset({2}))], 7)],
    ids=["nothing", "no_layers", "seven"],
)
def test_layers(rules: list[Rule], layers: int) -> None:
    assert Table(rules).layers() == layers


# --- inverse -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "shapes"),
    [
        (experts(), ((12, 2, 3),)),
        (Rule(("kv.w",), ("k.w", "v.w"), ((4 * 5, 6),), SplitKvB(3, 2)), ((4, 6, 3), (4, 2, 6))),
        (Rule(("c.w",), ("d.w",), ((8, 1, 4),), SwapLastAxes()), ((8, 4, 1),)),
    ],
    ids=["stack", "split", "swap"],
)
def test_a_rule_inverted_twice_is_itself(there: Rule, shapes: tuple[tuple[int, ...], ...]) -> None:
    back = there.inverse()
    assert back.shapes == shapes
    assert (back.source, back.target) == (there.target, there.source)
    assert back.inverse() == there


def concrete(table: Table) -> tuple[list[str], list[str]]:
    """Return every source and every target of a table's rules, alternatives aside."""
    rules = [r for r in table.rules if not r.alternative]
    return (
        [text for r in rules for key in r.applications() for text in r.sources(key)],
        [text for r in rules for key in r.applications() for text in r.targets(key)],
    )


@each_family
def test_the_table_of_a_family_backwards_swaps_sources_and_targets(family: str) -> None:
    table = sample_table(family)
    sources, targets = concrete(table)
    assert len(set(sources)) == len(sources)
    assert len(set(targets)) == len(targets)
    assert concrete(table.inverse()) == (targets, sources)
    assert concrete(table.inverse().inverse()) == (sources, targets)
    primary = tuple(r for r in table.rules if not r.alternative)
    assert table.inverse().inverse().rules == primary


@each_family
def test_every_source_of_a_family_is_found_at_its_own_place(family: str) -> None:
    table = sample_table(family)
    for claim, r in enumerate(table.rules):
        for key in r.applications():
            for slot, (text, shape) in enumerate(zip(r.sources(key), r.source_shapes(), strict=True)):
                match = table.lookup(text)
                assert match is not None
                assert match.claim == claim
                assert table.slot(match) == (key, slot)
                assert table.shape(match) == shape


@each_family
def test_every_target_of_a_family_is_known_as_a_source_too(family: str) -> None:
    # So that a checkpoint which was converted already, and has the config written then, is understood.
    _, table = table_of(MODEL_TYPES[family].rewritten(sample_config(family)))
    for target, (shape, param) in table.targets().items():
        match = table.lookup(target)
        assert match is not None, target
        found = table.rule(match)
        assert found is not None
        assert found.targets(table.slot(match)[0]) == [target]
        assert found.param == param
        # Where both layouts have one name, the shape tells which it is.
        assert table.shape(match) == shape or found.is_done(shape)


def test_params_go_along_on_the_way_back() -> None:
    there = Rule((UP,), (STACKED,), ((2, 3),), Stack(), {"l": range(1), "e": range(2)}, Param(True))
    assert there.inverse().param == Param(True)
