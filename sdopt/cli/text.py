"""Text that came from outside, made safe for a terminal."""

from __future__ import annotations


def neutralise(text: str) -> str:
    """Replace control characters: a file's name or a manifest may hold escape sequences. Line ends stay."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)
