"""One dynamic build, from a checkpoint through `sdopt.convert`, runs every size and batch."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from sdopt.backends.open import open_session
from sdopt.backends.protocol import ComponentFiles
from sdopt.bundle.manifest import read_config
from sdopt.bundle.records import Verdict
from sdopt.convert.convert import convert
from sdopt.convert.decide import open_plan
from sdopt.errors import ShapeError
from sdopt.graph.external_data import check_graph_file
from sdopt.model.backend_settings import BackendSettings, OnnxRuntimeSettings, OpenVINOSettings
from sdopt.model.family import Family
from sdopt.model.precision import DType, Precision
from sdopt.model.recipe import BuildRecipe, VerifySettings
from sdopt.model.shape import ShapeProfile
from sdopt.model.target import Runtime, Target
from sdopt.preflight.check import check_bundle
from sdopt.trace.compare_outputs import compare_outputs
from sdopt.trace.reference import load_reference, run_reference
from sdopt.trace.seeded_inputs import make_inputs
from tests.checkpoints import make_model, small_recipe, write_folder


def test_a_dynamic_bundle_runs_every_size_and_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDOPT_CACHE", str(tmp_path / "cache"))
    source = write_folder(tmp_path / "source", make_model(small_recipe(Family.SD1)))
    recipe = BuildRecipe(
        source=str(source), target=Target(Runtime.ONNXRUNTIME), precision=Precision.FP32, size="64x32", dynamic=True,
        verify=VerifySettings(fidelity=False),
    )  # fmt: skip
    plan = open_plan(recipe)
    manifest = convert(plan, tmp_path / "bundle")
    assert manifest.fidelity.verdict is Verdict.NOT_VERIFIED
    assert not manifest.profile.is_static
    assert check_bundle(tmp_path / "bundle").problems == ()
    runtimes: list[BackendSettings] = [OnnxRuntimeSettings(), OpenVINOSettings()]
    for name, record in manifest.components.items():
        assert record.parity is not None
        assert record.parity.passed
        assert record.audit.attention_nodes == record.audit.attention_layers > 0
        folder = tmp_path / "bundle" / name
        graph = check_graph_file(folder / "model.onnx").graph
        named = {dim.dim_param for value in graph.input for dim in value.type.tensor_type.shape.dim if dim.dim_param}
        axes = {axis for tensor in record.spec.inputs for axis in tensor.axes if isinstance(axis, str)}
        assert named == {axis for axis in axes if not plan.extents[axis].is_static}
        config = read_config(tmp_path / "bundle", name)
        network = load_reference(record.spec, config, plan.components[name].tensors)
        component = ComponentFiles(folder, record.spec, config, manifest.family, plan.extents)
        for settings in runtimes:
            with open_session(component, settings) as session:
                for batch, height, width in ((1, 32, 64), (2, 64, 96), (3, 128, 64)):
                    extents = ShapeProfile.static(height_px=height, width_px=width, batch=batch).axis_extents(2)
                    inputs = make_inputs(record.spec, config, extents)
                    run_reference(network, record.spec, inputs, tmp_path / "expected")
                    parity = compare_outputs(
                        record.spec, load_file(tmp_path / "expected"), session.run(inputs), runtime=settings.kind,
                        graph_dtype=DType.FP32,
                    )  # fmt: skip
                    assert parity.passed, (name, settings.kind, batch, height, width, parity)
                extents = ShapeProfile.static(height_px=32, width_px=64, batch=9).axis_extents(2)
                with pytest.raises(ShapeError):
                    session.run(make_inputs(record.spec, config, extents))
