"""A1111's grammar as text: the cases of its documentation, and that any text at all is read or refused."""

from __future__ import annotations

import contextlib
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdopt.errors import UsageError
from sdopt.pipeline.prompt_grammar import (
    AdapterTag,
    changes_between_steps,
    take_adapters,
    texts_of_steps,
    weigh,
)

Weighed = list[list[tuple[str, float]]]

WEIGHTS: dict[str, Weighed] = {
    "normal text": [[("normal text", 1.0)]],
    "": [[]],
    "an (important) word": [[("an ", 1.0), ("important", 1.1), (" word", 1.0)]],
    "an [unimportant] word": [[("an ", 1.0), ("unimportant", 1 / 1.1), (" word", 1.0)]],
    "((word))": [[("word", 1.1 * 1.1)]],
    "(word:1.3)": [[("word", 1.3)]],
    "(word : 1.3 )": [[("word ", 1.3)]],
    "(word:-0.5)": [[("word", -0.5)]],
    "(word:.5)": [[("word", 0.5)]],
    "(two words:0)": [[("two words", 0.0)]],
    "((a:1.5) b:0.5)": [[("a", 1.5 * 0.5), (" b", 0.5)]],
    "[(a:2)]": [[("a", 2 * (1 / 1.1))]],
    "(unbalanced": [[("unbalanced", 1.1)]],
    "a [unbalanced": [[("a ", 1.0), ("unbalanced", 1 / 1.1)]],
    "closed) twice]": [[("closed) twice]", 1.0)]],
    "a happy face :)": [[("a happy face :)", 1.0)]],
    "a sad face :(": [[("a sad face :", 1.0)]],
    "no bracket:1.3)": [[("no bracket:1.3)", 1.0)]],
    r"\(literal\]": [[("(literal]", 1.0)]],
    r"a \\(word) b": [[("a \\", 1.0), ("word", 1.1), (" b", 1.0)]],
    r"\{a\} \<b\> \__c\__ \--d e\::2": [[("{a} <b> __c__ --d e::2", 1.0)]],
    r"C:\temp": [[(r"C:\temp", 1.0)]],
    "(unnecessary)(parens)": [[("unnecessaryparens", 1.1)]],
    "(a:1.2:1.3)": [[("a:1.2", 1.3)]],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        [("a ", 1.0), ("house", 1.5730000000000004), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55),
         (", sun, ", 1.1), ("sky", 1.4641000000000006), (".", 1.1)]
    ],
    "one BREAK two": [[("one", 1.0)], [("two", 1.0)]],
    "one\n BREAK\n(two)BREAK": [[("one", 1.0)], [("two", 1.1)], []],
    "(a BREAK b:1.5)": [[("a", 1.5)], [("b", 1.5)]],
    r"\BREAK, BREAKFAST, break": [[("BREAK, BREAKFAST, break", 1.0)]],
    "BREAK BREAK a": [[], [], [("a", 1.0)]],
}  # fmt: skip

# What is said at each of ten steps, as the lengths of its runs.
CHANGES: dict[str, list[tuple[int, str]]] = {
    "test": [(10, "test")],
    "a [b:3]": [(3, "a "), (7, "a b")],
    "a [b: 3 ]": [(3, "a "), (7, "a b")],
    "a [b::3]": [(3, "a b"), (7, "a ")],
    "a [b:c:3]": [(3, "a b"), (7, "a c")],
    "a [[[b]]:2]": [(2, "a "), (8, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (7, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (9, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (1, "ace"), (8, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (5, "a b c")],
    "a [b:0.59] c": [(5, "a  c"), (5, "a b c")],
    "a [b:1.0] c": [(10, "a  c")],
    "a [b:1] c": [(1, "a  c"), (9, "a b c")],
    "a [b:0] c": [(10, "a b c")],
    "a [b:-3] c": [(10, "a b c")],
    "a [b:99] c": [(10, "a  c")],
    "a [b:1e999] c": [(10, "a  c")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (7, "((a][:b:c d")],
    "[a|(b:1.1)]": [(1, each) for each in ("a", "(b:1.1)") * 5],
    "[fe|]male": [(1, each) for each in ("female", "male") * 5],
    "[a|b|c]": [(1, each) for each in "abcabcabca"],
    "[a|[b:c:5]]": [(1, each) for each in "ababacacac"],
    "a [b:c]": [(10, "a [b:c]")],
    "a [b:c:d:3]": [(10, "a [b:c:d:3]")],
    "[a (b] c:3]": [(10, "[a (b] c:3]")],
    r"\[b:3\]": [(10, r"\[b:3\]")],
    r"[a\:b:c:3]": [(3, r"a\:b"), (7, "c")],
    "a | b [c:d:3]": [(3, "a | b c"), (7, "a | b d")],
}

LANDSCAPE = (
    "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6]"
    "[ in background:0.25] [shoddy:masterful:0.5]"
)
LANDSCAPE_ENDS = {
    25: "fantasy landscape with a mountain and an oak in foreground shoddy",
    50: "fantasy landscape with a lake and an oak in foreground in background shoddy",
    60: "fantasy landscape with a lake and an oak in foreground in background masterful",
    75: "fantasy landscape with a lake and an oak in background masterful",
    100: "fantasy landscape with a lake and a christmas tree in background masterful",
}

ADAPTERS: dict[str, tuple[str, list[tuple[str, float, float]]]] = {
    "a <lora:ink:0.8> b": ("a  b", [("ink", 0.8, 0.8)]),
    "<lora:ink>": ("", [("ink", 1.0, 1.0)]),
    "<lora:ink:0.8:0.5>": ("", [("ink", 0.8, 0.5)]),
    "<lora:ink:te=0.1:unet=0.2>": ("", [("ink", 0.1, 0.2)]),
    "<lora:ink:unet=0.2>": ("", [("ink", 1.0, 0.2)]),
    "<lora:ink:te=-1>": ("", [("ink", -1.0, -1.0)]),
    "<lora:ink:0.8:te=0.3>": ("", [("ink", 0.3, 0.3)]),
    "<lyco:x:1><lora:my file (v2):0.5>z": ("z", [("x", 1.0, 1.0), ("my file (v2)", 0.5, 0.5)]),
    r"\<lora:ink:1\> <hypernet:x:1> I <3 you": (r"\<lora:ink:1\> <hypernet:x:1> I <3 you", []),
}

BAD_ADAPTERS = {
    "<lora::1>": "names no adapter",
    "<lora:ink:much>": "'much', which is not a number",
    "<lora:ink:nan>": "'nan', which is not a number",
    "<lora:ink:1:1:8>": "more than sdopt reads",
    "<lora:ink:dyn=8>": "more than sdopt reads",
}


def weighed(text: str) -> Weighed:
    return [[(piece.text, piece.weight) for piece in section] for section in weigh(text)]


@pytest.mark.parametrize(("text", "expected"), WEIGHTS.items())
def test_weights(text: str, expected: Weighed) -> None:
    assert weighed(text) == expected


@pytest.mark.parametrize(("prompt", "runs"), CHANGES.items())
def test_changes_between_steps(prompt: str, runs: list[tuple[int, str]]) -> None:
    expected = [text for count, text in runs for _ in range(count)]
    said = texts_of_steps(prompt, 10)
    assert list(said) == (expected if len(set(expected)) > 1 else expected[:1])
    assert len(said) == 1 or changes_between_steps(prompt)


def test_the_example_of_the_documentation() -> None:
    said = texts_of_steps(LANDSCAPE, 100)
    start = 0
    for end, text in LANDSCAPE_ENDS.items():
        assert set(said[start:end]) == {text}
        start = end


@pytest.mark.parametrize(("prompt", "expected"), ADAPTERS.items())
def test_adapters_are_taken_out(prompt: str, expected: tuple[str, list[tuple[str, float, float]]]) -> None:
    text, tags = expected
    assert take_adapters(prompt) == (text, tuple(AdapterTag(*tag) for tag in tags))


@pytest.mark.parametrize(("prompt", "message"), BAD_ADAPTERS.items())
def test_a_bad_tag_is_refused(prompt: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        take_adapters(prompt)


@pytest.mark.parametrize("text", ["(a:1.2.3)", "(a:.)", "(" * 90 + "a" + f":{'9' * 300})" * 90, "(" * 101, "[(" * 60])
def test_a_weight_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"not a number|infinity|more than 100 deep"):
        weigh(text)
    with pytest.raises(UsageError):
        texts_of_steps("[" * 101, 5)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab ()[]<>:|\\,.15BREAK\n")) | st.text())
def test_any_text_is_read_or_refused_and_none_of_its_words_are_lost(prompt: str) -> None:
    try:
        text, _ = take_adapters(prompt)
        said = texts_of_steps(text, 4)
        sections = [weigh(each) for each in said]
    except UsageError:
        return
    assert len(said) in (1, 4)
    for each, read in zip(said, sections, strict=True):
        pieces = [piece for section in read for piece in section]
        assert all(piece.text for piece in pieces)
        for section in read:
            assert all(a.weight != b.weight for a, b in pairwise(section))
        # Letters: all but BREAK stay, in order.
        joined = "BREAK".join("".join(piece.text for piece in section) for section in read)
        assert [c for c in joined if c in "ab,"] == [c for c in each if c in "ab,"]
        assert len(joined) <= len(each)


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab ,.:)]}|\"' é海"), max_size=60))
def test_words_without_an_opening_bracket_are_one_piece(words: str) -> None:
    assert texts_of_steps(words, 7) == (words,)
    assert weighed(words) == ([[(words, 1.0)]] if words else [[]])


@pytest.mark.parametrize("prompt", ["(" * 20_000, "a)" * 10_000, "[a:1]" * 4_000, ":" * 20_000, "(a:1.1)" * 2_800])
def test_long_prompts_of_one_thing_end(prompt: str) -> None:
    with contextlib.suppress(UsageError):
        assert len(texts_of_steps(prompt, 3)) <= 3
        assert weigh(prompt)
