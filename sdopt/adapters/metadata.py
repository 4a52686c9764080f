"""What the metadata of an adapter file says: title, trigger words, base model, writer, and PEFT's settings.

All of it is text from a stranger: sizes are limited, and whoever prints it makes it harmless.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from sdopt.errors import AdapterError
from sdopt.model.family import Family

_JSON_LIMIT_CHARACTERS = 8_000_000
_WORD_LIMIT_CHARACTERS = 200
_WORDS = 12
# A tag is a trigger word where nearly every picture of the training has it.
_TRIGGER_SHARE = 0.9
_REPEATS = re.compile(r"^\d+_")


class FewStep(StrEnum):
    """Adapters that draw in one to eight steps; each wants a scheduler and a guidance of its own."""

    LCM = "lcm"
    TCD = "tcd"
    TURBO = "turbo"
    LIGHTNING = "lightning"
    HYPER = "hyper"
    DMD2 = "dmd2"


_FEW_STEPS = re.compile(
    r"(?<![a-z])(lcm|tcd|turbo|lightning|dmd2)(?![a-z])|(?<![a-z])hyper[ _-]?(?:sd|sd15|sdxl|[0-9])(?![a-z])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Said:
    """What a file says of itself; empty where it says nothing."""

    title: str = ""
    trigger_words: tuple[str, ...] = ()
    tags: Mapping[str, int] = field(default_factory=dict)
    """The most frequent of the training's captions, and how many captions have each."""
    family: Family | None = None
    base_model: str = ""
    """The base model in the file's own words."""
    few_step: FewStep | None = None


def read_metadata(metadata: Mapping[str, str], file_stem: str) -> Said:
    """Broken JSON in the metadata counts as nothing said."""
    title = _first(metadata, "modelspec.title", "ss_output_name")
    captions, folders = _count_tags(metadata.get("ss_tag_frequency", ""))
    phrase = _first(metadata, "modelspec.trigger_phrase", "modelspec.trigger_word", "trigger_words")
    words = [word.strip() for word in phrase.split(",")] if phrase else folders
    if not phrase and captions:
        most = max(captions.values())
        words = [*words, *(tag for tag, count in captions.most_common(_WORDS) if count >= _TRIGGER_SHARE * most)]
    named = _first(
        metadata, "modelspec.architecture", "ss_base_model_version", "baseModel", "base_model", "ot_model_type"
    )
    found = _FEW_STEPS.search(" ".join((file_stem, title, _first(metadata, "ss_output_name"))))
    few_step = FewStep((found[1] or "hyper").lower()) if found else None
    return Said(
        title=title, trigger_words=tuple(dict.fromkeys(_cut(word) for word in words if word))[:_WORDS],
        tags={_cut(tag): count for tag, count in captions.most_common(_WORDS)},
        family=_parse_family(named, metadata), base_model=named, few_step=few_step,
    )  # fmt: skip


def _first(metadata: Mapping[str, str], *keys: str) -> str:
    return next((_cut(metadata[key].strip()) for key in keys if metadata.get(key, "").strip() not in ("", "None")), "")


def _cut(text: str) -> str:
    return text[:_WORD_LIMIT_CHARACTERS]


def _count_tags(text: str) -> tuple[Counter[str], list[str]]:
    """kohya's table: folder of pictures -> tag -> how many captions have it. And the folders' words."""
    counts: Counter[str] = Counter()
    folders: list[str] = []
    for folder, tags in _parse_table(text).items():
        if _REPEATS.match(folder):  # N_words: the words after the number of repeats are the concept
            folders.append(_REPEATS.sub("", folder).strip())
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int):
                counts[tag.strip()] += count
    return counts, folders


def _parse_table(text: str) -> dict[str, Any]:
    if not text or len(text) > _JSON_LIMIT_CHARACTERS:
        return {}
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


def _parse_family(named: str, metadata: Mapping[str, str]) -> Family | None:
    word = re.sub(r"[\s_.-]+", "", named.lower())
    if "xl" in word or word.startswith(("pony", "illustrious", "noobai")):
        return Family.SDXL_REFINER if "refiner" in word else Family.SDXL
    if re.search(r"(diffusion|sd)v?2", word) or metadata.get("ss_v2") == "True":
        return Family.SD2
    return Family.SD1 if re.search(r"(diffusion|sd)v?1", word) else None


def name_writer(metadata: Mapping[str, str], keys: Iterable[str]) -> str:
    """The program that wrote a file, or the form that its names have."""
    if any(key.startswith("ot_") for key in metadata):
        return "OneTrainer"
    module = metadata.get("ss_network_module", "")
    if module:
        return "LyCORIS" if "lycoris" in module else "kohya"
    if "lora_adapter_metadata" in metadata:
        return "diffusers"
    forms = (
        ("PEFT", r"base_model\.model\."), ("LyCORIS", r"lycoris_"),
        ("ComfyUI", r"(model\.)?diffusion_model\.|text_encoders\."),
        ("OneTrainer", r"bundle_emb\.|lora_(unet|te1?|te2)\."),
        ("kohya's form", r"lora_(unet|te)"),
        ("diffusers of 2023", r".*(\.processor\.|_lora\.|lora_linear_layer)"),
        ("diffusers", r"(unet|text_encoder|text_encoder_2)\."),
    )  # fmt: skip
    listed = "\n".join(keys)
    return next((who for who, start in forms if re.search(f"^(?:{start})", listed, re.MULTILINE)), "PEFT's form")


@dataclass(frozen=True)
class PeftSettings:
    """How PEFT scales the layers of one network: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""

    alpha: float
    alphas: Mapping[str, float] = field(default_factory=dict)
    """By the end of a layer's dotted name."""
    rank_stabilised: bool = False

    def scale(self, layer: str, rank: int) -> float:
        ends = (alpha for name, alpha in self.alphas.items() if layer == name or layer.endswith(f".{name}"))
        return next(ends, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_peft_settings(metadata: Mapping[str, str], sidecar: str, where: str) -> dict[str, PeftSettings]:
    """By the prefix of the network, `unet`; with the prefix "" where one table stands for all that is in the file.

    diffusers writes them into the metadata as `unet.r`, PEFT into `adapter_config.json` beside the file, whose text
    `sidecar` is. Raises `AdapterError` for settings that are not numbers.
    """
    table = _parse_table(metadata.get("lora_adapter_metadata", "")) or _parse_table(sidecar)
    found: dict[str, PeftSettings] = {}
    for key in table:
        prefix, dot, last = key.rpartition(".")
        if last == "lora_alpha":
            start = f"{prefix}{dot}"
            patterns = table.get(f"{start}alpha_pattern") or {}
            try:
                alphas = {name.lstrip("^").removesuffix("$"): float(alpha) for name, alpha in patterns.items()}
                settings = PeftSettings(float(table[key]), alphas, bool(table.get(f"{start}use_rslora")))
            except (TypeError, ValueError, AttributeError) as error:
                raise AdapterError(f"{where}: PEFT's settings {key} are malformed") from error
            found[prefix] = settings
    return found
