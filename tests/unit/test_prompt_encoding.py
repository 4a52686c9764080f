"""What the UNet is given for prompts with syntax, against arithmetic on the outputs of transformers' own networks."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given as given_words
from hypothesis import settings
from hypothesis import strategies as st
from PIL import Image

import sdopt
from sdopt.errors import UsageError
from sdopt.model.family import Family
from sdopt.model.shape import Extent, ShapeProfile
from sdopt.pipeline.assemble import assemble_pipeline
from tests.checkpoints import make_model, small_recipe, write_folder
from tests.reference_session import ReferenceBundle, make_bundle

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

SIDE_PX = 32
FAMILIES = [Family.SD1, Family.SD2, Family.SDXL]
Words = Sequence[tuple[str, float]]


def open_pipe(bundle: ReferenceBundle) -> Any:
    pipe = assemble_pipeline(bundle.folder, bundle.manifest, bundle.sessions)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(folder: Path, family: Family, *, batch: int = 2) -> Any:
    model = make_model(small_recipe(family))
    for state in model.text.values():
        for name in state:
            # A norm that has just been made leaves states whose mean is 0, which no trained one does.
            if "final_layer_norm.bias" in name:
                state[name] = torch.linspace(-0.5, 1.5, state[name].shape[0])
    source = write_folder(folder / "source", model)
    side = Extent.static(SIDE_PX)
    profile = ShapeProfile(Extent(1, 1, batch), side, side, Extent(77, 77, 231))
    return open_pipe(make_bundle(folder / "bundle", source, family=family, profile=profile))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    kind: Family = request.param
    return kind


@pytest.fixture(scope="module")
def pipe(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The trained model that comes with the package, whose prompts are of one chunk."""
    return open_pipe(make_bundle(tmp_path_factory.mktemp("tiny") / "shapes"))


def expect(pipe: Any, chunks: Sequence[Words], skip: int | None = None) -> torch.Tensor:
    """By hand: tokens of each chunk's words, through the network, times weights, times old mean over new mean."""
    sides = []
    for place in ("", "_2"):
        tokenizer, encoder = getattr(pipe, f"tokenizer{place}", None), getattr(pipe, f"text_encoder{place}", None)
        if encoder is None:
            continue
        parts = []
        for words in chunks:
            ids, weights = [tokenizer.bos_token_id], [1.0]
            for text, weight in words:
                found = tokenizer(text).input_ids[1:-1]
                ids += found
                weights += [weight] * len(found)
            padding = 77 - len(ids) - 1
            ids += [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * padding
            weights += [1.0] * (padding + 1)
            network = encoder.session.module.network
            with torch.no_grad():
                output = network(torch.tensor([ids]), output_hidden_states=True)
                if hasattr(pipe, "tokenizer_2"):
                    state = output.hidden_states[-2 - (skip or 0)][0]
                elif skip is None:
                    state = output.last_hidden_state[0]
                else:
                    state = network.final_layer_norm(output.hidden_states[-1 - skip])[0]
            old_mean = state.sum() / state.numel()
            for position, weight in enumerate(weights):
                state[position] *= weight
            parts.append(state * (old_mean / (state.sum() / state.numel())))
        sides.append(torch.cat(parts))
    return torch.cat(sides, dim=1)


def encode(pipe: Any, prompt: Any, **kwargs: Any) -> Any:
    common = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    return pipe.encode_prompt(prompt, **common | kwargs)


def near(given: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(given, expected, atol=2e-4, rtol=2e-4)


CASES: dict[str, list[Words]] = {
    "a (red:1.4) circle": [[("a", 1), ("red", 1.4), ("circle", 1)]],
    "a ((red)) [blue] circle": [[("a", 1), ("red", 1.1 * 1.1), ("blue", 1 / 1.1), ("circle", 1)]],
    r"a \(red\) (circle:0.3)": [[("a ( red )", 1), ("circle", 0.3)]],
    "a (red:-1) (circle:0)": [[("a", 1), ("red", -1), ("circle", 0)]],
    "a (red:1.4) BREAK circle": [[("a", 1), ("red", 1.4)], [("circle", 1)]],
    "red " * 60 + ", blue (circle " + "green " * 20 + ":1.2)": [
        [("red " * 60 + ",", 1)], [("blue", 1), ("circle " + "green " * 20, 1.2)]
    ],
}  # fmt: skip


@pytest.mark.parametrize("prompt", CASES)
def test_embeddings_are_those_of_a1111s_rules(pipe: Any, family: Family, prompt: str) -> None:
    chunks = CASES[prompt]
    made = encode(pipe, prompt, negative_prompt=prompt)
    near(made[0][0], expect(pipe, chunks))
    near(made[1][0], expect(pipe, chunks))
    near(encode(pipe, prompt, clip_skip=1)[0][0], expect(pipe, chunks, 1))
    if family.is_xl:
        words = " ".join(text for text, _ in chunks[0])
        ids = pipe.tokenizer_2(words, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        torch.testing.assert_close(made[2], pipe.text_encoder_2(ids.input_ids).text_embeds)


def test_the_trained_model_too_and_only_where_a_word_is_weighed(tiny: Any) -> None:
    words = [("a large", 1.0), ("red", 1.5), ("circle", 1.0)]
    made = encode(tiny, ["a large (red:1.5) circle", "a large red circle"], negative_prompt=["(blue)", ""])
    near(made[0][0], expect(tiny, [words]))
    near(made[1][0], expect(tiny, [[("blue", 1.1)]]))
    plain = encode(tiny, ["a large red circle"] * 2, negative_prompt=["", ""])
    assert torch.equal(made[0][1], plain[0][1])
    assert not torch.allclose(made[0][0], plain[0][0], atol=1e-2)


def test_the_prompt_the_negative_and_the_second_prompt_have_one_length(pipe: Any, family: Family) -> None:
    made = encode(pipe, "a (b:1.2)", negative_prompt="c BREAK d BREAK (e)")
    near(made[0][0], expect(pipe, [[("a", 1), ("b", 1.2)], [], []]))
    near(made[1][0], expect(pipe, [[("c", 1)], [("d", 1)], [("e", 1.1)]]))
    assert encode(pipe, "", negative_prompt="c BREAK d")[0].shape[1] == 154
    two = encode(pipe, ["a", "(b)"], negative_prompt=["c", "d"], num_images_per_prompt=2)[0]
    near(two[3], expect(pipe, [[("b", 1.1)]]))
    near(two[1], expect(pipe, [[("a", 1)]]))
    if family.is_xl:
        both = encode(pipe, "a", prompt_2="(b:1.3)", negative_prompt="", negative_prompt_2="(c)")
        width = pipe.text_encoder.config.hidden_size
        for given, texts in ((both[0], ([("a", 1)], [("b", 1.3)])), (both[1], ([], [("c", 1.1)]))):
            near(given[0, :, :width], expect(pipe, [texts[0]])[:, :width])
            near(given[0, :, width:], expect(pipe, [texts[1]])[:, width:])


@settings(max_examples=30, deadline=None)
@given_words(words=st.lists(st.sampled_from(["red", "a", "sea,", "(x:1)", "naïve", "海"]), max_size=90).map(" ".join))
def test_without_weights_it_is_bit_for_bit_what_diffusers_makes(tiny: Any, words: str) -> None:
    made = encode(tiny, words, negative_prompt="")
    text = words.replace("(x:1)", "x")
    plain = diffusers.StableDiffusionPipeline.encode_prompt(tiny, text, torch.device("cpu"), 1, True)
    assert torch.equal(made[0], plain[0])
    assert torch.equal(made[1], plain[1])


class Watch:
    """What each turn of the loop gives the UNet: prompt embeddings without and with the prompt."""

    def __init__(self, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[torch.Tensor] = []
        self.pooled: list[torch.Tensor] = []
        forward = pipe.unet.forward

        def remember(sample: Any, timestep: Any, encoder_hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            self.seen.append(encoder_hidden_states)
            self.pooled += [(kwargs.get("added_cond_kwargs") or {}).get("text_embeds")]
            return forward(sample, timestep, encoder_hidden_states, **kwargs)

        monkeypatch.setattr(pipe.unet, "forward", remember)


SCHEDULE = "a [red:(blue:1.3):2] [x|y]"
# What is said at each of five steps.
STEPS: list[Words] = [
    [("a red x", 1)],
    [("a red y", 1)],
    [("a", 1), ("blue", 1.3), ("x", 1)],
    [("a", 1), ("blue", 1.3), ("y", 1)],
    [("a", 1), ("blue", 1.3), ("x", 1)],
]


@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_each_step_sees_its_own_words(pipe: Any, family: Family, guidance: float, monkeypatch: Any) -> None:
    watch = Watch(pipe, monkeypatch)
    own: list[int] = []

    def on_step_end(running: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        own.append(step)
        assert list(tensors) == ["latents"]
        return tensors

    pipe(["a cat", SCHEDULE], negative_prompt=["fog", "[a:b:0.4]"], num_inference_steps=5, guidance_scale=guidance,
         callback_on_step_end=on_step_end, output_type="latent")  # fmt: skip
    assert own == list(range(5))
    assert len(watch.seen) == 5
    for step, (given, pooled) in enumerate(zip(watch.seen, watch.pooled, strict=True)):
        expected = [expect(pipe, [[("a cat", 1)]]), expect(pipe, [STEPS[step]])]
        if guidance > 1:
            expected = [expect(pipe, [[("fog", 1)]]), expect(pipe, [[("a" if step < 2 else "b", 1)]]), *expected]
        near(given, torch.stack(expected))
        if family.is_xl:
            words = " ".join(text for text, _ in STEPS[step])
            near(pooled[-1:], encode(pipe, words)[2])


def test_a_sampler_of_second_order_takes_two_turns_for_a_step(pipe: Any, monkeypatch: Any) -> None:
    request = {"prompt": SCHEDULE, "steps": 5, "scheduler": "heun", "guidance_scale": 1.0}
    watch = Watch(pipe, monkeypatch)
    sdopt.draw(pipe, request)
    assert len(watch.seen) == 9
    for turn, given in enumerate(watch.seen):
        near(given[0], expect(pipe, [STEPS[turn // 2]]))
    watch.seen.clear()
    sdopt.draw(pipe, request | {"scheduler": "pndm"})
    assert len(watch.seen) == 6
    for turn, given in enumerate(watch.seen):
        near(given[0], expect(pipe, [STEPS[max(0, turn - 1)]]))


@pytest.mark.parametrize("task", ["image_to_image", "inpaint"])
def test_other_tasks_see_their_words_too(pipe: Any, task: str, tmp_path: Path, monkeypatch: Any) -> None:
    Image.new("RGB", (SIDE_PX, SIDE_PX), "blue").save(tmp_path / "start.png")
    Image.new("L", (SIDE_PX, SIDE_PX), 255).save(tmp_path / "mask.png")
    watch = Watch(pipe, monkeypatch)
    table = {"task": task, "prompt": SCHEDULE, "steps": 5, "strength": 0.8, "image": str(tmp_path / "start.png")}
    sdopt.draw(pipe, table | ({"mask": str(tmp_path / "mask.png")} if task == "inpaint" else {}))
    # The first four of five steps: `when` counts steps that are done, as in A1111.
    assert len(watch.seen) == 4
    for step, given in enumerate(watch.seen):
        near(given[1], expect(pipe, [STEPS[step]]))


def test_a_callback_that_turns_guidance_off_is_followed(tiny: Any, monkeypatch: Any) -> None:
    watch = Watch(tiny, monkeypatch)
    cutoff = diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    tiny(SCHEDULE, num_inference_steps=5, callback_on_step_end=cutoff, output_type="latent")
    assert [len(given) for given in watch.seen] == [2, 2, 1, 1, 1]
    near(watch.seen[4][0], expect(tiny, [STEPS[4]]))


def test_requests_of_a_batch_and_of_threads_draw_what_each_draws_alone(tmp_path: Path) -> None:
    pipe = make(tmp_path, Family.SD1, batch=3)
    prompts = ["a [red:blue:0.5] cat", "a (red:1.4) cat", "a cat", "a [red|blue] cat BREAK fog", "a cat, fog"]
    requests = [{"prompt": text, "steps": 3, "seed": 5} for text in prompts]
    alone = [np.asarray(sdopt.draw(pipe, request)).astype(int) for request in requests]
    from sdopt.model.request import parse_request
    from sdopt.tasks.draw import draw_pictures

    together = list(draw_pictures(pipe, [parse_request(request) for request in requests]))
    drawn: list[Any] = [None] * len(requests)

    def draw(number: int) -> None:
        drawn[number] = sdopt.draw(pipe, requests[number])

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, batch, other in zip(alone, together, drawn, strict=True):
        assert np.abs(np.asarray(batch) - one).max() <= 1
        np.testing.assert_array_equal(np.asarray(other), one)
    assert len({image.tobytes() for image in alone}) == len(prompts)


def test_a_direct_call_and_a_request_draw_the_same(tiny: Any) -> None:
    for prompt in ("a (red:1.3) [circle|star]", "a red circle"):
        called = tiny(prompt, num_inference_steps=4, generator=torch.Generator().manual_seed(3)).images[0]
        drawn = sdopt.draw(tiny, {"prompt": prompt, "steps": 4, "seed": 3, "guidance_scale": 7.5})
        assert called.tobytes() == drawn.tobytes()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a cat AND a dog", "several prompts that are drawn apart"),
        ("a cat <lora:ink:0.8>", "LoRA"),
        ("a (cat:1.2.3)", "'1.2.3', which is not a number"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_any_network_runs(tiny: Any, prompt: str, message: str) -> None:
    runs = len(tiny.text_encoder.session.runs)
    for arguments in ({"prompt": prompt}, {"prompt": "x", "negative_prompt": prompt}):
        with pytest.raises(UsageError, match=message):
            tiny(**arguments, num_inference_steps=1)
        with pytest.raises(UsageError, match=message):
            sdopt.draw(tiny, {**arguments, "steps": 1})
    assert len(tiny.text_encoder.session.runs) == runs


def test_what_only_a_request_refuses_is_logged_by_a_call(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    tiny("a {red|blue} logged", num_inference_steps=1, output_type="latent")
    assert "'{red|blue}', which other programs read as a choice of dynamic prompts" in caplog.text
    with pytest.raises(UsageError, match="a choice of dynamic prompts"):
        sdopt.draw(tiny, {"prompt": "a {red|blue} logged", "steps": 1})
    with pytest.raises(UsageError, match="only a whole drawing has steps"):
        encode(tiny, "a [red:blue:9]")


def test_pipelines_of_diffusers_itself_say_that_they_draw_words(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    relative = diffusers.AutoPipelineForImage2Image.from_pipe(tiny)
    relative.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (64, 64), "blue")
    relative("a cat, happy :)", image=picture, num_inference_steps=2, output_type="latent")
    assert not caplog.records
    relative("a (cat:1.3)", image=picture, num_inference_steps=2, output_type="latent")
    assert "'a (cat:1.3)' has weights or other syntax, which this pipeline draws as plain words" in caplog.text


def test_a_word_can_stand_for_ids_beyond_the_vocabulary(tiny: Any, monkeypatch: Any) -> None:
    tokenizer = tiny.tokenizer
    name = tuple(tokenizer("easynegative").input_ids[1:-1])
    assert len(name) > 1
    more = tuple(range(len(tokenizer), len(tokenizer) + 3))
    monkeypatch.setattr(tokenizer, "extra_words", {name: more})
    seen: list[torch.Tensor] = []
    forward = tiny.text_encoder.forward

    def remember(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(input_ids)
        return forward(input_ids.clamp(max=more[0] - 1), *args, **kwargs)

    monkeypatch.setattr(tiny.text_encoder, "forward", remember)
    encode(tiny, "a (easynegative:1.2) cat")
    cat, a = (tokenizer(word).input_ids[1:-1] for word in ("cat", "a"))
    assert seen[0][0, : len(cat) + 6].tolist() == [tokenizer.bos_token_id, *a, *more, *cat, tokenizer.eos_token_id]
