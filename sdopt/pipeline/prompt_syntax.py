r"""What other programs read in a prompt and sdopt does not: it is refused or reported, never drawn in silence as words.

What sdopt reads is in `prompt_grammar`. The rule for the rest, for text that no backslash escapes:

- `AND` in capitals, as a word of its own: A1111 draws such prompts apart and adds them. So do `AND_SALT`, `AND_PERP`
  and `AND_TOPK` of Neutral Prompt.
- `ADDCOL`, `ADDROW`, `ADDBASE` and `ADDCOMM` in capitals, of Regional Prompter.
- `{` with a later `}`: `{a|b}` of dynamic prompts and ComfyUI, `{word}` of NovelAI.
- `<name:…>`, such as `<hypernet:x:1>`, and `<name>`, the token of a textual inversion that is not loaded. `<3` and
  `a < b` are characters.
- `embedding:name` of ComfyUI, at the start of a word; `embedding: name` is words.
- `__name__`, a wildcard of dynamic prompts. `snake_case`, `^__^` and `____` are characters.
- `--name` at the start of a word and `word::2`, of Midjourney. `--` alone and `16:9` are characters.
- `word++`, `word--`, `(words)++` and more of them, of compel, where the word ends in two letters or more and no word
  follows at once. `C++`, `wait--what` and a single `+` or `-` are characters.
- A weight like `(red:1.3)` with a full-width bracket or colon, as keyboards for Chinese and Japanese type it.
- `<|startoftext|>` and `<|endoftext|>`, which the tokenizer takes for the start and the end of the text.

A backslash before one of `( ) [ ] { } < > _ - + : |`, a full-width opening bracket or another backslash, or before
`BREAK`, `AND`, the other words in capitals and `embedding:`, makes it literal and is itself not drawn, as A1111
does for brackets. Any other backslash is a character. Nothing makes the tokenizer's start and end literal.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass

from sdopt.errors import UsageError
from sdopt.pipeline.prompt_grammar import ESCAPED

_log = logging.getLogger("sdopt")

# Stands for an escaped piece while syntax is looked for: a character that no rule names.
_LITERAL = "\N{OBJECT REPLACEMENT CHARACTER}"
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class SyntaxPiece:
    """A piece of a prompt, what other programs take it for, and the piece as it has to be written to be drawn."""

    text: str
    meaning: str
    literal: str


_COMPOSITION = "several prompts that are drawn apart and added"
_FULL_WIDTH = "a weight in full-width characters"
_WORD = "the token of a textual inversion"
_MARK = "the start or the end of the text"
_CAPITALS = re.compile(r"BREAK|AND(?:_\w+)?|ADD(?:COL|ROW|BASE|COMM)")

# In the order in which a piece is named where several rules fit.
_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"<[A-Za-z_]\w*:[^<>]*>"), "a LoRA or another extra network"),
    (re.compile(r"<[A-Za-z][\w-]*>"), _WORD),
    (re.compile(r"(?<!\S)\(*embedding:\S+"), "an embedding of ComfyUI"),
    (re.compile(r"\{[^{}]*\}"), "a choice of dynamic prompts"),
    (re.compile(r"\{(?=.*\})"), "a choice of dynamic prompts"),
    (re.compile(r"(?<![^\W_])__[A-Za-z0-9*][\w\-/.*]*?__(?![^\W_])"), "a wildcard"),
    (re.compile(r"\bAND(?:_(?:SALT|PERP|TOPK))?\b"), _COMPOSITION),
    (re.compile(r"\bADD(?:COL|ROW|BASE|COMM)\b"), "a region of Regional Prompter"),
    (re.compile(r"(?<!\S)--[A-Za-z]\w*"), "a parameter of Midjourney"),
    (re.compile(r"(?<=\w)::-?\d[\d.]*"), "a weight of Midjourney"),
    (re.compile(r"(?:(?<!\w)\w*[^\W\d_]{2}|(?<=\)))(?:\+{2,}|-{2,})(?![\w+\->])"), "a weight of compel"),
    (re.compile(r"\uff08[^()\uff08\uff09]*[:\uff1a]\s*[+-]?[\d.]+\s*[)\uff09]"), _FULL_WIDTH),
    (re.compile(r"\([^()\uff08\uff09]*(?:\uff1a\s*[+-]?[\d.]+\s*[)\uff09]|:\s*[+-]?[\d.]+\s*\uff09)"), _FULL_WIDTH),
    (re.compile(r"\\?<\\?\|(?:start|end)oftext\\?\|\\?>", re.IGNORECASE), _MARK),
)


def find_syntax(prompt: str, words: Iterable[str] = ()) -> SyntaxPiece | None:
    """The first piece of a prompt that other programs would not draw as words; None where there is none.

    Names of `words` that are loaded are words, whatever characters they have.
    """
    escaped = [(match.start(), match.end()) for match in ESCAPED.finditer(prompt)]
    text = prompt
    for start, end in escaped:
        text = f"{text[:start]}{_LITERAL * (end - start)}{text[end:]}"
    text = text.replace("\n", " ")
    for word in words:
        text = re.sub(re.escape(word), lambda match: _LITERAL * len(match[0]), text, flags=re.IGNORECASE)
    found: list[tuple[int, int, SyntaxPiece]] = []
    for order, (pattern, meaning) in enumerate(_RULES):
        # The tokenizer takes its tokens for what they are whether or not the grammar took a backslash from them.
        match = pattern.search(prompt if meaning == _MARK else text)
        if match is None:
            continue
        piece = prompt[match.start() : match.end()]
        shown = piece if len(piece) > 1 else prompt[match.start() : match.start() + _SHOWN_CHARACTERS]
        found.append((match.start(), order, SyntaxPiece(_shorten(shown), meaning, _shorten(_escape(shown)))))
    return min(found, key=lambda entry: entry[:2])[2] if found else None


def refuse_syntax(prompt: str, *, strict: bool, words: Iterable[str] = ()) -> None:
    """Raise `UsageError` for a piece that sdopt does not read; see the module. `words` are those that are loaded.

    Not `strict` only logs it, once for each piece, and leaves it to be drawn as words, except for `AND`: without it the
    picture would be of something else.
    """
    piece = find_syntax(prompt, words)
    if piece is None:
        return
    if strict or piece.meaning == _COMPOSITION:
        raise UsageError(_describe(piece), hint=_hint(piece))
    drawn = "" if piece.meaning == _MARK else "; the pipeline draws it as plain words"
    _warn_once(f"{_describe(piece)}{drawn}")


def _hint(piece: SyntaxPiece) -> str:
    if piece.meaning == _MARK:
        return "leave it out: text encoders have no words for it"
    as_words = f"to draw it as words, write {piece.literal}"
    if piece.meaning == _WORD:
        return f"load it: --embedding FILE, or pipe.load_textual_inversion(file); {as_words}"
    return f"to weigh it, write (word:1.3); {as_words}" if piece.meaning == _FULL_WIDTH else as_words


@functools.lru_cache(maxsize=1024)
def _warn_once(sentence: str) -> None:
    _log.warning("%s", sentence)


def _describe(piece: SyntaxPiece) -> str:
    if piece.meaning == _MARK:
        return f"the prompt has {piece.text!r}, which text encoders take for {_MARK}"
    if piece.meaning == _WORD:
        return f"the prompt has {piece.text!r}, which other programs read as {_WORD}, and none of that name is loaded"
    return f"the prompt has {piece.text!r}, which other programs read as {piece.meaning} and sdopt does not"


def _escape(piece: str) -> str:
    if _CAPITALS.fullmatch(piece) or piece.startswith("embedding:"):
        return f"\\{piece}"
    if piece.startswith(("--", "::", "__")):
        return f"\\{piece}"
    return re.sub(r"(?<!\\)([()\[\]{}<>\uff08]|(?:\+{2,}|-{2,})$)", r"\\\1", piece)


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…"
