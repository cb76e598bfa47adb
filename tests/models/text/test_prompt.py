"""AUTOMATIC1111's prompt syntax, case by case, and what is refused of it."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.text.prompt import HIGHEST, MOST_WEAKENED, BadPrompt, Fragment, parse, plain, remarks, weighted, windows

CASES: dict[str, list[tuple[str, float]]] = {
    "": [],
    "a forest": [("a forest", 1)],
    "a (red) fox": [("a ", 1), ("red", 1.1), (" fox", 1)],
    "a ((red)) fox": [("a ", 1), ("red", 1.21), (" fox", 1)],
    "(snowy:1.5)": [("snowy", 1.5)],
    "(snowy : 1.5 )": [("snowy ", 1.5)],
    "(snowy:.5)": [("snowy", 0.5)],
    "[snowy]": [("snowy", 1 / 1.1)],
    "(a [b] c:2)": [("a ", 2), ("b", 2 / 1.1), (" c", 2)],
    "(a (b:1.5) c:2)": [("a ", 2), ("b", 3), (" c", 2)],
    "(a:1.2)(b:1.2)": [("ab", 1.2)],
    r"\(not\) \[this\] \\": [("(not) [this] \\", 1)],
    r"a \ b": [("a \\ b", 1)],
    "time: noon": [("time: noon", 1)],
    "noon:1.3)": [("noon:1.3)", 1)],
    "[noon:1.3]": [("noon:1.3", 1 / 1.1)],
    "(noon:1.3.4)": [("noon:1.3.4", 1.1)],
    "a) b]": [("a) b]", 1)],
    "a (b": [("a ", 1), ("b", 1.1)],
    "([a": [("a", 1)],
    "() [] (:2)": [("  ", 1)],
    "(a:0)": [("a", 0)],
    "<lora:x:1>": [("<lora:x:1>", 1)],
}


@pytest.mark.parametrize(("prompt", "expected"), CASES.items(), ids=repr)
def test_cases(prompt: str, expected: list[tuple[str, float]]) -> None:
    fragments = parse(prompt)
    assert [fragment.text for fragment in fragments] == [text for text, _ in expected]
    assert [fragment.weight for fragment in fragments] == pytest.approx([weight for _, weight in expected])


@given(st.text(st.sampled_from("()[]:\\ ab1.-+,<>|\n"), max_size=60))
def test_any_text_is_parsed_or_refused(prompt: str) -> None:
    try:
        fragments = parse(prompt)
    except BadPrompt:
        return
    assert all(0 <= fragment.weight <= HIGHEST for fragment in fragments)
    assert all(one.weight != other.weight for one, other in itertools.pairwise(fragments))
    if not set(prompt) & set("()[]\\"):
        assert plain(fragments) == prompt
        assert not weighted(fragments)


@pytest.mark.parametrize(
    "prompt", ["(a:10.5)", "(a:-1)", "(" * 25 + "a", "(" * 9000 + "a", "(a:9)(b:1" + "0" * 400 + ")"]
)
def test_a_weight_out_of_bounds_is_quoted(prompt: str) -> None:
    with pytest.raises(BadPrompt, match=r"The weight of '[ab]' is"):
        parse(prompt)


def test_deep_and_long_prompts_take_no_time_to_speak_of() -> None:
    assert parse("()" * 5000) == ()
    assert math.prod(fragment.weight for fragment in parse("(" * 20 + "[" * 4900 + "a" + "]" * 20)) >= 0


def test_weakened_parts_are_bounded() -> None:
    assert len(parse("a [b] " * MOST_WEAKENED)) == 2 * MOST_WEAKENED
    with pytest.raises(BadPrompt, match="weighted below 1"):
        parse("a [b] " * (MOST_WEAKENED + 1))


def test_other_tools_syntax_is_spoken_of() -> None:
    (sentence,) = remarks("a <lora:../../x:1> forest", weights=True)
    assert "loras" in sentence
    (sentence,) = remarks("a [snowy:misty:0.5] forest", weights=True)
    assert "only weaken" in sentence
    (sentence,) = remarks("a (snowy:1.3) forest", weights=False)
    assert "no weights" in sentence
    assert remarks(r"a (snowy:1.3) [misty] \[a|b\] forest", weights=True) == []
    assert remarks("a (snowy) forest", weights=False) == []


def test_what_composes_or_chooses_elsewhere_is_spoken_of() -> None:
    for weights in (True, False):
        (sentence,) = remarks("a sea AND a forest", weights=weights)
        assert sentence.startswith("AND")
        (sentence,) = remarks("a {red|blue} sea", weights=weights)
        assert sentence.startswith("{a|b}")
        assert remarks("a LAND and a sea, {red}", weights=weights) == []
    assert remarks("a sea BREAK a forest", weights=True) == []
    (sentence,) = remarks("a sea BREAK a forest", weights=False)
    assert "BREAK" in sentence


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [[]]),
        ("a sea", [[("a sea", 1)]]),
        ("a sea BREAK a forest", [[("a sea", 1)], [("a forest", 1)]]),
        ("(a sea BREAK a:1.2) forest", [[("a sea", 1.2)], [("a", 1.2), (" forest", 1)]]),
        ("BREAK a sea BREAK BREAK", [[("a sea", 1)]]),
        ("a BREAKER break", [[("a BREAKER break", 1)]]),
    ],
)
def test_break_parts_a_prompt(prompt: str, expected: list[list[tuple[str, float]]]) -> None:
    assert [[(one.text, one.weight) for one in part] for part in windows(parse(prompt))] == expected


def test_fragments_keep_the_words() -> None:
    assert plain((Fragment("a "), Fragment("b", 1.3))) == "a b"
