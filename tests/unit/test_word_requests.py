"""Words that requests and the command name: found, let act while they are drawn, and written into the recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sdopt
from sdopt.errors import AdapterError, UsageError
from sdopt.model.lora import WordUse
from sdopt.model.request import parse_request
from sdopt.pictures.png import read_recipe
from sdopt.tasks.words import choose_words
from tests.opened_pipeline import opened_pipeline
from tests.sdopt_process import run_sdopt
from tests.word_files import make_vectors, write_a1111, write_a1111_pickle, write_diffusers

torch.set_num_threads(1)
PROMPT = "a large red circle on a blue background"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    write_a1111(folder / "BadDream.safetensors", make_vectors(3, 1))
    write_diffusers(folder / "learned.safetensors", make_vectors(1, 2), "<ink-toy>")
    write_a1111_pickle(folder / "old.pt", make_vectors(2, 3), "*")
    (folder / "notes.safetensors").write_bytes(b"not a file of tensors")
    return folder


@pytest.fixture(scope="module")
def pipe(pristine_bundle: Path) -> Iterator[Any]:
    with opened_pipeline(pristine_bundle) as opened:
        yield opened


def draw(pipe: Any, prompt: str = PROMPT, *files: Path, **fields: Any) -> np.ndarray[Any, Any]:
    uses = [{"source": str(file)} for file in files]
    return np.array(sdopt.draw(pipe, {"prompt": prompt, "steps": 2, "seed": 3, "embeddings": uses, **fields}))


def test_the_words_of_a_request_act_while_it_is_drawn(pipe: Any, work: Path) -> None:
    plain, unknown = draw(pipe), draw(pipe, "a baddream circle")
    drawn = draw(pipe, "a baddream circle", work / "BadDream.safetensors")
    assert not np.array_equal(drawn, unknown)
    assert np.array_equal(draw(pipe, "a baddream circle"), unknown), "the word is left"
    assert np.array_equal(draw(pipe, PROMPT, work / "BadDream.safetensors"), plain), "it changes prompts without it"
    pipe.load_textual_inversion(work / "BadDream.safetensors", token="BadDream")
    assert np.array_equal(draw(pipe, "a baddream circle"), drawn)
    assert np.array_equal(draw(pipe, "a baddream circle", work / "BadDream.safetensors"), drawn), "they clash"
    assert list(pipe.unet.words.words) == ["BadDream"]
    pipe.unload_textual_inversion()


def test_the_negative_prompt_may_have_words(pipe: Any, work: Path) -> None:
    drawn = draw(pipe, PROMPT, work / "BadDream.safetensors", negative_prompt="BadDream")
    assert not np.array_equal(drawn, draw(pipe, PROMPT, negative_prompt="BadDream"))


def test_a_word_is_called_as_its_file_or_as_the_file_calls_it(pipe: Any, work: Path) -> None:
    files = (work / "learned.safetensors", work / "old.pt")
    assert np.array_equal(draw(pipe, "a <ink-toy>, old", *files), draw(pipe, "a learned , old", *files))
    with pytest.raises(UsageError, match=r"'<ink-toy>', .* and none of that name is loaded"):
        draw(pipe, "a <ink-toy>")


def test_words_that_cannot_be_had_are_named(pipe: Any, work: Path, tmp_path: Path) -> None:
    other = write_a1111(tmp_path / "BadDream.safetensors", make_vectors(1, 5))
    with pytest.raises(UsageError, match="two textual inversions are called 'BadDream'"):
        draw(pipe, PROMPT, work / "BadDream.safetensors", other)
    with pytest.raises(AdapterError, match="there is no textual inversion"):
        draw(pipe, PROMPT, work / "gone.pt")
    wide = write_a1111(tmp_path / "wide.safetensors", make_vectors(1, 5, 768))
    with pytest.raises(AdapterError, match="vectors of 768 numbers, and text_encoder has 96"):
        draw(pipe, PROMPT, wide)
    assert not pipe.unet.words.words


def test_of_a_folder_only_the_words_in_the_prompts_are_taken(work: Path) -> None:
    request = parse_request({"prompt": "a <INK-toy>", "negative_prompt": "baddream"})
    chosen = choose_words([work], request)
    assert [Path(use.source).name for use in chosen] == ["BadDream.safetensors", "learned.safetensors"]
    assert choose_words([work / "old.pt"], request) == (WordUse(source=str(work / "old.pt")),)
    with pytest.raises(UsageError, match="there is no textual inversion"):
        choose_words([work / "nowhere"], request)


def test_a_picture_draws_itself_again_with_its_words(pristine_bundle: Path, work: Path, tmp_path: Path) -> None:
    place = tmp_path / "words"
    place.mkdir()
    file = write_a1111(place / "BadDream.safetensors", make_vectors(3, 1))

    def generate(*arguments: str) -> Any:
        return run_sdopt("generate", str(pristine_bundle), *arguments, cache=tmp_path / "cache")

    first, again = tmp_path / "a.png", tmp_path / "b.png"
    done = generate(
        "a (baddream:1.2) circle", "--embedding", str(place), "--steps", "2", "--seed", "3", "-o", str(first)
    )
    assert done.returncode == 0, done.stderr
    assert [len(use.sha256) for use in read_recipe(first).embeddings] == [64]
    done = generate("--from-image", str(first), "-o", str(again))
    assert done.returncode == 0, done.stderr
    with Image.open(first) as one, Image.open(again) as two:
        assert one.tobytes() == two.tobytes()
        assert json.loads(one.info["sdopt"]) == json.loads(two.info["sdopt"])
    write_a1111(file, make_vectors(3, 9))
    done = generate("--from-image", str(first), "-o", str(tmp_path / "c.png"))
    assert done.returncode != 0
    assert "is another file than the word 'BadDream'" in done.stderr
