"""The hint for a word that is not one of those known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(word: str, known: Iterable[str], *, more: str = "") -> str:
    """ "did you mean 'fp16'? Known: fp16, fp32", or the known words alone where none comes near. `more` is put behind
    them. Empty where nothing is known.
    """
    words = [str(each) for each in known]  # members of an enum, too, as the user types them
    if not words:
        return ""
    listed = f"{', '.join(words)}{more}"
    near = find_near(word, words)
    return f"known: {listed}" if near is None else f"did you mean {near!r}? Known: {listed}"


def find_near(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like this one, if any is."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)
