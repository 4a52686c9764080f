"""The `parameters` text that A1111's web UI writes into pictures, and that galleries and other UIs read.

Format: modules/infotext_utils.py and `create_infotext` in modules/processing.py of stable-diffusion-webui
1.10.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from sdopt.errors import ArtifactError, UsageError
from sdopt.model.lora import LoraUse
from sdopt.model.request import DrawRequest, parse_request
from sdopt.model.samplers import parse_a1111

_NEGATIVE = "Negative prompt:"
_SETTING = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
# As kohya's scripts and Civitai show AutoV3.
_LORA_HASH_DIGITS = 12
# How many settings the last line must have to be one of settings, and not the prompt's.
_LEAST_SETTINGS = 3


def format_infotext(
    request: DrawRequest,
    *,
    size_px: tuple[int, int],
    sampler: str,
    model: str,
    model_hash: str,
    version: str,
    loras: Sequence[LoraUse] = (),
) -> str:
    """A request as A1111 writes it. `size_px` is (width, height); `model_hash` may be empty. `loras` are those that
    acted, of which A1111 knows no other place than the prompt.
    """
    tags = "".join(_format_tag(use) for use in request.loras)
    settings = {
        "Steps": request.steps,
        "Sampler": sampler,
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": request.seed,
        "Size": f"{size_px[0]}x{size_px[1]}",
        "Model hash": model_hash,
        "Model": model,
        "Clip skip": "" if request.clip_skip is None else request.clip_skip + 1,
        "Lora hashes": ", ".join(
            f"{_name_of(use)}: {use.autov3[:_LORA_HASH_DIGITS]}" for use in dict.fromkeys(loras) if use.autov3
        ),
        "Version": version,
    }
    last = ", ".join(f"{key}: {_quote(str(value))}" for key, value in settings.items() if value != "")
    negative = f"\n{_NEGATIVE} {request.negative_prompt}" if request.negative_prompt else ""
    return f"{request.prompt}{tags}{negative}\n{last}".strip()


def _format_tag(use: LoraUse) -> str:
    """A1111 has the text encoders' weight first."""
    weights = f"{use.unet:g}" if use.unet == use.text else f"{use.text:g}:{use.unet:g}"
    return f" <lora:{_name_of(use)}:{weights}>"


def _name_of(use: LoraUse) -> str:
    name = PurePath(use.source).name
    return name.removesuffix(".safetensors")


def parse_infotext(text: str, *, scheduler: str | None = None) -> DrawRequest:
    """The request in a `parameters` text, as far as sdopt has the settings; others (hires fix, …) are left
    out. `scheduler` is taken instead of the text's, which may be one that sdopt does not have.

    Raises `ArtifactError` for a text that is not of this format, `UsageError` for a setting that sdopt cannot
    follow.
    """
    *lines, last = text.strip().split("\n")
    settings = dict(_SETTING.findall(last))
    if len(settings) < _LEAST_SETTINGS or not {"Steps", "Seed"} <= settings.keys():
        raise ArtifactError("the picture's parameters are not in A1111's format: the last line has no Steps and Seed")
    prompt, negative = _split_prompts(lines)
    settings = {key: _unquote(value) for key, value in settings.items()}
    _require_same_rules(settings)
    values: dict[str, Any] = {"prompt": prompt, "steps": settings["Steps"], "seed": settings["Seed"]}
    values |= {"negative_prompt": negative} if negative else {}
    values |= {"guidance_scale": settings["CFG scale"]} if "CFG scale" in settings else {}
    if size := _SIZE.fullmatch(settings.get("Size", "")):
        values |= {"width_px": size[1], "height_px": size[2]}
    if scheduler is not None:
        values["scheduler"] = scheduler
    elif "Sampler" in settings:
        if settings.get("Version", "").startswith("sdopt"):
            values["scheduler"] = settings["Sampler"]
        else:
            values["scheduler"] = parse_a1111(settings["Sampler"], settings.get("Schedule type", ""))
    if settings.get("Clip skip", "1").isdecimal() and (skip := int(settings.get("Clip skip", "1"))) > 1:
        values["clip_skip"] = skip - 1
    return parse_request(values)


def _require_same_rules(settings: dict[str, str]) -> None:
    """Refuse settings under which A1111 reads the same prompt otherwise; it writes them only where they matter."""
    if (emphasis := settings.get("Emphasis", "Original")) != "Original":
        raise UsageError(f"the picture was drawn with A1111's emphasis {emphasis!r}, and sdopt knows 'Original'")
    if settings.get("Old prompt editing timelines") == "True":
        raise UsageError(
            "the picture was drawn with A1111's old timelines of prompt editing, which sdopt does not know"
        )


def _split_prompts(lines: list[str]) -> tuple[str, str]:
    start = next((i for i, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).removeprefix(_NEGATIVE)
    return "\n".join(lines[:start]).strip(), negative.strip()


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",\n:") else text


def _unquote(text: str) -> str:
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text.strip()
    try:
        return str(json.loads(text))
    except ValueError:
        return text
