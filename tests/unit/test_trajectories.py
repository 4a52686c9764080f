"""Trajectories: what is drawn, what is recorded of it, and what happens when drawing stops or goes wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sdopt.convert.blocks.trajectories as stage
from sdopt.convert.blocks.recording import read_calls
from sdopt.convert.blocks.trajectories import (
    Trajectories,
    choose_trajectories,
    record_in_child,
    record_trajectories,
    shift_timesteps,
)
from sdopt.disk.store import Store
from sdopt.errors import CalibrationError, RecipeError
from sdopt.model.component import ComponentName
from sdopt.model.family import Family
from sdopt.model.quantization import CalibrationSettings
from sdopt.model.shape import ShapeProfile
from sdopt.processes.call import Outcome
from sdopt.processes.channel import JsonTable
from tests.checkpoints import make_model, small_recipe, write_folder
from tests.reference_session import ReferenceBundle, make_bundle

SETTINGS = CalibrationSettings(trajectories=2, held_out=1, steps=2, guidance_scales=(4.0, 2.0))
PROMPTS = ("a large red circle on a blue background", "a small green star on a black background, left", "a blue square")
CASES = {
    "sd1-inpainting": (Family.SD1, True),
    "sdxl": (Family.SDXL, False),
    "sdxl-inpainting": (Family.SDXL, True),
    "refiner": (Family.SDXL_REFINER, False),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ReferenceBundle:
    return make_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[JsonTable]:
    """The child's work is done in this process; its arguments are noted."""
    started: list[JsonTable] = []

    def run(function: object, arguments: JsonTable) -> Outcome[JsonTable]:
        assert function is record_in_child
        started.append(arguments)
        return Outcome(record_in_child(arguments), 0, 0)

    monkeypatch.setattr(stage, "call", run)
    return started


def record(
    bundle: ReferenceBundle, cache: Path, settings: CalibrationSettings = SETTINGS, prompts: tuple[str, ...] = PROMPTS
) -> Trajectories:
    return record_trajectories(bundle.folder, bundle.manifest, Store(cache), settings, prompts, cache)


def test_calibration_and_held_out_share_neither_prompt_nor_seed() -> None:
    for count in (2, 3, 5, 40):
        settings = CalibrationSettings(trajectories=7, held_out=3)
        calibration, held_out = choose_trajectories(settings, [f"prompt {i % count}" for i in range(100)])
        assert (len(calibration), len(held_out)) == (7, 3)
        assert not {each.prompt for each in calibration} & {each.prompt for each in held_out}
        assert len({each.seed for each in (*calibration, *held_out)}) == 10
    calibration, held_out = choose_trajectories(SETTINGS, PROMPTS)
    assert [each.prompt for each in calibration] == list(PROMPTS[:2])
    assert [each.prompt for each in held_out] == [PROMPTS[2]]
    assert [each.guidance_scale for each in calibration] == [4.0, 2.0]


@pytest.mark.parametrize("prompts", [(), ("one",), ("one", "one")])
def test_one_prompt_is_refused(prompts: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError, match="two different prompts"):
        choose_trajectories(SETTINGS, prompts)


def test_more_trajectories_leave_the_others_as_they_were() -> None:
    few, held_out = choose_trajectories(SETTINGS, PROMPTS)
    many, same = choose_trajectories(SETTINGS.model_copy(update={"trajectories": 6}), PROMPTS)
    assert many[:2] == few
    assert same == held_out


def test_few_trajectories_see_every_range_of_timesteps() -> None:
    calibration, _ = choose_trajectories(CalibrationSettings(), [str(i) for i in range(9)])
    leading = torch.tensor([751, 501, 251, 1])
    seen = torch.cat([shift_timesteps(leading, 1000, each.shift) for each in calibration]).sort().values
    assert len(seen) == 16
    gaps = torch.diff(seen, prepend=torch.tensor([0]), append=torch.tensor([999]))
    assert int(gaps.max()) <= 110
    assert {int(step) // 100 for step in seen} == set(range(10))


@pytest.mark.parametrize("timesteps", [[751, 501, 251, 1], [999, 749, 499, 249], [999, 666, 333, 0]])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_shifted_timesteps_stay_timesteps(timesteps: list[int], share: float) -> None:
    shifted = shift_timesteps(torch.tensor(timesteps), 1000, share)
    assert 0 <= int(shifted.min()) <= int(shifted.max()) < 1000
    assert (torch.diff(shifted) < 0).all()


def test_every_component_is_recorded_with_its_inputs_and_outputs(
    tiny: ReferenceBundle, tmp_path: Path, children: list[JsonTable]
) -> None:
    made = record(tiny, tmp_path)
    assert (len(made.calibration), len(made.held_out)) == (2, 1)
    timesteps = []
    for path in (*made.calibration, *made.held_out):
        for name, session in tiny.sessions.items():
            calls = list(read_calls(path, name))
            of_vae = 1 if path in made.held_out else 0
            assert len(calls) == {ComponentName.UNET: 2, ComponentName.TEXT_ENCODER: 2}.get(name, of_vae)
            for call in calls:
                assert call.inputs.keys() == {tensor.name for tensor in session.spec.inputs}
                again = session.run(call.inputs)
                assert call.outputs.keys() == again.keys()
                assert all(torch.allclose(call.outputs[key], again[key], atol=1e-4) for key in again)
        timesteps.append(tuple(call.inputs["timestep"].item() for call in read_calls(path, ComponentName.UNET)))
    assert len(set(timesteps)) == 3
    (drawn,) = read_calls(made.held_out[0], ComponentName.VAE_DECODER)
    (encoded,) = read_calls(made.held_out[0], ComponentName.VAE_ENCODER)
    assert torch.allclose(encoded.inputs["sample"], drawn.outputs["sample"].clamp(-1, 1), atol=1e-5)
    assert len(children) == 1


@pytest.mark.parametrize("case", list(CASES))
def test_every_kind_of_pipeline_is_recorded(case: str, tmp_path: Path, children: list[JsonTable]) -> None:
    family, inpainting = CASES[case]
    source = write_folder(tmp_path / "source", make_model(small_recipe(family, inpainting=inpainting)))
    profile = ShapeProfile.static(height_px=32, width_px=48)
    bundle = make_bundle(tmp_path / "b", source, family=family, inpainting=inpainting, profile=profile)
    made = record(bundle, tmp_path / "cache", SETTINGS.model_copy(update={"trajectories": 1}))
    assert children
    for path in (*made.calibration, *made.held_out):
        counts = {name: len(list(read_calls(path, name))) for name in bundle.sessions}
        assert counts[ComponentName.UNET] == 2
        assert min(count for name, count in counts.items() if path in made.held_out or name.is_text_encoder) >= 1


def test_what_is_there_is_not_drawn_again(tiny: ReferenceBundle, tmp_path: Path, children: list[JsonTable]) -> None:
    first = record(tiny, tmp_path)
    second = record(tiny, tmp_path)
    assert first == second
    assert len(children) == 1
    more = record(tiny, tmp_path, SETTINGS.model_copy(update={"trajectories": 3}), (*PROMPTS[:2], "a star", PROMPTS[2]))
    assert len(children[1]["trajectories"]) == 1
    assert more.calibration[:2] == first.calibration
    assert more.held_out == first.held_out
    assert more.digest != first.digest


def test_two_runs_give_the_same_tensors_and_digest(
    tiny: ReferenceBundle, tmp_path: Path, children: list[JsonTable]
) -> None:
    one, two = (record(tiny, tmp_path / name) for name in ("a", "b"))
    assert len(children) == 2
    assert one.digest == two.digest
    for path, other in zip(one.calibration, two.calibration, strict=True):
        assert path != other
        assert path.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "change",
    [{"seed": 3}, {"steps": 3}, {"guidance_scales": (3.0,)}],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_a_trajectory_is_in_its_key(
    change: dict[str, Any], tiny: ReferenceBundle, tmp_path: Path, children: list[JsonTable]
) -> None:
    first = record(tiny, tmp_path)
    other = record(tiny, tmp_path, SETTINGS.model_copy(update=change))
    assert not {*first.calibration, *first.held_out} & {*other.calibration, *other.held_out}


def test_other_weights_are_drawn_anew(tiny: ReferenceBundle, tmp_path: Path, children: list[JsonTable]) -> None:
    first = record(tiny, tmp_path)
    source = tiny.manifest.source.model_copy(update={"digest": "cd" * 32})
    other = dataclasses.replace(tiny, manifest=tiny.manifest.model_copy(update={"source": source}))
    assert not {*first.calibration} & {*record(other, tmp_path).calibration}


def test_a_run_that_stopped_goes_on_with_the_next_trajectory(
    tiny: ReferenceBundle, tmp_path: Path, children: list[JsonTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, drawn = stage._draw, []

    def draw_some(pipeline: Any, job: Any, trajectory: stage.Trajectory, recorder: Any) -> Any:
        if len(drawn) == 1:
            raise KeyboardInterrupt
        drawn.append(trajectory)
        return draw(pipeline, job, trajectory, recorder)

    monkeypatch.setattr(stage, "_draw", draw_some)
    with pytest.raises(KeyboardInterrupt):
        record(tiny, tmp_path)
    monkeypatch.setattr(stage, "_draw", draw)
    made = record(tiny, tmp_path)
    assert [len(arguments["trajectories"]) for arguments in children] == [3, 2]
    assert made.digest == record(tiny, tmp_path / "undisturbed").digest


@pytest.fixture
def spoilt(tmp_path: Path) -> ReferenceBundle:
    """A bundle whose text encoder gives NaN."""
    bundle = make_bundle(tmp_path / "spoilt")
    path = bundle.folder / "text_encoder" / "weights.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("final_layer_norm.bias"))
    tensors[name][0] = torch.nan
    save_file(tensors, path)
    return bundle


def test_nan_is_refused_by_name(spoilt: ReferenceBundle, tmp_path: Path, children: list[JsonTable]) -> None:
    with pytest.raises(CalibrationError) as caught:
        record(spoilt, tmp_path / "cache")
    assert "text_encoder gives NaN or infinite numbers" in caught.value.message
    assert PROMPTS[0] in caught.value.message
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_step_that_overflows_is_refused_by_its_number(tmp_path: Path, children: list[JsonTable]) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    path = bundle.folder / "unet" / "weights.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"].fill_(2e38)  # what it makes of the next latents overflows
    save_file(tensors, path)
    with pytest.raises(CalibrationError, match=r"unet gives NaN or infinite numbers \(out_sample\) in step 2 of"):
        record(bundle, tmp_path / "cache", SETTINGS.model_copy(update={"guidance_scales": (1.0,)}))


def test_a_child_process_records_it(tiny: ReferenceBundle, tmp_path: Path) -> None:
    made = record(tiny, tmp_path, CalibrationSettings(trajectories=1, held_out=1, steps=1), PROMPTS[:2])
    assert len(list(read_calls(made.held_out[0], ComponentName.UNET))) == 1
