"""Drawings without guidance run the UNet on the pictures alone: half the work, and the same picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdopt.backends.component_files import component_files
from sdopt.backends.open import open_session
from sdopt.bundle.manifest import read_manifest
from sdopt.convert.plans.wanted import input_shapes
from sdopt.model.backend_settings import OnnxRuntimeSettings, OpenVINOSettings
from sdopt.model.component import ComponentName, describe_component
from sdopt.model.family import Family
from sdopt.model.precision import DType
from sdopt.model.request import TextToImage
from sdopt.model.shape import Extent, ShapeProfile
from sdopt.pipeline.assemble import assemble_pipeline
from sdopt.pipeline.batches import run_rows
from sdopt.tasks.draw import draw_picture
from sdopt.trace.seeded_inputs import make_inputs
from tests.reference_session import ReferenceSession, make_bundle
from tests.unit.test_engine_modules import RowByRow

UNET = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 8}
SIDE = Extent.static(16)


def profile_of(batch: Extent, *, unguided: bool = True, tokens: int = 77) -> ShapeProfile:
    return ShapeProfile(batch, SIDE, SIDE, Extent(77, 77, tokens), unguided)


@pytest.mark.parametrize(
    ("batch", "unguided", "rows"),
    [
        (Extent.static(1), True, Extent(1, 2, 2)),
        (Extent.static(4), True, Extent(4, 8, 8)),
        (Extent(1, 1, 4), True, Extent(1, 2, 8)),
        (Extent.static(1), False, Extent(2, 2, 2)),
        (Extent(1, 1, 4), False, Extent(2, 2, 8)),
    ],
)
def test_the_unet_takes_one_row_or_two_a_picture(batch: Extent, unguided: bool, rows: Extent) -> None:
    extents = profile_of(batch, unguided=unguided).axis_extents(2)
    assert extents["cfg_batch"] == rows
    assert extents["batch"] == batch


def test_a_plan_has_an_optimisation_profile_for_each_number_of_rows_and_each_is_static() -> None:
    """Guided ones first, as ever: a kernel that is built for two rows costs what it did before."""
    spec = describe_component(ComponentName.UNET, UNET, Family.SD1, DType.FP16)
    profile = profile_of(Extent.static(1), tokens=154)
    shapes = [dict(each) for each in input_shapes(spec, profile, 2)]
    assert [each["sample"][0][0] for each in shapes] == [2, 2, 1, 1]
    assert [each["encoder_hidden_states"][0][1] for each in shapes] == [77, 154, 77, 154]
    assert all(least == usual == most for each in shapes for least, usual, most in each.values())
    before = input_shapes(spec, dataclasses.replace(profile, unguided=False), 2)
    assert input_shapes(spec, profile, 2)[:2] == before
    vae = describe_component(
        ComponentName.VAE_DECODER, {"latent_channels": 4, "out_channels": 3}, Family.SD1, DType.FP16
    )
    assert len(input_shapes(vae, profile, 2)) == 1


class Counting:
    """A session that notes how many rows each run has."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.rows = inner, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.rows.append(inputs["sample"].shape[0])
        return dict(self.inner.run(inputs))


@pytest.mark.parametrize(
    ("rows", "runs"), [(1, [4]), (4, [4]), (5, [8]), (6, [8]), (8, [8]), (9, [8, 4]), (12, [8, 4]), (13, [8, 8])]
)
def test_rows_are_filled_up_to_what_an_engine_is_built_for(rows: int, runs: list[int]) -> None:
    spec = describe_component(ComponentName.UNET, UNET, Family.SD1, DType.FP32)
    session = Counting(ReferenceSession(spec, profile_of(Extent.static(4)).axis_extents(2), RowByRow()))
    sample, states = torch.randn(rows, 4, 8, 8), torch.randn(rows, 77, 8)
    inputs = {"sample": sample, "timestep": torch.tensor(3.0), "encoder_hidden_states": states}
    outputs = run_rows(session, inputs)["out_sample"]  # type: ignore[arg-type]
    assert session.rows == runs
    torch.testing.assert_close(outputs, RowByRow()(sample, torch.tensor(3.0), states))


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_drawing_without_guidance_is_that_of_both_halves_and_runs_one(scale: float, tmp_path: Path) -> None:
    """At a scale of 1 the half without the prompt has no weight: its bundle of before schema 8 runs it all the same."""
    pictures, rows = [], []
    for unguided in (True, False):
        bundle = make_bundle(tmp_path / str(unguided))
        session = Counting(bundle.sessions[ComponentName.UNET])
        profile = dataclasses.replace(bundle.manifest.profile, unguided=unguided)
        extents = profile.axis_extents(bundle.manifest.require_pixels_per_latent())
        bundle.sessions[ComponentName.UNET].extents = extents
        bundle.sessions[ComponentName.UNET].profiles = (extents,)
        pipe = assemble_pipeline(bundle.folder, bundle.manifest, {**bundle.sessions, ComponentName.UNET: session})  # type: ignore[dict-item]
        pipe.set_progress_bar_config(disable=True)
        request = TextToImage(prompt="a large red circle", seed=2, steps=6, guidance_scale=scale, scheduler="euler")
        pictures.append(np.asarray(draw_picture(pipe, request)).astype(float))
        rows.append(set(session.rows))
    assert rows == [{1}, {2}]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize("settings", [OpenVINOSettings(), OnnxRuntimeSettings()])
def test_a_converted_unet_gives_each_row_what_it_has_beside_another(
    settings: OpenVINOSettings | OnnxRuntimeSettings, pristine_bundle: Path
) -> None:
    """What `sdopt convert` makes by default, and back to two rows again."""
    manifest = read_manifest(pristine_bundle)
    assert manifest.profile.unguided
    component = component_files(pristine_bundle, manifest, ComponentName.UNET)
    inputs = make_inputs(component.spec, component.config, component.extents)
    alone = {name: value if value.ndim == 0 else value[:1] for name, value in inputs.items()}
    with open_session(component, settings) as session:
        both = session.run(inputs)["out_sample"]
        one = session.run(alone)["out_sample"]
        again = session.run(inputs)["out_sample"]
    assert one.shape[0] == 1
    torch.testing.assert_close(one, both[:1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, both)


def test_openvino_compiles_for_sizes_that_it_knows(pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open axis would cost the engine with guidance; and where there is no room for two engines, one is kept."""
    from sdopt.backends import openvino as module

    component = component_files(pristine_bundle, read_manifest(pristine_bundle), ComponentName.UNET)
    inputs = make_inputs(component.spec, component.config, component.extents)
    alone = {name: value if value.ndim == 0 else value[:1] for name, value in inputs.items()}
    with open_session(component, OpenVINOSettings()) as session:
        for rows, feeds in ((2, inputs), (1, alone), (2, inputs)):
            session.run(feeds)
            ports = session.engine.network.get_compiled_model().inputs  # type: ignore[attr-defined]
            assert all(port.get_partial_shape().is_static for port in ports)
            assert {int(port.shape[0]) for port in ports if port.shape} == {rows}
        assert len(session._others) == 1  # type: ignore[attr-defined]
        monkeypatch.setattr(module, "has_room", lambda weights, device: False)
        session.run(alone)
        assert not session._others  # type: ignore[attr-defined]
