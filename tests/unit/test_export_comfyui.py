"""A UNet for ComfyUI's TensorRT loader: other tensor names and shapes, the same network."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from sdopt.backends.protocol import Probe
from sdopt.bundle.manifest import BundleManifest, read_manifest
from sdopt.errors import ArtifactError, MissingDependency, UnsafeInputError, UsageError
from sdopt.export.comfyui import engine_file as comfyui
from sdopt.export.comfyui.engine_file import export_engine, export_graph, find_model_type, name_engine
from sdopt.export.comfyui.flat_graph import adapt_unet
from sdopt.graph.external_data import check_graph_file
from sdopt.model.component import ComponentName
from sdopt.model.family import Family, Prediction
from sdopt.model.shape import Extent
from sdopt.model.task import find_tasks
from sdopt.trace.seeded_inputs import make_inputs
from tests.checkpoints import make_model, small_recipe, write_folder
from tests.unit.test_trace import Built, build


@pytest.fixture(scope="module", params=[Family.SD1, Family.SDXL])
def unet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("comfyui")
    source = write_folder(folder / "source", make_model(small_recipe(request.param)))
    return build(folder / "unet", source, ComponentName.UNET)


def run(graph: Path, inputs: dict[str, Any]) -> Any:
    return onnxruntime.InferenceSession(graph).run(None, inputs)[0]


def write_adapted(model: onnx.ModelProto, unet: Built, folder: Path) -> Path:
    adapt_unet(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    shutil.copy(unet.files.folder / "weights.safetensors", folder)
    onnx.checker.check_model(folder / "model.onnx")
    return folder / "model.onnx"


def embed_as_comfyui(pooled: torch.Tensor, time_ids: torch.Tensor, width: int) -> torch.Tensor:
    """What ComfyUI's SDXL gives as `y`: the pooled text, then cosines and sines of each size."""
    sizes = get_timestep_embedding(time_ids.flatten(), width, flip_sin_to_cos=True, downscale_freq_shift=0)
    return torch.cat([pooled, sizes.reshape(len(pooled), -1)], 1)


def test_the_adapted_graph_is_the_same_network(unet: Built, tmp_path: Path) -> None:
    spec, config = unet.files.spec, unet.files.config
    inputs = make_inputs(spec, config, unet.files.extents)
    model = check_graph_file(unet.files.folder / "model.onnx")
    graph = write_adapted(model, unet, tmp_path)
    rows = inputs["sample"].shape[0]
    adapted = {
        "x": inputs["sample"].numpy(),
        "timesteps": np.full(rows, inputs["timestep"].item(), np.float32),
        "context": inputs["encoder_hidden_states"].numpy(),
    }
    if "text_embeds" in inputs:
        width = int(config["addition_time_embed_dim"])
        adapted["y"] = embed_as_comfyui(inputs["text_embeds"], inputs["time_ids"], width).numpy()
    # The loader takes the first tensor's first axis for the batch, and the one after the inputs for the output.
    assert [value.name for value in model.graph.input] == list(adapted)
    assert [value.name for value in model.graph.output] == ["h"]
    expected = run(unet.files.folder / "model.onnx", {name: value.numpy() for name, value in inputs.items()})
    got = run(graph, adapted)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    for name in adapted:
        changed = {**adapted, name: adapted[name] * 0.5 + 0.1}
        assert np.abs(run(graph, changed) - expected).max() > 1e-6, f"{name} does nothing"


def test_names_that_the_graph_uses_inside_are_moved_away(unet: Built, tmp_path: Path) -> None:
    model = check_graph_file(unet.files.folder / "model.onnx")
    inner = model.graph.node[3].output[0]
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == inner:
                    names[index] = "x"
    onnxruntime.InferenceSession(write_adapted(model, unet, tmp_path))
    assert model.graph.input[0].name == "x"


def test_an_unknown_input_is_refused(unet: Built) -> None:
    model = check_graph_file(unet.files.folder / "model.onnx")
    model.graph.input.append(onnx.helper.make_tensor_value_info("timestep_cond", 1, [2, 8]))
    with pytest.raises(ArtifactError, match="timestep_cond"):
        adapt_unet(model)


def test_the_folder_holds_the_graph_and_the_bundle_s_weights(pristine_bundle: Path, tmp_path: Path) -> None:
    done = export_graph(pristine_bundle, tmp_path / "out")
    weights = tmp_path / "out" / "weights.safetensors"
    assert weights.read_bytes() == (pristine_bundle / "unet/weights.safetensors").read_bytes()
    assert done.engine == "tiny_$stat-b-2-h-64-w-64_00001_.engine"
    assert done.model_type == "sd1.x"
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    assert [value.name for value in session.get_inputs()] == ["x", "timesteps", "context"]
    with pytest.raises(UnsafeInputError):
        export_graph(pristine_bundle, tmp_path / "other", name="a/b")
    assert not (tmp_path / "other").exists()


def test_engine_names_are_those_of_comfyui_s_own_converter() -> None:
    side = Extent(512, 512, 1024)
    assert name_engine("m", Extent.static(2), Extent.static(512), Extent.static(768)) == (
        "m_$stat-b-2-h-512-w-768_00001_.engine"
    )
    assert name_engine("m", Extent(2, 2, 4), side, side) == "m_$dyn-b-2-4-2-h-512-1024-512-w-512-1024-512_00001_.engine"


@pytest.mark.parametrize(
    ("family", "prediction", "inpainting", "wanted"),
    [(Family.SD1, Prediction.EPSILON, False, "sd1.x"), (Family.SD2, Prediction.V_PREDICTION, False, "sd2.x-768v"),
     (Family.SDXL, Prediction.EPSILON, False, "sdxl_base"),
     (Family.SDXL_REFINER, Prediction.EPSILON, False, "sdxl_refiner"), (Family.SD1, Prediction.EPSILON, True, ""),
     (Family.SDXL, Prediction.V_PREDICTION, False, "")],
)  # fmt: skip
def test_the_loader_s_model_types(
    family: Family, prediction: Prediction, inpainting: bool, wanted: str, pristine_bundle: Path
) -> None:
    changes = {"family": family, "prediction": prediction, "tasks": find_tasks(family, 9 if inpainting else 4, 4)}
    manifest: BundleManifest = read_manifest(pristine_bundle).model_copy(update=changes)
    if wanted:
        assert find_model_type(manifest) == wanted
    else:
        with pytest.raises(UsageError, match="no model type"):
            find_model_type(manifest)


@pytest.fixture
def comfyui_folder(tmp_path: Path) -> Path:
    (tmp_path / "ComfyUI" / "models").mkdir(parents=True)
    return tmp_path / "ComfyUI"


def test_without_tensorrt_it_says_what_to_do(
    pristine_bundle: Path, comfyui_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = Probe("tensorrt", "", (), missing="tensorrt is not installed", remedy="pip install 'sdopt[gpu]'")
    monkeypatch.setattr(comfyui, "probe_backend", lambda _: missing)
    with pytest.raises(MissingDependency, match="general TensorRT") as raised:
        export_engine(pristine_bundle, comfyui_folder)
    assert "--graph" in raised.value.hint
    assert [path.name for path in comfyui_folder.rglob("*")] == ["models"]
    with pytest.raises(UsageError, match="not a folder of ComfyUI"):
        export_engine(pristine_bundle, comfyui_folder / "models")


def test_the_engine_is_put_where_the_loader_looks_and_replaces_nothing(
    pristine_bundle: Path, comfyui_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(model: onnx.ModelProto, weights: Path, extents: object, output: Path) -> None:
        assert [value.name for value in model.graph.input] == ["x", "timesteps", "context"]
        assert weights == pristine_bundle / "unet/weights.safetensors"
        output.write_bytes(b"engine")

    monkeypatch.setattr(comfyui, "probe_backend", lambda _: Probe("tensorrt", "10.13", ()))
    monkeypatch.setattr(comfyui, "build_engine", write)
    done = export_engine(pristine_bundle, comfyui_folder)
    assert done.path == comfyui_folder / "models" / "tensorrt" / "tiny_$stat-b-2-h-64-w-64_00001_.engine"
    assert done.path.read_bytes() == b"engine"
    assert os.listdir(done.path.parent) == [done.path.name]
    with pytest.raises(UsageError, match="--name"):
        export_engine(pristine_bundle, comfyui_folder)


def test_tensorrt_reads_the_adapted_graph(pristine_bundle: Path, tmp_path: Path) -> None:
    """TensorRT-RTX has the same parser, and builds for a GPU that is not here."""
    pytest.importorskip("tensorrt_rtx")

    extents = read_manifest(pristine_bundle).extents
    comfyui.build_engine(
        comfyui.adapt_graph(pristine_bundle), pristine_bundle / "unet/weights.safetensors", extents,
        tmp_path / "x.engine", kind="tensorrt-rtx", generation="sm89",
    )  # fmt: skip
    assert (tmp_path / "x.engine").stat().st_size > (pristine_bundle / "unet/weights.safetensors").stat().st_size
