"""Names of tensors in adapter files: which layer they belong to, and what they are to it.

A name is a stem, which says the layer in its writer's words, and an end, which says the part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum

# The end of a name -> the part. PEFT puts the adapter's name between `lora_A` and `weight`; diffusers of 2023 named
# attention processors, whose layers were called `to_q_lora`.
_ENDS = {
    "down": r"(?:\.lora_down|[._]lora\.down|\.lora_linear_layer\.down|\.lora_A(?:\.[\w-]+)?)\.weight",
    "up": r"(?:\.lora_up|[._]lora\.up|\.lora_linear_layer\.up|\.lora_B(?:\.[\w-]+)?)\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"(?:[._]lora)?\.alpha",
    "dora_scale": r"\.dora_scale",
    "magnitude": r"\.lora_magnitude_vector(?:\.[\w-]+)?",
    **{part: rf"\.{part}" for part in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    )},
    # LyCORIS calls the differences of norms by names of their own.
    "diff": r"\.(?:diff|w_norm)",
    "diff_b": r"\.(?:diff_b|b_norm)",
}  # fmt: skip
# The ends that most tensors have, looked up before the pattern is tried: a file has thousands.
_USUAL = {
    "lora_down.weight": "down", "lora_up.weight": "up", "lora_A.weight": "down", "lora_B.weight": "up",
    "alpha": "alpha",
    **{part: part for part in _ENDS if part.startswith(("hada_", "lokr_"))},
}  # fmt: skip
_KEY = re.compile("(.+?)(?:" + "|".join(f"(?P<{part}>{end})" for part, end in _ENDS.items()) + ")")
# Ways to change a weight that are no difference of it, or that nobody writes for Stable Diffusion any more.
_OTHERS = (
    (re.compile(r"\.oft_(blocks|diag|R\b|r\.)|\.(oft|boft)_"), "an OFT"),
    (re.compile(r"\.(a1|a2|b1|b2)\.weight$"), "a GLoRA"),
    (re.compile(r"\.on_input$|\.ia3_l"), "an IA3"),
    (re.compile(r"\.lora_embedding_[AB]"), "a LoRA of an embedding"),
    (re.compile(r"\.bias_(values|indices|size)$"), "a LyCORIS file with sparse biases"),
)


class LayerKind(StrEnum):
    """How a file says the difference of one layer."""

    LOW_RANK = "LoRA"
    HADAMARD = "LoHa"
    KRONECKER = "LoKr"
    FULL = "full difference"


_SETS: tuple[tuple[LayerKind, str], ...] = (
    (LayerKind.HADAMARD, "hada_"), (LayerKind.KRONECKER, "lokr_"),
)  # fmt: skip


def split_key(key: str) -> tuple[str, str] | None:
    """(stem, part) of a tensor's name, or None where it is not a part of an adapter's layer."""
    pieces = key.rsplit(".", 2 if key.endswith(".weight") else 1)
    part = _USUAL.get(".".join(pieces[1:]))
    if part and pieces[0] and not pieces[0].endswith("lora"):
        return pieces[0], part
    if (found := _KEY.fullmatch(key)) is None or found.lastgroup is None:
        return None
    return found[1].replace(".processor.", "."), found.lastgroup


def name_other_kind(keys: Iterable[str]) -> str:
    """The kind of adapter that sdopt does not read and that one of these names belongs to, or ""."""
    return next((kind for key in keys for pattern, kind in _OTHERS if pattern.search(key)), "")


def find_gap(parts: Iterable[str]) -> str:
    """What is wrong with the parts of one layer, as the end of a sentence; "" where they are whole."""
    there = set(parts)
    kinds = find_kinds(there)
    if not kinds:
        return f"it has {_list(there)} alone" if there != {"diff_b"} else ""
    if len(kinds) > 1:
        return f"it is both a {kinds[0]} and a {kinds[1]}"
    match kinds[0]:
        case LayerKind.LOW_RANK:
            lacking = {"down", "up"} - there
        case LayerKind.HADAMARD:
            lacking = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} - there
            if there & {"hada_t1", "hada_t2"}:
                lacking |= {"hada_t1", "hada_t2"} - there
        case LayerKind.KRONECKER:
            lacking = _lacks_factor(there, "lokr_w1") | _lacks_factor(there, "lokr_w2")
            if "lokr_t2" in there:
                lacking |= {"lokr_w2_a", "lokr_w2_b"} - there
        case LayerKind.FULL:
            lacking = set()
    return f"its {_list(lacking)} is missing" if lacking else ""


def find_kinds(parts: Iterable[str]) -> list[LayerKind]:
    """The kinds that the parts of a layer belong to: one for a sound layer, none for a difference of its bias alone."""
    there = set(parts)
    kinds = [kind for kind, start in _SETS if any(part.startswith(start) for part in there)]
    kinds += [LayerKind.LOW_RANK] * bool(there & {"down", "up", "mid"})
    return kinds + [LayerKind.FULL] * ("diff" in there)


def _lacks_factor(there: set[str], factor: str) -> set[str]:
    halves = {f"{factor}_a", f"{factor}_b"}
    if factor in there:
        return set()
    return halves - there if there & halves else {factor}


def _list(parts: Iterable[str]) -> str:
    return " and ".join(sorted(parts))
