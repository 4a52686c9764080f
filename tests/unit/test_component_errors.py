"""Components of candidates against torch fp32: torch itself is equal, a planted error is found, nothing crashes."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from sdopt.bench.case.candidates import Candidate
from sdopt.bench.case.report import CandidateKind, Scope
from sdopt.bench.compare.component_errors import measure_component_errors
from sdopt.bundle.manifest import BundleManifest, read_manifest
from sdopt.model.backend_settings import BackendSettings, TorchSettings
from sdopt.model.component import ComponentName
from sdopt.model.precision import Precision

_NAMES = (ComponentName.TEXT_ENCODER, ComponentName.UNET)


def _read(folder: Path) -> BundleManifest:
    manifest = read_manifest(folder)
    return manifest.model_copy(update={"components": {name: manifest.components[name] for name in _NAMES}})


def _make(name: str, folder: Path, settings: BackendSettings | None = None) -> Candidate:
    kind = CandidateKind.ENGINES if settings is None else CandidateKind.TORCH
    return Candidate(name, name, Precision.FP32, settings, folder, _read(folder), kind)


def test_errors_of_engines_torch_and_a_bundle_that_doubles_its_noise(
    pristine_bundle: Path, bundle: Path, tmp_path: Path
) -> None:
    path = bundle / "unet" / "model.onnx"
    model = onnx.load_model(path, load_external_data=False)
    last = next(node for node in model.graph.node if "out_sample" in node.output)
    last.output[0] = "halved"
    model.graph.node.append(onnx.helper.make_node("Add", ["halved", "halved"], ["out_sample"]))
    onnx.save_model(model, path)
    (bundle / "text_encoder" / "model.onnx").unlink()
    candidates = [
        _make("engines", pristine_bundle), _make("eager", pristine_bundle, TorchSettings()),
        _make("bf16", pristine_bundle, TorchSettings(precision=Precision.BF16)),
    ]  # fmt: skip
    work = tmp_path / "work"
    work.mkdir()
    broken = _make("broken", bundle)
    doubled = Candidate(
        "doubled", "doubled", Precision.FP32, None, bundle,
        broken.manifest.model_copy(update={"components": {_NAMES[1]: broken.manifest.components[_NAMES[1]]}}),
        CandidateKind.BUNDLE,
    )  # fmt: skip
    peer = Candidate("peer", "peer", Precision.FP32, None, bundle, broken.manifest, CandidateKind.PEER)
    tables = measure_component_errors(
        pristine_bundle, _read(pristine_bundle), [*candidates, broken, doubled, peer], Scope.PICTURES, work, 600
    )
    for name in _NAMES:
        assert tables.errors["eager"][name].relative_error == 0
        assert 0 < tables.errors["engines"][name].relative_error < 1e-5
        assert 1e-3 < tables.errors["bf16"][name].relative_error < 2e-2
    far = tables.errors["doubled"][ComponentName.UNET]
    assert far.relative_error == pytest.approx(1, abs=1e-4)
    assert far.cosine == pytest.approx(1, abs=1e-6)
    assert tables.messages.keys() == {"broken"}
    assert tables.errors.keys() == {"engines", "eager", "bf16", "doubled"}


def test_of_the_unet_alone_nothing_else_is_run(pristine_bundle: Path, tmp_path: Path) -> None:
    engines = [_make("engines", pristine_bundle)]
    tables = measure_component_errors(pristine_bundle, _read(pristine_bundle), engines, Scope.UNET, tmp_path, 600)
    assert tables.errors["engines"].keys() == {ComponentName.UNET}
