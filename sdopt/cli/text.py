"""Text for a terminal: what came from outside, made safe, and what several commands say alike."""

from __future__ import annotations

TRUST_ENGINE_HELP = (
    "Open TensorRT plans that were not built here, this once: the SHA-256 of a plan, or of bundle.json for all."
)


def neutralise(text: str) -> str:
    """Replace control characters: a file's name or a manifest may hold escape sequences. Line ends stay."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)


def format_megabytes(size_bytes: int) -> str:
    """Whole megabytes, without the unit; what is there and rounds to none is "<1", and nothing is a dash."""
    megabytes = f"{size_bytes / 1e6:,.0f}"
    return "\N{EN DASH}" if not size_bytes else "<1" if megabytes == "0" else megabytes


_UNITS_S = (("years", 31_557_600), ("days", 86_400), ("hours", 3_600), ("minutes", 60))


def format_duration(duration_s: float) -> str:
    """ "40 seconds", "12 minutes" or "1,223 years": in the largest unit of which there are two or more."""
    for unit, length_s in _UNITS_S:
        if duration_s >= 2 * length_s:
            return f"{duration_s / length_s:,.0f} {unit}"
    seconds = round(duration_s)
    return "<1 second" if seconds < 1 else "1 second" if seconds == 1 else f"{seconds} seconds"
