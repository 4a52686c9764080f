"""The model repository that `sdopt export triton` writes: what Triton's own protobuf reads, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from sdopt.bundle.manifest import read_manifest, write_manifest
from sdopt.bundle.trust import remember_built
from sdopt.disk.file_records import record_file
from sdopt.errors import ArtifactError, SdoptError, UnsafeInputError, UsageError
from sdopt.export import published_folder as publish
from sdopt.export.published_folder import MARKER_NAME
from sdopt.export.triton import repository as triton
from sdopt.export.triton.config import TritonBackend, configure_network, configure_pipeline, quote
from sdopt.export.triton.repository import export_triton
from sdopt.model.component import ComponentName, ComponentSpec, TensorSpec, Tolerance
from sdopt.model.precision import DType
from sdopt.model.shape import Extent
from tests.planted_plans import make_plan
from tests.sdopt_process import run_sdopt
from tests.unit.test_imports import run_poisoned

NETWORKS = ("text_encoder", "unet", "vae_decoder")
_ONNX_TYPES = {1: "TYPE_FP32", 7: "TYPE_INT64", 10: "TYPE_FP16"}


def parse(text: str) -> Any:
    """Strictly: an unknown field, a wrong type or a stray character is an error."""
    return text_format.Parse(text, model_config_pb2.ModelConfig(), allow_unknown_field=False)


def read_configs(repository: Path) -> dict[str, Any]:
    return {path.parent.name: parse(path.read_text()) for path in repository.glob("*/config.pbtxt")}


def describe(tensors: Any) -> dict[str, tuple[str, list[int]]]:
    return {t.name: (model_config_pb2.DataType.Name(t.data_type), list(t.dims)) for t in tensors}


def describe_onnx(values: Any) -> dict[str, tuple[str, list[int]]]:
    return {
        value.name: (
            _ONNX_TYPES[value.type.tensor_type.elem_type],
            [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim] or [1],
        )
        for value in values
    }


@pytest.fixture(scope="module")
def repository(pristine_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("triton") / "model_repository"
    export_triton(pristine_bundle, output, backend="onnxruntime", name="shapes")
    return output


def test_every_config_is_triton_s_and_says_what_its_graph_says(repository: Path) -> None:
    configs = read_configs(repository)
    assert set(configs) == {"shapes", *(f"shapes_{name}" for name in NETWORKS)}
    for name in NETWORKS:
        config = configs[f"shapes_{name}"]
        graph = onnx.load(repository / f"shapes_{name}/1/model.onnx", load_external_data=False).graph
        assert config.name == f"shapes_{name}"
        assert (config.platform, config.backend, config.max_batch_size) == ("onnxruntime_onnx", "onnxruntime", 0)
        assert describe(config.input) == describe_onnx(graph.input)
        assert describe(config.output) == describe_onnx(graph.output)
        assert (repository / f"shapes_{name}/1/{config.default_model_filename}").is_file()


def test_triton_refuses_scalars_so_the_timestep_has_one_element(repository: Path) -> None:
    (timestep,) = [t for t in read_configs(repository)["shapes_unet"].input if t.name == "timestep"]
    assert list(timestep.dims) == [1]
    # "cannot have empty reshape for non-batching model as scalar tensors are not supported"
    assert not timestep.HasField("reshape")


def test_the_model_that_draws_has_the_promised_tensors(repository: Path) -> None:
    config = read_configs(repository)["shapes"]
    assert config.backend == "python"
    assert describe(config.input) == {
        "prompt": ("TYPE_STRING", [-1]), "negative_prompt": ("TYPE_STRING", [-1]), "seed": ("TYPE_INT64", [-1]),
        "steps": ("TYPE_INT32", [1]), "guidance_scale": ("TYPE_FP32", [1]), "latents": ("TYPE_FP32", [-1, 4, 16, 16]),
    }  # fmt: skip
    assert [t.name for t in config.input if not t.optional] == ["prompt"]
    assert describe(config.output) == {"generated_image": ("TYPE_UINT8", [-1, 64, 64, 3])}


def test_weights_are_copies_and_the_graphs_find_them(repository: Path, pristine_bundle: Path) -> None:
    import onnxruntime

    for name in NETWORKS:
        weights = repository / f"shapes_{name}/1/weights.safetensors"
        assert weights.stat().st_nlink == 1
        assert record_file(weights) == read_manifest(pristine_bundle).files[f"{name}/weights.safetensors"]
    session = onnxruntime.InferenceSession(repository / "shapes_vae_decoder/1/model.onnx")
    (picture,) = session.run(["sample"], {"latent_sample": np.zeros((1, 4, 16, 16), np.float32)})
    assert picture.shape == (1, 3, 64, 64)


def test_the_code_in_the_repository_needs_neither_sdopt_nor_torch(repository: Path) -> None:
    version = repository / "shapes" / "1"
    assert {path.name for path in version.iterdir()} == {
        "model.py", "drawing.py", "schedules.py", "pipeline.json", "tokenizer.json"
    }  # fmt: skip
    run_poisoned(
        "import importlib, json, types\n"
        "sys.modules['triton_python_backend_utils'] = types.ModuleType('pb_utils')\n"
        "sys.modules['sdopt'] = None\n"
        f"sys.path.insert(0, {str(version.parent)!r})\n"
        "model = importlib.import_module('1.model')\n"
        "drawing = importlib.import_module('1.drawing')\n"
        f"folder = model.Path({str(version)!r})\n"
        "drawing.Drawer(json.loads((folder / 'pipeline.json').read_bytes()), folder, None)\n"
    )


def test_the_python_backend_runs_the_same_pipeline(repository: Path, pristine_bundle: Path, tmp_path: Path) -> None:
    done = export_triton(pristine_bundle, tmp_path / "r", backend="python", name="shapes")
    configs = read_configs(done.folder)
    assert {config.backend for config in configs.values()} == {"python"}
    # Whoever imported the shared repository's model left a __pycache__ there.
    written = [{path.name: path.read_bytes() for path in (folder / "shapes" / "1").iterdir() if path.is_file()}
               for folder in (repository, done.folder)]  # fmt: skip
    assert written[0] == written[1]
    assert all((done.folder / f"shapes_{name}/1/model.py").is_file() for name in NETWORKS)


def add_plans(folder: Path, *plans: tuple[str, str, int], trusted: bool = True) -> None:
    """Plans (generation, flavour, profile) of every network, as `sdopt convert --target tensorrt` records them."""
    manifest = read_manifest(folder)
    components, files = {}, dict(manifest.files)
    for name, part in manifest.components.items():
        records = []
        for generation, flavour, profile in plans:
            file = f"{name}/{generation}-{flavour}-{profile}.plan"
            (folder / file).write_bytes(f"{generation}{profile} of {name}".encode() * 400)
            files[file] = record_file(folder / file)
            version = "10.13.3.9" if flavour == "tensorrt" else "1.9.0.1"
            records.append(make_plan(generation, name, file=file, flavour=flavour, version=version, profile=profile))
            if trusted:
                remember_built(files[file].sha256)
        components[name] = part.model_copy(update={"plans": tuple(records)})
    write_manifest(folder, manifest.model_copy(update={"components": components, "files": files}))


def test_plans_are_chosen_by_compute_capability(bundle: Path, tmp_path: Path) -> None:
    add_plans(bundle, ("sm89", "tensorrt", 0), ("sm120", "tensorrt", 0), ("ampere+", "tensorrt", 0),
              ("sm89", "tensorrt", 1), ("sm86", "tensorrt-rtx", 0))  # fmt: skip
    done = export_triton(bundle, tmp_path / "r")
    assert done.backend is TritonBackend.TENSORRT
    assert any("10.13.3.9" in need for need in done.needs)
    config = read_configs(done.folder)[f"{done.model}_unet"]
    assert (config.platform, config.backend) == ("tensorrt_plan", "tensorrt")
    assert dict(config.cc_model_filenames) == {"8.9": "sm89-tensorrt-0.plan", "12.0": "sm120-tensorrt-0.plan"}
    assert config.default_model_filename == "ampere+-tensorrt-0.plan"
    assert [group.kind for group in config.instance_group] == [model_config_pb2.ModelInstanceGroup.KIND_GPU]
    version = done.folder / f"{done.model}_unet" / "1"
    wanted = {*config.cc_model_filenames.values(), config.default_model_filename}
    assert {path.name for path in version.iterdir()} == wanted
    assert (version / "sm89-tensorrt-0.plan").read_bytes().startswith(b"sm890 of unet")


def test_a_plan_that_nobody_trusts_does_not_get_into_a_server(bundle: Path, tmp_path: Path) -> None:
    add_plans(bundle, ("sm75", "tensorrt", 0), trusted=False)
    with pytest.raises(UnsafeInputError, match="not built here"):
        export_triton(bundle, tmp_path / "r")
    assert not (tmp_path / "r").exists()
    assert export_triton(bundle, tmp_path / "r", backend="onnxruntime").backend is TritonBackend.ONNXRUNTIME


def test_plans_of_tensorrt_rtx_are_no_plans_for_triton(bundle: Path, tmp_path: Path) -> None:
    add_plans(bundle, ("sm89", "tensorrt-rtx", 0))
    with pytest.raises(UsageError, match="TensorRT-RTX") as raised:
        export_triton(bundle, tmp_path / "r")
    assert "--backend onnxruntime" in raised.value.hint
    assert "--target tensorrt" in raised.value.hint
    assert list(tmp_path.glob("r*")) == []
    assert export_triton(bundle, tmp_path / "r", backend="onnxruntime").backend is TritonBackend.ONNXRUNTIME


@pytest.mark.parametrize(
    ("options", "error"),
    [({"backend": "openvino"}, UsageError), ({"backend": "tensorrt"}, UsageError), ({"scheduler": "lms"}, UsageError),
     ({"scheduler": "eulr"}, UsageError), ({"name": "../up"}, UnsafeInputError), ({"name": 'a" x'}, UnsafeInputError),
     ({"name": "a b"}, UnsafeInputError)],
)  # fmt: skip
def test_impossible_options_write_nothing(
    options: dict[str, str], error: type[SdoptError], pristine_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(error):
        export_triton(pristine_bundle, tmp_path / "r", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["unet/model.onnx", "text_encoder/weights.safetensors", "tokenizer/vocab.json"])
def test_a_damaged_bundle_is_not_exported(broken: str, bundle: Path, tmp_path: Path) -> None:
    with (bundle / broken).open("ab") as file:
        file.write(b" ")
    with pytest.raises(ArtifactError, match=broken):
        export_triton(bundle, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_bundle_without_a_unet_is_not_exported(bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(bundle)
    parts = {name: part for name, part in manifest.components.items() if name is not ComponentName.UNET}
    write_manifest(bundle, manifest.model_copy(update={"components": parts}))
    with pytest.raises(ArtifactError, match="lacks unet"):
        export_triton(bundle, tmp_path / "r")


def test_a_manifest_cannot_write_a_config_of_its_own(bundle: Path, tmp_path: Path) -> None:
    path = bundle / "bundle.json"
    path.write_text(path.read_text().replace('"out_sample"', '"o\\" } parameters { key: \\"x"'))
    with pytest.raises(UnsafeInputError):
        export_triton(bundle, tmp_path / "r")
    assert list(tmp_path.glob("*r*")) == []


def test_what_sdopt_did_not_export_is_left_alone(pristine_bundle: Path, bundle: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    (tmp_path / "link").symlink_to(mine)
    for output in (bundle, mine, tmp_path / "link", mine / "thesis.txt", mine / "thesis.txt" / "below"):
        with pytest.raises(ArtifactError) as raised:
            export_triton(pristine_bundle, output)
        assert "-o" in raised.value.hint
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "mine", "link"}


def test_an_export_replaces_its_own_kind_only_when_it_is_whole(
    pristine_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "r"
    export_triton(pristine_bundle, output, name="first")
    before = sorted(path.relative_to(output) for path in output.rglob("*"))

    def fail(*_: object) -> None:
        raise OSError("the plug was pulled")

    with monkeypatch.context() as patch:
        patch.setattr(triton, "write_tokenizers", fail)
        with pytest.raises(ArtifactError, match="plug"):
            export_triton(pristine_bundle, output, name="second")
    assert sorted(path.relative_to(output) for path in output.rglob("*")) == before
    rename = Path.rename

    def fail_to_publish(path: Path, target: Path) -> Path:
        if path.name == "export":
            raise OSError("the plug was pulled")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(publish.Path, "rename", fail_to_publish)
        with pytest.raises(ArtifactError, match="plug"):
            export_triton(pristine_bundle, output, name="second")
    assert sorted(path.relative_to(output) for path in output.rglob("*")) == before
    export_triton(pristine_bundle, output, name="second")
    assert {path.name for path in output.iterdir()} == {
        MARKER_NAME, "second", *(f"second_{name}" for name in NETWORKS)
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
    (output / MARKER_NAME).write_text(json.dumps({"kind": "optimum"}))
    with pytest.raises(ArtifactError, match="not an earlier"):
        export_triton(pristine_bundle, output)


@given(name=st.text(max_size=40) | st.from_regex(r"[A-Za-z0-9_.\-+]{1,40}", fullmatch=True))
def test_a_name_is_refused_or_read_back_as_it_was(name: str) -> None:
    try:
        config = parse(f"name: {quote(name)} max_batch_size: 0")
    except UnsafeInputError:
        return
    assert config.name == name
    assert "/" not in name
    assert name not in ("", ".", "..")


@given(
    axes=st.lists(st.integers(1, 9000) | st.sampled_from(["batch", "width"]), max_size=5),
    dtype=st.sampled_from([DType.FP32, DType.FP16, DType.BF16, DType.INT64, DType.INT32]),
    backend=st.sampled_from(TritonBackend),
)
def test_any_network_makes_a_config_for_triton(axes: list[int | str], dtype: DType, backend: TritonBackend) -> None:
    extents = {"batch": Extent(1, 1, 4), "width": Extent.static(64)}
    tensor = TensorSpec("hidden_states.7", dtype, tuple(axes))
    spec = ComponentSpec(ComponentName.UNET, (tensor,), (tensor,), Tolerance(1e-3, 1e-6))
    plans = {"8.9": "a.plan", "": "b.plan"} if backend is TritonBackend.TENSORRT else {}
    config = parse(configure_network("model", spec, extents, backend, plans).to_text())
    wanted = [{"batch": -1, "width": 64}.get(axis, axis) if isinstance(axis, str) else axis for axis in axes] or [1]
    assert list(config.input[0].dims) == list(config.output[0].dims) == wanted
    assert dict(config.cc_model_filenames) == ({"8.9": "a.plan"} if plans else {})


def test_the_parser_here_is_strict() -> None:
    text = configure_pipeline("model", [4, 8, 8], 64, 64).to_text()
    assert parse(text).name == "model"
    for planted in ('colour: "red"', "max_batch_size: many", "input { name: 3 }"):
        with pytest.raises(text_format.ParseError):
            parse(text + planted)


def test_the_command_says_what_it_wrote(pristine_bundle: Path, tmp_path: Path) -> None:
    words = ["export", "triton", str(pristine_bundle), "-o", str(tmp_path / "r")]
    done = run_sdopt(*words, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["networks"] == [f"{told['model']}_{name}" for name in NETWORKS]
    assert (tmp_path / "r" / told["model"] / "config.pbtxt").is_file()
    refused = run_sdopt(*words, "--backend", "tensorrt")
    assert refused.returncode == 2
    assert "onnxruntime" in refused.stderr


@pytest.mark.parametrize("command", ["triton", "comfyui", "optimum"])
def test_the_help_of_an_export_is_light(command: str) -> None:
    code = f"sys.argv = ['sdopt', 'export', {command!r}, '--help']\nfrom sdopt.cli.main import main\nmain()"
    assert "--output" in run_poisoned(code)


def test_a_bundle_may_have_only_vocabulary_and_merges(bundle: Path, tmp_path: Path) -> None:
    """As those of single files have: Triton's tokenizers library needs the one file all the same."""
    manifest = read_manifest(bundle)
    (bundle / "tokenizer/tokenizer.json").unlink()
    files = {name: record for name, record in manifest.files.items() if name != "tokenizer/tokenizer.json"}
    write_manifest(bundle, manifest.model_copy(update={"files": files}))
    export_triton(bundle, tmp_path / "r", name="m")
    shutil.rmtree(bundle / "tokenizer")
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(tmp_path / "r/m/1/tokenizer.json")).encode("a large red circle").ids
    assert len([i for i in ids if i < 603]) >= 4
