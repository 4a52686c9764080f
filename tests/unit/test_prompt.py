"""Long prompts: cut into chunks, none of whose tokens is lost or moved, and one chunk is what it always was."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPTokenizer

from sdopt.checkpoint.tokenizer import END_OF_TEXT, EXCLAMATION, write_clip_tokenizer
from sdopt.disk.files import write_file
from sdopt.model.family import Family
from sdopt.model.request import parse_request
from sdopt.model.shape import Extent, ShapeProfile
from sdopt.pipeline.assemble import assemble_pipeline
from sdopt.pipeline.prompt import PromptTokenizer, load_tokenizer
from sdopt.pipeline.prompt_reading import PromptText
from sdopt.tasks.draw import draw_picture, draw_pictures
from tests.checkpoints import make_model, small_recipe, write_folder
from tests.reference_session import ReferenceBundle, make_bundle

# Schedulers of diffusers 0.42 call numpy on tensors, whose torch 2.13 speaks numpy 1's protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

WORDS = 75
LONG = ", ".join(f"a castle of {number} towers by the sea" for number in range(17))
LONGER = ", ".join(f"fog over {number} hills" for number in range(40))
SIDE_PX = 32

words = st.lists(
    st.one_of(
        st.sampled_from(["castle", "sea,", "(a", "fox:1.2)", "don't", "42", "naïve", "日本", "<|endoftext|>", "  "]),
        st.text(max_size=8),
    ),
    max_size=130,
).map(" ".join)
paddings = st.sampled_from([END_OF_TEXT, EXCLAMATION])
_loaded: dict[tuple[str, int], Any] = {}


def tokenizer_of(padding: str, most_chunks: int) -> Any:
    """A tokenizer of this package, or with 0 chunks transformers' own."""
    key = (padding, most_chunks)
    if key not in _loaded:
        folder = write_clip_tokenizer(padding)
        _loaded[key] = load_tokenizer(folder, most_chunks) if most_chunks else CLIPTokenizer.from_pretrained(folder)
    return _loaded[key]


def pad(tokenizer: Any, texts: list[str] | str, length: int | None = None) -> Any:
    return tokenizer(
        texts, padding="max_length", max_length=length or tokenizer.model_max_length, truncation=True,
        return_tensors="pt",
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(words, min_size=1, max_size=3), padding=paddings)
def test_one_chunk_is_what_transformers_gives(texts: list[str], padding: str) -> None:
    ours, theirs = pad(tokenizer_of(padding, 1), texts), pad(tokenizer_of(padding, 0), texts)
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert torch.equal(ours.attention_mask, theirs.attention_mask)
    longer = tokenizer_of(padding, 3)
    if all(len(ids) <= WORDS + 2 for ids in tokenizer_of(padding, 0)(texts).input_ids):
        assert torch.equal(pad(longer, texts).input_ids, theirs.input_ids)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(words, min_size=1, max_size=3), padding=paddings, most=st.integers(1, 3))
def test_every_token_is_kept_in_order_up_to_the_most(texts: list[str], padding: str, most: int) -> None:
    tokenizer = tokenizer_of(padding, most)
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    plain = [ids[1:-1] for ids in tokenizer_of(padding, 0)(texts).input_ids]
    encoded = pad(tokenizer, texts)
    count = tokenizer.count_chunks([PromptText.of_words(text) for text in texts])
    assert count <= most
    assert count >= min(most, max(1, *(-(-len(ids) // WORDS) for ids in plain)))
    assert encoded.input_ids.shape == (len(texts), 77 * count)
    rows = zip(plain, encoded.input_ids.tolist(), encoded.attention_mask.tolist(), strict=True)
    for ids, row, mask in rows:
        kept: list[int] = []
        for start in range(0, len(row), 77):
            used = sum(mask[start : start + 77])
            assert mask[start : start + 77] == [1] * used + [0] * (77 - used)
            assert row[start] == tokenizer.bos_token_id
            assert row[start + used - 1] == tokenizer.eos_token_id
            assert set(row[start + used : start + 77]) <= {tokenizer.pad_token_id}
            kept += row[start + 1 : start + used - 1]
            # Only a comma ends a chunk before it is full, and that not by more than 20 tokens.
            assert used == 77 or len(kept) == len(ids) or (used >= 57 and kept[-1] == comma)
        assert kept == ids[: len(kept)]
        assert len(kept) == len(ids) or sum(mask[-77:]) == 77
    same = tokenizer(texts, padding="longest", return_tensors="pt")
    assert torch.equal(same.input_ids, encoded.input_ids)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_a_negative_prompt_is_as_long_as_its_prompt(chunks: int) -> None:
    tokenizer = tokenizer_of(END_OF_TEXT, 3)
    for text in ("", "fog", LONG, LONGER):
        assert pad(tokenizer, text, 77 * chunks).input_ids.shape == (1, 77 * chunks)
    plain = tokenizer(LONG).input_ids
    assert plain == tokenizer_of(END_OF_TEXT, 0)(LONG).input_ids
    assert tokenizer.decode(plain).startswith("<|startoftext|>a castle of 0 towers")


def test_what_is_cut_is_said_once_with_the_way_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sdopt"):
        for most in (1, 2, 3):
            pad(tokenizer_of(EXCLAMATION, most), ["short", LONG])
    one, two = (record.getMessage() for record in caplog.records)
    count = len(tokenizer_of(EXCLAMATION, 0)(LONG).input_ids) - 2
    assert 150 < count < 225
    assert one.startswith(f"a prompt of {count} tokens is cut after 75, without '")
    # The second chunk begins behind a comma, and the last that there may be is full.
    assert two.startswith(f"a prompt of {count} tokens is cut after 147, without '")
    for text in (one, two):
        assert "sea'; more fit into a bundle of sdopt convert --again " in text
        assert " --tokens 231 -o " in text
        assert "castle of 1 6 towers" in text
        assert "castle of 0 towers" not in text
    caplog.clear()
    # As diffusers does before it encodes: transformers' own warning is wrong here.
    assert tokenizer_of(EXCLAMATION, 1).tokenize(LONG)
    assert not caplog.records
    pad(tokenizer_of(EXCLAMATION, 8), LONG * 5)
    assert "--tokens" not in caplog.text
    caplog.clear()
    pad(tokenizer_of(EXCLAMATION, 1), "sea " * 80)
    assert "--tokens 154 -o " in caplog.text


def make(folder: Path, source: Path, family: Family, tokens: int) -> ReferenceBundle:
    side = Extent.static(SIDE_PX)
    profile = ShapeProfile(Extent.static(1), side, side, Extent(77, 77, tokens))
    return make_bundle(folder, source, family=family, profile=profile)


def open_pipe(bundle: ReferenceBundle) -> Any:
    pipe = assemble_pipeline(bundle.folder, bundle.manifest, bundle.sessions)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=[Family.SD1, Family.SD2, Family.SDXL, Family.SDXL_REFINER])
def family(request: pytest.FixtureRequest) -> Family:
    kind: Family = request.param
    return kind


@pytest.fixture(scope="module")
def source(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp(family) / "source", make_model(small_recipe(family)))


@pytest.fixture(scope="module")
def pipe(source: Path, family: Family) -> Any:
    return open_pipe(make(source.parent / "long", source, family, 231))


def encode(pipe: Any, prompt: str | list[str] | None, **kwargs: Any) -> Any:
    common = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    return pipe.encode_prompt(prompt, **common | kwargs)


def encode_by_hand(pipe: Any, text: str, chunks: int, skip: int | None = None) -> torch.Tensor:
    """Each chunk through transformers' own networks."""
    parts = []
    for place in ("", "_2"):
        tokenizer, encoder = getattr(pipe, f"tokenizer{place}", None), getattr(pipe, f"text_encoder{place}", None)
        if tokenizer is None:
            continue
        network = encoder.session.module.network
        rows = pad(tokenizer, text, 77 * chunks).input_ids.split(77, dim=1)
        with torch.no_grad():
            outputs = [network(row, output_hidden_states=True) for row in rows]
        if isinstance(pipe, diffusers.StableDiffusionXLPipeline | diffusers.StableDiffusionXLImg2ImgPipeline):
            parts.append(torch.cat([output.hidden_states[-2 - (skip or 0)] for output in outputs], dim=1))
        elif skip is None:
            parts.append(torch.cat([output.last_hidden_state for output in outputs], dim=1))
        else:
            states = [network.final_layer_norm(output.hidden_states[-1 - skip]) for output in outputs]
            parts.append(torch.cat(states, dim=1))
    return torch.cat(parts, dim=2)


def test_long_prompts_are_encoded_chunk_by_chunk(pipe: Any, family: Family) -> None:
    short, three = "a castle by the sea", LONG
    for prompt, negative, chunks in ((short, "fog", 1), (three, "fog", 3), (short, LONGER[:400], 2), (three, "", 3)):
        given = encode(pipe, prompt, negative_prompt=negative)
        torch.testing.assert_close(given[0], encode_by_hand(pipe, prompt, chunks))
        torch.testing.assert_close(given[1], encode_by_hand(pipe, negative, chunks))
        if family.is_xl:
            encoder = pipe.text_encoder_2
            first = pad(pipe.tokenizer_2, prompt, 77 * chunks).input_ids[:, :77]
            torch.testing.assert_close(given[2], encoder(first).text_embeds)


def test_clip_skip_of_a_long_prompt(pipe: Any) -> None:
    for skip in (0, 1):
        given = encode(pipe, LONG, clip_skip=skip)[0]
        torch.testing.assert_close(given, encode_by_hand(pipe, LONG, 3, skip), atol=1e-4, rtol=1e-4)


def test_a_short_prompt_is_bit_identical_to_that_of_a_bundle_of_77_tokens(
    source: Path, family: Family, pipe: Any
) -> None:
    short = open_pipe(make(source.parent / "short", source, family, 77))
    assert short.tokenizer_2.model_max_length == 77 if family.is_xl else short.tokenizer.model_max_length == 77
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", "negative_prompt": "fog"}
    if family is Family.SDXL_REFINER:
        arguments |= {"image": Image.new("RGB", (SIDE_PX, SIDE_PX), "blue"), "strength": 1.0}
    drawn = [each("a castle", generator=torch.Generator().manual_seed(0), **arguments).images for each in (short, pipe)]
    assert np.array_equal(*drawn)


def test_prompts_of_one_call_have_one_length(pipe: Any, family: Family) -> None:
    given = encode(pipe, ["a castle", LONG], num_images_per_prompt=2, negative_prompt=["", "fog"])
    assert given[0].shape[:2] == given[1].shape[:2] == (4, 231)
    made = encode(pipe, "a castle", negative_prompt_embeds=given[1][:1], **_pooled(family, given, 3))
    assert made[0].shape[1] == 231
    made = encode(pipe, None, prompt_embeds=given[0][:1], negative_prompt="fog", **_pooled(family, given, 2))
    assert made[1].shape[1] == 231
    if family is Family.SDXL:
        given = encode(pipe, "a castle", prompt_2=LONG)
        assert given[0].shape[1] == given[1].shape[1] == 231


def _pooled(family: Family, given: Any, place: int) -> dict[str, Any]:
    names = {2: "pooled_prompt_embeds", 3: "negative_pooled_prompt_embeds"}
    return {names[place]: given[place][:1]} if family.is_xl else {}


def test_it_draws_and_relatives_draw_too(pipe: Any, family: Family, caplog: pytest.LogCaptureFixture) -> None:
    picture = Image.new("RGB", (SIDE_PX, SIDE_PX), "blue")
    steps: list[int] = []

    def on_step_end(running: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return tensors

    arguments: dict[str, Any] = {"num_inference_steps": 2, "callback_on_step_end": on_step_end}
    image: dict[str, Any] = {"image": picture, "strength": 1.0}
    own = image if family is Family.SDXL_REFINER else {}
    assert pipe(LONG, **own, **arguments).images[0].size == (SIDE_PX, SIDE_PX)
    assert steps == [0, 1]
    relative = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    relative.set_progress_bar_config(disable=True)
    assert relative(LONG, negative_prompt="fog", **image, **arguments).images[0].size == (SIDE_PX, SIDE_PX)
    caplog.clear()
    relative("a castle", negative_prompt=LONG, **image, **arguments)
    # Only the class of `sdopt.load` looks at both before it encodes one.
    assert ("is cut after 75" in caplog.text) == (type(relative) is not type(pipe))


def test_generate_draws_long_prompts_as_if_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_folder(tmp_path / "source", make_model(small_recipe(Family.SD1)))
    side = Extent.static(SIDE_PX)
    profile = ShapeProfile(Extent.static(3), side, side, Extent(77, 77, 154))
    pipe = open_pipe(make_bundle(tmp_path / "b", source, profile=profile))
    texts = ["a castle", LONGER[:300], "the sea", "a fox " * 100]
    requests = [parse_request({"prompt": text, "steps": 2, "seed": 3}) for text in texts]
    together = list(draw_pictures(pipe, requests))
    assert "a prompt of 200 tokens is cut after 150" in caplog.text
    for request, image in zip(requests, together, strict=True):
        alone = np.asarray(draw_picture(pipe, request)).astype(int)
        assert np.abs(np.asarray(image) - alone).max() <= 1


def test_a_tokenizer_whose_config_names_no_length_is_read(tmp_path: Path) -> None:
    for file in write_clip_tokenizer(END_OF_TEXT).iterdir():
        if file.name != "tokenizer_config.json":
            write_file(tmp_path / file.name, file.read_bytes())
    tokenizer = load_tokenizer(tmp_path, 2)
    assert isinstance(tokenizer, PromptTokenizer)
    assert tokenizer.model_max_length == 152
    assert pad(tokenizer, "a castle").input_ids.shape == (1, 77)
