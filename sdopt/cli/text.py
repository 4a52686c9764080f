"""Text for a terminal: what came from outside, made safe, and what several commands say alike."""

from __future__ import annotations

TRUST_ENGINE_HELP = (
    "Open TensorRT plans that were not built here, this once: the SHA-256 of a plan, or of bundle.json for all."
)


def neutralise(text: str) -> str:
    """Replace control characters: a file's name or a manifest may hold escape sequences. Line ends stay."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)
