r"""A1111's grammar of prompts, as pure text: adapters, words that change between steps, and weights.

The rules are those of the documentation and the code of stable-diffusion-webui 1.10 ("Original" emphasis):

- `(word)` weighs a word 1.1 times, `[word]` 1/1.1 times, `(word:1.3)` 1.3 times; nested weights multiply. A bracket
  that nothing closes reaches to the end; one that closes nothing is a character.
- `[from:to:when]`, `[to:when]` and `[from::when]` change the words after `when` steps: a number with a point is a share
  of all steps (1.0 is all), one without is a number of steps. `[a|b|c]` takes turns, one a step.
- `BREAK` ends the chunk of 75 tokens, and what follows begins another.
- `<lora:name:weight>`, `<lora:name:te:unet>`, with `te=` and `unet=` in any place, and `<lyco:…>`, which is the same.

They apply in this order: adapters are taken out, changing words are resolved for a step, the rest is weighed.

Where A1111's code differs from its documentation, the documentation holds: A1111 changes words one step late, draws a
BREAK inside brackets as a word, and one `|` outside of brackets turns off every change of a prompt. A backslash that
escapes nothing is a character here, and A1111 drops it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from sdopt.errors import UsageError

ESCAPED = re.compile(
    r"\\([()\[\]{}<>_\-+:|\\\uff08]|(?:BREAK|AND(?:_(?:SALT|PERP|TOPK))?|ADD(?:COL|ROW|BASE|COMM))\b|embedding:)"
)
"""A backslash and the piece that it makes literal."""

_EMPHASIS = 1.1
_OPENING = {")": "(", "]": "["}
_ADAPTER = re.compile(r"\\.|<(?:lora|lyco):([^<>]*)>", re.DOTALL)
_CHANGE_TOKENS = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]+|\\", re.DOTALL)
_WHEN = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*", re.ASCII)
_WEIGHT_TOKENS = re.compile(rf"{ESCAPED.pattern}|([(\[])|:\s*([+-]?[.\d]+)\s*\)|([)\]])|[^\\()\[\]:]+|[\\:]", re.ASCII)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
# Weights beyond it are noise, and prompts of strangers nest as deep as they are long.
_DEEPEST = 100


@dataclass(frozen=True)
class AdapterTag:
    """An adapter that a prompt names, and its weights in the text encoders and in the UNet."""

    name: str
    te_weight: float
    unet_weight: float


@dataclass(frozen=True)
class Piece:
    """Words of one weight."""

    text: str
    weight: float = 1.0


Sections = tuple[tuple[Piece, ...], ...]
"""A prompt as it is weighed: what stands between one BREAK and the next. There is at least one section."""


def take_adapters(prompt: str) -> tuple[str, tuple[AdapterTag, ...]]:
    """A prompt without the tags of its adapters, and those, in order.

    Raises `UsageError` for a tag without a name, with a weight that is no number, or with an unknown argument.
    """
    tags: list[AdapterTag] = []

    def take(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0]
        tags.append(_read_tag(match[0], match[1]))
        return ""

    return _ADAPTER.sub(take, prompt), tuple(tags)


def _read_tag(tag: str, arguments: str) -> AdapterTag:
    named: dict[str, str] = {}
    ordered: list[str] = []
    for argument in arguments.split(":"):
        key, equals, value = argument.partition("=")
        if equals and ordered:
            named[key.strip()] = value
        else:
            ordered.append(argument)
    name, *weights = ordered
    if not name.strip():
        raise UsageError(f"{tag} in the prompt names no adapter", hint="write <lora:name:weight>")
    if len(weights) > 2 or named.keys() - {"te", "unet"}:
        raise UsageError(
            f"{tag} in the prompt has more than sdopt reads",
            hint="write <lora:name:weight> or <lora:name:te_weight:unet_weight>",
        )
    te = named.get("te", weights[0] if weights else "1")
    unet = named.get("unet", weights[1] if weights[1:] else te)
    return AdapterTag(name.strip(), _read_weight(tag, te), _read_weight(tag, unet))


def _read_weight(where: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UsageError(f"{where} in the prompt has the weight {text!r}, which is not a number")
    return weight


def texts_of_steps(prompt: str, steps: int) -> tuple[str, ...]:
    """What a prompt says at each of `steps` steps, its weights still in it; one text where all steps have the same."""
    first, changes = _resolve(prompt, 1, steps)
    if not changes:
        return (first,)
    texts = (first, *(_resolve(prompt, step, steps)[0] for step in range(2, steps + 1)))
    return texts if len(set(texts)) > 1 else (first,)


def changes_between_steps(prompt: str) -> bool:
    """Whether a prompt has words that change or take turns."""
    return _resolve(prompt, 1, 1)[1]


@dataclass
class _Bracket:
    """An open bracket, or with none the prompt: its parts, already resolved, and what stands between them.

    One that holds a bracket without its partner is not valid: it is characters, as is all that it is in.
    """

    opening: str
    parts: list[str] = field(default_factory=lambda: [""])
    separators: list[str] = field(default_factory=list)
    valid: bool = True

    def add(self, text: str) -> None:
        self.parts[-1] += text

    def separate(self, mark: str) -> None:
        self.separators.append(mark)
        self.parts.append("")

    def as_characters(self, closing: str = "") -> str:
        marks = (*self.separators, closing)
        return self.opening + "".join(f"{part}{mark}" for part, mark in zip(self.parts, marks, strict=True))


def _resolve(prompt: str, step: int, steps: int) -> tuple[str, bool]:
    """The text at a step, the first of which is 1, and whether anything in it changes."""
    stack = [_Bracket("")]
    unclosed = {"(": 0, "[": 0}
    changes = False
    for match in _CHANGE_TOKENS.finditer(prompt):
        part = match[0]
        if part in unclosed:
            stack.append(_Bracket(part))
            unclosed[part] += 1
            _require_depth(len(stack) - 1)
        elif part in _OPENING:
            opening = _OPENING[part]
            if not unclosed[opening]:
                stack[-1].add(part)
                stack[-1].valid = False
                continue
            while stack[-1].opening != opening:
                unclosed[stack[-1].opening] -= 1
                _spoil(stack)
            unclosed[opening] -= 1
            changes |= _close(stack, part, step, steps)
        elif part in (":", "|"):
            stack[-1].separate(part)
        else:
            stack[-1].add(part)
    while len(stack) > 1:
        _spoil(stack)
    return stack[0].as_characters(), changes


def _spoil(stack: list[_Bracket], closing: str = "") -> None:
    text = stack.pop().as_characters(closing)
    stack[-1].add(text)
    stack[-1].valid = False


def _close(stack: list[_Bracket], closing: str, step: int, steps: int) -> bool:
    """Close the last bracket; whether it was one of words that change."""
    bracket = stack[-1]
    marks = "".join(bracket.separators)
    if not bracket.valid:
        _spoil(stack, closing)
    elif not marks or (closing == ")" and marks == ":"):
        stack.pop()
        stack[-1].add(bracket.as_characters(closing))
    elif closing == "]" and set(marks) == {"|"}:
        stack.pop()
        stack[-1].add(bracket.parts[(step - 1) % len(bracket.parts)])
        return True
    elif closing == "]" and marks in (":", "::") and (when := _WHEN.fullmatch(bracket.parts[-1])):
        stack.pop()
        before, after = bracket.parts[0] if marks == "::" else "", bracket.parts[-2]
        stack[-1].add(before if step <= _count_steps(when[1], steps) else after)
        return True
    else:
        _spoil(stack, closing)
    return False


def _count_steps(when: str, steps: int) -> int:
    """After how many steps words change."""
    number = float(when) * steps if "." in when else float(when)
    return int(min(max(number, 0), steps))


def weigh(text: str) -> Sections:
    """A text without changing words, cut where its weight changes and at each BREAK; escapes are resolved.

    Pieces of equal weight are joined, and none is empty. Raises `UsageError` for a weight that is not a number.
    """
    found: list[list[str | float] | None] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for match in _WEIGHT_TOKENS.finditer(text):
        literal, opening, weight, closing = match.groups()
        if literal is not None:
            found.append([literal, 1.0])
        elif opening is not None:
            opened[opening].append(len(found))
            _require_depth(len(opened["("]) + len(opened["["]))
        elif weight is not None and opened["("]:
            _multiply(found, opened["("].pop(), _read_weight(match[0], weight))
        elif closing is not None and opened[_OPENING[closing]]:
            _multiply(found, opened[_OPENING[closing]].pop(), _factor_of(closing))
        else:
            first, *others = _BREAK.split(match[0])
            found.append([first, 1.0])
            for part in others:
                found += [None, [part, 1.0]]
    for bracket, starts in opened.items():
        for start in starts:
            _multiply(found, start, _factor_of(bracket))
    return tuple(_sections_of(found))


def _require_depth(depth: int) -> None:
    if depth > _DEEPEST:
        raise UsageError(f"the prompt has brackets more than {_DEEPEST} deep", hint="to draw one as it is, write \\(")


def _factor_of(bracket: str) -> float:
    return _EMPHASIS if bracket in "()" else 1 / _EMPHASIS


def _multiply(found: list[list[str | float] | None], start: int, factor: float) -> None:
    for piece in found[start:]:
        if piece is not None:
            piece[1] = float(piece[1]) * factor


def _sections_of(found: list[list[str | float] | None]) -> Iterator[tuple[Piece, ...]]:
    section: list[Piece] = []
    for entry in (*found, None):
        if entry is None:
            yield tuple(section)
            section = []
            continue
        piece = Piece(str(entry[0]), float(entry[1]))
        if not math.isfinite(piece.weight):
            raise UsageError("the weights of nested brackets in the prompt multiply to infinity")
        if section and section[-1].weight == piece.weight:
            section[-1] = Piece(section[-1].text + piece.text, piece.weight)
        elif piece.text:
            section.append(piece)
