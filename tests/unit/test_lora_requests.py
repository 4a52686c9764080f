"""LoRAs that requests and prompts name: found, loaded, added up, put back, and written into the picture's recipe."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sdopt
from sdopt.errors import AdapterError, UsageError
from sdopt.model.lora import LoraUse
from sdopt.model.request import parse_request
from sdopt.pictures.png import read_recipe
from sdopt.pipeline import lora_stack
from sdopt.tasks.draw import draw_pictures
from sdopt.tasks.draw_files import draw_files
from sdopt.tasks.loras import LoraFinder, list_loras
from tests.opened_pipeline import opened_pipeline
from tests.slotted_bundle import add_slots_to, write_lora

torch.set_num_threads(1)
PROMPT = "a large red circle on a blue background"


@pytest.fixture(scope="module")
def work(pristine_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("requests")
    (folder / "loras" / "styles").mkdir(parents=True)
    write_lora(folder / "loras" / "ink.safetensors", pristine_bundle, 1)
    write_lora(folder / "loras" / "styles" / "Glow.safetensors", pristine_bundle, 2)
    tensors = load_file(folder / "loras" / "ink.safetensors")
    save_file(tensors, folder / "loras" / "v3-final.safetensors", {"ss_output_name": "brush"})
    (folder / "loras" / "notes.safetensors").write_bytes(b"not a file of tensors")
    add_slots_to(pristine_bundle, folder / "bundle")
    return folder


@pytest.fixture(scope="module")
def pipe(work: Path) -> Iterator[Any]:
    with opened_pipeline(work / "bundle") as opened:
        yield opened


def draw(pipe: Any, work: Path, prompt: str = PROMPT, **fields: Any) -> np.ndarray[Any, Any]:
    request = {"prompt": prompt, "steps": 3, "seed": 3, **fields}
    return np.array(sdopt.draw(pipe, request, lora_folders=[work / "loras"]))


def test_a_tag_is_what_the_list_says_and_what_diffusers_methods_do(pipe: Any, work: Path) -> None:
    plain = draw(pipe, work)
    tagged = draw(pipe, work, f"{PROMPT}<lora:ink:0.5:0.8>")
    listed = draw(pipe, work, loras=[{"source": str(work / "loras" / "ink.safetensors"), "unet": 0.8, "text": 0.5}])
    assert np.array_equal(tagged, listed)
    assert not np.array_equal(tagged, plain)
    pipe.load_lora_weights(work / "loras" / "ink.safetensors", adapter_name="mine")
    pipe.set_adapters("mine", [{"unet": 0.8, "text_encoder": 0.5}])
    assert np.array_equal(draw(pipe, work), listed)
    # What the request names acts instead of that, and that is put back afterwards.
    assert not np.array_equal(draw(pipe, work, f"{PROMPT}<lora:glow:1>"), listed)
    assert pipe.get_active_adapters() == ["mine"]
    pipe.disable_lora()
    assert np.array_equal(draw(pipe, work, f"{PROMPT}<lora:ink:0.5:0.8>"), tagged)
    assert np.array_equal(draw(pipe, work), plain), "what was disabled is enabled by another request"
    pipe.unload_lora_weights()
    assert np.array_equal(draw(pipe, work), plain)


def test_a_requests_lora_is_not_the_users(pipe: Any, work: Path) -> None:
    plain = draw(pipe, work)
    draw(pipe, work, f"{PROMPT}<lora:ink:1>")
    pipe.load_lora_weights(work / "loras" / "ink.safetensors", adapter_name="mine")
    assert pipe.get_list_adapters() == {"text_encoder": ["mine"], "unet": ["mine"]}
    pipe.delete_adapters("mine")
    assert pipe.get_active_adapters() == []
    assert np.array_equal(draw(pipe, work), plain)


def test_one_that_is_named_twice_acts_with_the_sum(pipe: Any, work: Path) -> None:
    twice = draw(pipe, work, f"<lora:ink:0.25>{PROMPT}<lora:ink:0.5>")
    assert np.array_equal(twice, draw(pipe, work, f"{PROMPT}<lora:ink:0.75>"))
    assert np.array_equal(draw(pipe, work, f"<lora:ink:0.5>{PROMPT}<lora:ink:-0.5>"), draw(pipe, work))


def test_what_requests_loaded_makes_room_and_is_loaded_again(
    pipe: Any, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = pipe.unet.loras
    pipe.load_lora_weights(work / "loras" / "ink.safetensors", adapter_name="mine")
    right = [draw(pipe, work, f"{PROMPT}<lora:{name}:1>") for name in ("ink", "glow")]
    monkeypatch.setattr(lora_stack, "REQUEST_LIMIT_BYTES", 1)
    # Both are prepared before the first is drawn: the second pushes the first out.
    requests = [{"prompt": f"{PROMPT}<lora:{name}:1>", "steps": 3, "seed": 3} for name in ("ink", "glow")]
    stack.drop([name for name, adapter in stack.adapters.items() if adapter.of_request])
    drawn = list(draw_pictures(pipe, [parse_request(each) for each in requests], loras=LoraFinder([work / "loras"])))
    assert all(np.array_equal(np.array(image), expected) for image, expected in zip(drawn, right, strict=True))
    assert [adapter.of_request for adapter in stack.adapters.values()].count(True) == 1
    # Two in one picture are both there, whatever the limit.
    assert not np.array_equal(draw(pipe, work, f"{PROMPT}<lora:ink:1><lora:glow:1>"), right[1])
    assert "mine" in stack.adapters, "what the user loaded is the user's to drop"
    pipe.unload_lora_weights()


def test_names_are_found_by_file_and_by_alias(work: Path) -> None:
    finder = LoraFinder([work / "loras"])
    assert finder.find("ink") == finder.find("INK.safetensors") == work / "loras" / "ink.safetensors"
    assert finder.find("glow").name == "Glow.safetensors"
    assert finder.find("brush").name == "v3-final.safetensors"
    with pytest.raises(AdapterError, match="inc") as refused:
        finder.find("inc")
    assert "ink" in (refused.value.hint or "")
    with pytest.raises(AdapterError) as refused:
        LoraFinder().find("ink")
    assert "--lora-folder" in (refused.value.hint or "")
    with pytest.raises(UsageError):
        LoraFinder([work / "nowhere"]).find("ink")


def test_two_files_of_one_name_are_not_guessed_between(work: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(work / "loras" / "ink.safetensors", tmp_path / folder)
    with pytest.raises(AdapterError, match="several"):
        LoraFinder([tmp_path]).find("ink")


def test_a_tag_in_the_negative_prompt_is_refused() -> None:
    request = parse_request({"prompt": PROMPT, "negative_prompt": "<lora:ink:1>"})
    with pytest.raises(UsageError, match="negative"):
        list_loras(request)


def test_a_request_says_what_a_lora_takes() -> None:
    request = parse_request({"prompt": PROMPT, "loras": [{"source": "ink", "unet": 0.5}]})
    assert request.loras == (LoraUse(source="ink", unet=0.5),)
    for bad in ({"source": ""}, {"source": "ink", "unet": float("nan")}, {"source": "ink", "weight": 1}, {}):
        with pytest.raises(UsageError):
            parse_request({"prompt": PROMPT, "loras": [bad]})


def test_a_picture_is_drawn_again_from_its_file_and_not_with_another_lora(work: Path, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    shutil.copy(work / "loras" / "ink.safetensors", folder)
    request = parse_request({"prompt": f"{PROMPT} <lora:ink:0.8>", "steps": 3, "seed": 4})
    first = draw_files(work / "bundle", tmp_path / "first.png", [request], lora_folders=[folder])[0]
    recipe = read_recipe(first.path)
    assert [(use.source, use.unet, use.text, len(use.sha256)) for use in recipe.loras] == [("ink", 0.8, 0.8, 64)]
    data = (folder / "ink.safetensors").read_bytes()
    behind = data[8 + int.from_bytes(data[:8], "little") :]
    assert recipe.loras[0].autov3 == hashlib.sha256(behind).hexdigest() != recipe.loras[0].sha256
    assert str(folder) not in json.dumps(recipe.model_dump(mode="json")), "a picture tells no folders"
    expected = {use.source: use.sha256 for use in recipe.loras}
    again = draw_files(
        work / "bundle", tmp_path / "again.png", [recipe.request], lora_folders=[folder], expected_loras=expected
    )[0]
    assert np.array_equal(np.array(Image.open(first.path)), np.array(Image.open(again.path)))
    shutil.copy(work / "loras" / "styles" / "Glow.safetensors", folder / "ink.safetensors")
    with pytest.raises(AdapterError, match="another file"):
        draw_files(
            work / "bundle", tmp_path / "other.png", [recipe.request], lora_folders=[folder], expected_loras=expected
        )
    assert not (tmp_path / "other.png").exists()


def test_a_bundle_without_slots_refuses_before_it_draws(pristine_bundle: Path, work: Path, tmp_path: Path) -> None:
    request = parse_request({"prompt": f"{PROMPT} <lora:ink:0.8>", "steps": 3})
    with pytest.raises(UsageError, match="slots") as refused:
        draw_files(pristine_bundle, tmp_path / "a.png", [request], lora_folders=[work / "loras"])
    assert "--lora-slots" in (refused.value.hint or "")
    with pytest.raises(AdapterError, match="no LoRA 'nothing'"):
        draw_files(pristine_bundle, tmp_path / "a.png", [parse_request({"prompt": "<lora:nothing>a"})])
    assert not list(tmp_path.glob("*.png"))
