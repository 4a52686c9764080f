"""Drawing from several threads, arguments that cannot be drawn, and drawings with NaN, through `pipe(...)` itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import sdopt
from sdopt.errors import DrawingError, SdoptError, ShapeError, UsageError
from sdopt.model.component import ComponentName
from sdopt.model.request import ImageToImage, Inpaint, TextToImage, parse_request
from sdopt.pipeline.assemble import assemble_pipeline
from sdopt.tasks.draw import draw_picture
from tests.reference_session import ReferenceBundle, ReferenceSession, make_bundle

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

PROMPTS = ["a large red circle", "a small blue star", "a green square"]


class OneAtATime(ReferenceSession):
    """A session whose runtime refuses a second run meanwhile, as OpenVINO's infer request does."""

    busy = False

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.busy:
            raise RuntimeError("Infer Request is busy")
        self.busy = True
        try:
            # Another thread gets its chance.
            threading.Event().wait(0.002)
            return super().run(inputs)
        finally:
            self.busy = False


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ReferenceBundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def pipe(bundle: ReferenceBundle) -> Any:
    sessions = {
        name: OneAtATime(each.spec, each.extents, each.module, each.profiles) for name, each in bundle.sessions.items()
    }
    made = assemble_pipeline(bundle.folder, bundle.manifest, sessions)
    made.set_progress_bar_config(disable=True)
    return made


def call(pipe: Any, number: int, **kwargs: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(number)
    arguments = {"num_inference_steps": 3 + number, "generator": generator, "output_type": "np"} | kwargs
    images: np.ndarray = pipe(PROMPTS[number], **arguments).images
    return images


def in_threads(*work: Callable[[], Any]) -> list[Any]:
    """What each returned or raised; all begin together."""
    start = threading.Barrier(len(work))
    results: list[Any] = [None] * len(work)

    def run(number: int) -> None:
        start.wait()
        try:
            results[number] = work[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_calls_of_a_pipeline_queue_and_give_what_each_gives_alone(pipe: Any) -> None:
    alone = [call(pipe, number) for number in range(3)]
    together = in_threads(*(lambda number=number: call(pipe, number) for number in range(3)))
    for one, other in zip(alone, together, strict=True):
        assert isinstance(other, np.ndarray), other
        assert one.tobytes() == other.tobytes()


def test_requests_with_schedulers_of_their_own_queue(pipe: Any) -> None:
    names = ["euler_a", "dpm++2m", None]
    requests = [
        TextToImage(prompt=prompt, seed=number, steps=3 + number, scheduler=name)
        for number, (prompt, name) in enumerate(zip(PROMPTS, names, strict=True))
    ]
    own = pipe.scheduler
    alone = [draw_picture(pipe, request).tobytes() for request in requests]
    together = in_threads(
        *(lambda request=request: draw_picture(pipe, request).tobytes() for request in requests),
        lambda: call(pipe, 0).tobytes(),
    )
    assert together[:3] == alone
    assert together[3] == call(pipe, 0).tobytes()
    assert pipe.scheduler is own


def test_relatives_have_their_own_scheduler_and_two_threads_of_one_are_refused(pipe: Any) -> None:
    relative = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    assert relative.scheduler is not pipe.scheduler
    relative.scheduler.set_timesteps(4)
    in_threads(lambda: relative.scheduler.set_timesteps(9))
    sample = torch.zeros(1, 4, 16, 16)
    with pytest.raises(UsageError, match="another thread began to draw with the same scheduler"):
        relative.scheduler.step(sample, relative.scheduler.timesteps[0], sample)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0, and has to be a whole number from 1"),
        ({"num_inference_steps": -3}, "num_inference_steps is -3"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        ({"num_inference_steps": None}, "num_inference_steps is None"),
        ({"clip_skip": 99}, "clip_skip is 99, and this model's text encoder takes whole numbers from 0 to"),
        ({"clip_skip": -1}, "clip_skip is -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": "7"}, "guidance_scale is '7'"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": None}, "cannot draw this: Provide either `prompt` or `prompt_embeds`"),
        ({"prompt": 3}, "prompt is 3, and has to be a text"),
        ({"negative_prompt": ["a", 3]}, "negative_prompt is 3, and has to be a text"),
        ({"negative_prompt": ["a", "b"]}, "cannot draw this"),
        ({"width": 65}, "width 65|65x64 px"),
        ({"width": "64"}, "width is '64'"),
        ({"height": 128}, "a picture of 64x128 px"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "a picture of 32x32 px"),
    ],
)
def test_arguments_that_cannot_be_drawn_are_sentences(pipe: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipe(**{"prompt": "x", "num_inference_steps": 2, "output_type": "np"} | arguments)


def test_an_error_of_the_users_own_callback_stays_what_it_is(pipe: Any) -> None:
    def stop(*_: object) -> dict[str, Any]:
        raise ValueError("enough")

    with pytest.raises(ValueError, match=r"^enough$"):
        pipe("x", num_inference_steps=2, callback_on_step_end=stop)
    assert call(pipe, 0).shape == (1, 64, 64, 3), "the turn was given back"


def spoil(session: ReferenceSession, value: float) -> None:
    """The runtime computes one element wrongly."""
    run = session.run

    def spoiled(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs = run(inputs)
        for tensor in outputs.values():
            tensor.flatten()[-1] = value
        return outputs

    session.run = spoiled  # type: ignore[method-assign]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["unet", "vae"])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_nan_in_a_network_is_an_error_in_every_form_of_output(
    pipe: Any, value: float, part: str, output_type: str
) -> None:
    spoil(pipe.unet.session if part == "unet" else pipe.vae.decoder, value)
    with pytest.raises(DrawingError, match=r"the unet predicted|the vae decoder gave"):
        call(pipe, 0, num_inference_steps=1, output_type=output_type)


@pytest.mark.parametrize("output_type", ["latent", "np"])
def test_nan_of_the_last_step_is_an_error(pipe: Any, output_type: str) -> None:
    step = pipe.scheduler.step

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        return tuple(value * float("nan") for value in step(*args, **kwargs))

    pipe.scheduler.step = spoiled
    with pytest.raises(DrawingError, match=r"the drawing gave NaN|the scheduler gave latents with NaN"):
        call(pipe, 0, num_inference_steps=1, output_type=output_type)
    with pytest.raises(DrawingError):
        pipe("x", num_inference_steps=1, output_type=output_type, return_dict=False)


def test_fidelity_sees_nan_for_infinity(pipe: Any) -> None:
    for part in (pipe.unet, pipe.vae):
        part.refuses_nonfinite = False
    spoil(pipe.vae.decoder, float("inf"))
    drawn = call(pipe, 0, num_inference_steps=1)
    assert np.isnan(drawn[0, -1, -1, -1])
    assert np.isfinite(drawn[0, 0]).all()


def test_pictures_to_start_from(pipe: Any, tmp_path: Any) -> None:
    start, mask = tmp_path / "start.png", tmp_path / "mask.png"
    Image.new("RGB", (64, 64), "blue").save(start)
    half = Image.new("L", (64, 64), 0)
    half.paste(255, (32, 0, 64, 64))
    half.save(mask)
    request = parse_request({"task": "image_to_image", "prompt": "a red circle", "image": str(start), "strength": 0.5})
    assert isinstance(request, ImageToImage)
    plain = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    plain.set_progress_bar_config(disable=True)
    expected = plain(
        "a red circle", image=Image.open(start), strength=0.5, num_inference_steps=20, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    drawn = np.asarray(sdopt.draw(pipe, request))
    np.testing.assert_array_equal(drawn, (expected[0] * 255).round().astype(np.uint8))
    table = {"task": "inpaint", "prompt": "a red circle", "image": str(start), "mask": str(mask), "steps": 4}
    assert isinstance(parse_request(table), Inpaint)
    assert sdopt.draw(pipe, table).size == (64, 64)


@pytest.mark.parametrize(
    ("size", "kind", "message"),
    [
        ((128, 64), ShapeError, "a picture of 128x64 px"),
        (None, UsageError, "cannot read the picture"),
        ((0, 0), UsageError, "not a picture that can be read"),
    ],
)
def test_pictures_that_cannot_be_started_from(
    pipe: Any, tmp_path: Any, size: tuple[int, int] | None, kind: type[SdoptError], message: str
) -> None:
    path = tmp_path / "start.png"
    if size == (0, 0):
        path.write_bytes(b"\x89PNG\r\n\x1a\nnot one")
    elif size is not None:
        Image.new("RGB", size).save(path)
    with pytest.raises(kind, match=message):
        sdopt.draw(pipe, {"task": "image_to_image", "prompt": "x", "image": str(path)})


def test_brackets_weigh_and_a_backslash_makes_them_words(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[torch.Tensor] = []
    encode = pipe.text_encoder.forward

    def remember(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(input_ids)
        return encode(input_ids, *args, **kwargs)

    pipe.text_encoder.forward = remember
    for prompt in (r"a cat \(2019\)", "a cat (2019)", "a cat 2019"):
        sdopt.draw(pipe, {"prompt": prompt, "steps": 1})
    literal, weighed, words = (ids[:1] for ids in seen[::2])
    assert pipe.tokenizer.decode(literal[0], skip_special_tokens=True) == "a cat ( 2 0 1 9 )"
    assert torch.equal(weighed, words)
    assert not caplog.records


def test_a_session_finishes_its_run_before_it_closes(bundle: ReferenceBundle) -> None:
    from sdopt.backends.engine_session import EngineSession
    from sdopt.backends.protocol import ComponentFiles

    order: list[str] = []
    inside, closing = threading.Event(), threading.Event()

    class Slow(EngineSession):
        def _compute(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            inside.set()
            closing.wait(5)
            order.append("computed" if self.engine is not None else "computed without an engine")
            return {}

    session = bundle.sessions[ComponentName.VAE_DECODER]
    component: Any = ComponentFiles(
        folder=bundle.folder / "vae_decoder", spec=session.spec, config={}, family=bundle.manifest.family,
        extents=session.extents,
    )  # fmt: skip
    slow = Slow(component, object())

    def close() -> None:
        inside.wait(5)
        threading.Timer(0.05, closing.set).start()
        slow.close()
        order.append("closed")

    in_threads(lambda: slow.run({"latent_sample": torch.zeros(1, 4, 16, 16)}), close)
    assert order == ["computed", "closed"]
