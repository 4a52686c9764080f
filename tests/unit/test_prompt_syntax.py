"""What is drawn as words, what is refused, and how a refused piece is written to be drawn."""

from __future__ import annotations

import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdopt.errors import UsageError
from sdopt.pipeline.prompt_grammar import weigh
from sdopt.pipeline.prompt_syntax import find_syntax, refuse_syntax

WORDS = [
    "",
    "a large red circle on a blue background",
    "16:9, cinematic",
    "salt & pepper, 50% grey",
    "a happy face :)",
    "wink ;) and =D",
    "numbered 1) first 2) second",
    "a list] that was closed twice",
    "an arrow -> there, a <- back, a < b and b > c",
    "I <3 cats",
    "hatsune_miku, long_hair",
    "^_^ >_< ^__^ -_- o_o",
    "a line ____ to fill in",
    "a dash -- like this",
    "a well-known, two-part---thing",
    "salt and pepper, and nothing else",
    "Android, BREAKFAST, breakdance, SAND",
    "break, and",
    "note: a colon, time 12:30:45",
    "std::vector, scope::name",
    "embedding: the art of",
    "a } brace { alone",
    "C:\\temp\\new folder",
    "C++ and C#",
    "C++ code, C-- too",
    "wait--what, a 50+ party, LGBTQ+, cat--> dog, 1990s, :-) --",
    "\N{FULLWIDTH LEFT PARENTHESIS}red\N{FULLWIDTH RIGHT PARENTHESIS}",
    "ADD COLOUR, ADDCOLOUR, and_salt, ROCK_AND_ROLL",
    "“quotes”, 'single', Größe 海辺の城 🏰",
    "a | b || c",
    "50/50, 3/4 view, f/1.8",
    "name@example.com #1 $5 *star*",
    "line one\nline two",
]

COLON = "\N{FULLWIDTH COLON}"
WIDE = f"\N{FULLWIDTH LEFT PARENTHESIS}red{COLON}1.3\N{FULLWIDTH RIGHT PARENTHESIS}"
SYNTAX = {
    "a cat AND a dog": ("AND", "drawn apart"),
    "a cat AND a dog :1.2": ("AND", "drawn apart"),
    "x <lora:add_detail:0.7>": ("<lora:add_detail:0.7>", "a LoRA or another extra network"),
    "<hypernet:x:1>": ("<hypernet:x:1>", "a LoRA or another extra network"),
    "a photo of <cat-toy>": ("<cat-toy>", "textual inversion"),
    "embedding:easynegative, fog": ("embedding:easynegative,", "embedding"),
    "(embedding:easynegative:1.2)": ("(embedding:easynegative:1.2)", "embedding"),
    "a {red|blue} car": ("{red|blue}", "dynamic prompts"),
    "a {2$$red|blue|green} car": ("{2$$red|blue|green}", "dynamic prompts"),
    "a {word}": ("{word}", "dynamic prompts"),
    "a __colour__ car": ("__colour__", "wildcard"),
    "__style/*__": ("__style/*__", "wildcard"),
    "a car --ar 16:9": ("--ar", "Midjourney"),
    "space::2 ship": ("::2", "Midjourney"),
    "red++ circle": ("red++", "a weight of compel"),
    "red-- circle": ("red--", "a weight of compel"),
    "a dog ADDCOL a cat": ("ADDCOL", "Regional Prompter"),
    "a ADDROW": ("ADDROW", "Regional Prompter"),
    "ADDBASE a": ("ADDBASE", "Regional Prompter"),
    "a ADDCOMM b": ("ADDCOMM", "Regional Prompter"),
    "a cat AND_SALT a dog": ("AND_SALT", "drawn apart"),
    "a cat AND_PERP a dog": ("AND_PERP", "drawn apart"),
    WIDE: (WIDE, "full-width"),
    f"(red{COLON}1.3)": (f"(red{COLON}1.3)", "full-width"),
    "one\n{two}\nthree": ("{two}", "dynamic prompts"),
    "an \\{escaped\\} one and {not}": ("{not}", "dynamic prompts"),
    "a \\\\{word} behind a backslash": ("{word}", "dynamic prompts"),
}

ESCAPED = {
    "\\{a|b\\}": "{a|b}",
    "\\<lora:x:1\\>": "<lora:x:1>",
    "\\AND \\embedding:x": "AND embedding:x",
    "\\__colour__ and _\\_colour__": "__colour__ and __colour__",
    "\\--ar": "--ar",
    "space\\::2": "space::2",
    "red\\++ and red\\--": "red++ and red--",
    "\\ADDCOL \\AND_SALT": "ADDCOL AND_SALT",
    "a \\\\ b": "a \\ b",
    "C:\\temp": "C:\\temp",
}


def words_of(prompt: str) -> str:
    (section,) = weigh(prompt)
    assert all(piece.weight == 1 for piece in section)
    return "".join(piece.text for piece in section)


@pytest.mark.parametrize("prompt", WORDS)
def test_words_are_drawn_as_they_are(prompt: str) -> None:
    assert find_syntax(prompt) is None
    assert words_of(prompt) == prompt


@pytest.mark.parametrize(("prompt", "expected"), SYNTAX.items())
def test_syntax_is_refused_and_its_piece_is_named(prompt: str, expected: tuple[str, str]) -> None:
    piece, meaning = expected
    found = find_syntax(prompt)
    assert found is not None
    assert found.text == piece
    assert meaning in found.meaning
    with pytest.raises(UsageError, match="which other programs read as"):
        refuse_syntax(prompt, strict=True)


@pytest.mark.parametrize("prompt", SYNTAX)
def test_the_hint_draws_the_piece_as_words(prompt: str) -> None:
    """Each refused piece, written as the hint says, until nothing is refused: the words of the prompt come out."""
    text, words = prompt, re.sub(r"\\([\\{}])", r"\1", prompt)
    for _ in range(9):
        found = find_syntax(text)
        if found is None:
            break
        assert found.text in text
        start = text.rindex(found.text) if "escaped" in prompt else text.index(found.text)
        text = text[:start] + found.literal + text[start + len(found.text) :]
    assert words_of(text) == words


@pytest.mark.parametrize(("prompt", "words"), ESCAPED.items())
def test_a_backslash_makes_it_literal(prompt: str, words: str) -> None:
    refuse_syntax(prompt, strict=True)
    assert words_of(prompt) == words


def test_a_piece_of_any_length_is_shown_shortened() -> None:
    found = find_syntax(f"{{{'word ' * 900}}}")
    assert found is not None
    assert len(found.text) == 60


def test_a_weight_of_compel_behind_brackets() -> None:
    found = find_syntax("a (large cat)+++")
    assert found is not None
    assert (found.text, found.literal) == ("+++", "\\+++")
    refuse_syntax("a (large cat)\\+++ and (another\\)++", strict=True)


@pytest.mark.parametrize("prompt", ["a <|endoftext|> b", "<|startoftext|>", "\\<|EndOfText|\\> b"])
def test_the_tokens_of_the_tokenizer_are_refused_however_they_are_written(
    prompt: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UsageError, match="text encoders take for the start or the end of the text") as caught:
        refuse_syntax(prompt, strict=True)
    assert caught.value.hint.startswith("leave it out")
    refuse_syntax(prompt, strict=False)
    assert "plain words" not in caplog.text


@given(st.text(st.sampled_from("ab (){}[]<>\\:|_-0.5ANDBREK\n"), max_size=40))
def test_any_text_is_let_through_or_refused(prompt: str) -> None:
    if find_syntax(prompt) is None:
        refuse_syntax(prompt, strict=True)
        return
    with pytest.raises(UsageError, match="to draw it as words"):
        refuse_syntax(prompt, strict=True)


def test_a_pipeline_logs_each_piece_once_and_refuses_prompts_that_are_several(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "sdopt")
    for _ in range(2):
        refuse_syntax("a {once|twice} b", strict=False)
        refuse_syntax("words", strict=False)
    assert [record.message for record in caplog.records] == [
        "the prompt has '{once|twice}', which other programs read as a choice of dynamic prompts and sdopt does not; "
        "the pipeline draws it as plain words"
    ]
    with pytest.raises(UsageError, match="drawn apart and added"):
        refuse_syntax("a cat AND a dog", strict=False)
