"""What `--against` means: words, what each device has for them, other bundles, and what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdopt.bench.case import baselines
from sdopt.bench.case import candidates as candidates_module
from sdopt.bench.case.baselines import Baseline, parse_against
from sdopt.bench.case.candidates import ENGINES, label_engines, list_candidates
from sdopt.bench.case.report import CandidateKind
from sdopt.bundle.manifest import BundleManifest, read_manifest, write_manifest
from sdopt.bundle.records import BakedAdapter, SlotsRecord
from sdopt.errors import ArtifactError, UnsafeInputError, UsageError
from sdopt.model.backend_settings import OnnxRuntimeSettings, OpenVINOSettings, TensorRTSettings, TorchSettings
from sdopt.model.component import ComponentName
from sdopt.model.family import Family
from sdopt.model.lora import LoraUse
from sdopt.model.precision import DType, Precision
from sdopt.model.quantization import Scheme
from sdopt.model.shape import ShapeProfile
from sdopt.model.slots import Slot, SlotSet
from sdopt.model.task import Task
from tests.reference_session import ReferenceBundle, make_bundle

FOLDER = Path("bundle")


def make_component(backend: Any, precision: Precision, dtype: DType = DType.FP32) -> Any:
    spec = SimpleNamespace(inputs=(SimpleNamespace(dtype=dtype),))
    return SimpleNamespace(
        quantization=None, is_quantized=False, backend=backend, precision=precision, spec=spec, plans=()
    )


def make_manifest(**records: Any) -> Any:
    bf16 = OpenVINOSettings(inference_precision=Precision.BF16)
    records = records or {"unet": make_component(bf16, Precision.BF16)}
    return SimpleNamespace(
        name="tiny", family=Family.SD1, own_task=Task.TEXT_TO_IMAGE,
        profile=ShapeProfile.static(height_px=64, width_px=64),
        components={ComponentName(name): record for name, record in records.items()},
    )  # fmt: skip


ON_GPU = make_manifest(unet=make_component(TensorRTSettings(kind="tensorrt-rtx"), Precision.FP16, DType.FP16))


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)


def test_against_is_parsed_and_each_once() -> None:
    assert parse_against(" compile,eager-fp32, compile") == (Baseline.COMPILE, Baseline.EAGER_FP32)
    assert parse_against("eager,flash-attn,optimum,out/b,./c") == ("eager", "flash-attn", "optimum", "out/b", "./c")
    assert parse_against("") == ()


@pytest.mark.parametrize(
    ("word", "near"), [("eager-fp23", "eager-fp32"), ("flash_attn", "flash-attn"), ("compiled", "compile")]
)
def test_an_unknown_word_is_told_with_the_nearest(word: str, near: str) -> None:
    with pytest.raises(UsageError, match=repr(word)) as raised:
        parse_against(word)
    assert f"did you mean '{near}'" in raised.value.hint


def test_a_plain_name_is_a_folder_where_a_bundle_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match="'other'"):
        parse_against("other")
    (tmp_path / "other" / "bundle.json").write_text("{}")
    assert parse_against("other") == ("other",)


def test_the_label_names_every_runtime_that_of_the_unet_first() -> None:
    manifest = make_manifest(
        text_encoder=make_component(OnnxRuntimeSettings(), Precision.FP32),
        unet=make_component(OpenVINOSettings(), Precision.BF16),
        vae_decoder=make_component(OnnxRuntimeSettings(), Precision.FP32),
    )
    assert label_engines(manifest) == "OpenVINO bf16 + ONNX Runtime fp32"
    unet = manifest.components[ComponentName.UNET]
    unet.quantization, unet.is_quantized = SimpleNamespace(settings=SimpleNamespace(scheme=Scheme.INT8)), True
    assert label_engines(manifest) == "OpenVINO bf16 + ONNX Runtime fp32 with int8"


def test_products_are_in_8_bits_where_the_runtime_shows_it_or_else_the_scheme_says_it() -> None:
    manifest = make_manifest(
        text_encoder=make_component(OpenVINOSettings(), Precision.BF16),
        unet=make_component(OpenVINOSettings(), Precision.BF16),
        vae_decoder=make_component(OpenVINOSettings(), Precision.FP32),
    )
    for name, scheme, shown in (
        (ComponentName.TEXT_ENCODER, Scheme.INT8_WEIGHTS, 72), (ComponentName.UNET, Scheme.INT8, None),
        (ComponentName.VAE_DECODER, Scheme.INT8_WEIGHTS, 4),
    ):  # fmt: skip
        record, settings = manifest.components[name], SimpleNamespace(scheme=scheme)
        record.quantization = SimpleNamespace(settings=settings, integer_layers=shown, quantized_layers=73)
        record.is_quantized = True
    engines, eager = list_candidates(FOLDER, manifest, ("eager-bf16",))
    assert engines.precision_by_component() == {
        ComponentName.TEXT_ENCODER: Precision.INT8, ComponentName.UNET: Precision.INT8,
        ComponentName.VAE_DECODER: Precision.FP32,
    }  # fmt: skip
    text_encoder = manifest.components[ComponentName.TEXT_ENCODER].quantization
    text_encoder.integer_layers = None
    assert engines.precision_by_component()[ComponentName.TEXT_ENCODER] is Precision.BF16
    assert set(eager.precision_by_component().values()) == {Precision.BF16}


INK = LoraUse(source="/loras/ink.safetensors", unet=0.8, text=0.5, sha256="a" * 64)


def give_slots(
    bundle: ReferenceBundle, *, slots: bool = True, adapters: tuple[BakedAdapter, ...] = ()
) -> BundleManifest:
    """A bundle of the double that says it has slots, or adapters in its weights."""
    manifest = bundle.manifest
    records = dict(manifest.components)
    if slots:
        unet = records[ComponentName.UNET]
        record = SlotsRecord(layers=SlotSet.ALL, rank=16, slots=(Slot("layer", (4, 4)),), audit=unet.audit)
        records[ComponentName.UNET] = unet.model_copy(update={"slots": record})
    source = manifest.source.model_copy(update={"adapters": adapters})
    changed = manifest.model_copy(update={"components": records, "source": source})
    write_manifest(bundle.folder, changed)
    return changed


def test_with_a_lora_the_engines_are_there_with_and_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates_module, "require_sound", lambda *_: None)
    mine = make_bundle(tmp_path / "mine")
    manifest = give_slots(mine)
    same = BakedAdapter(name="ink", sha256="a" * 64, unet=0.8, text=0.5)
    others = {
        "baked": (False, (same,)), "weaker": (False, (same.model_copy(update={"unet": 0.7}),)), "plain": (False, ()),
        "slotted": (True, ()),
    }  # fmt: skip
    for name, (slots, adapters) in others.items():
        give_slots(make_bundle(tmp_path / name), slots=slots, adapters=adapters)
    words = ("eager-fp32", *(str(tmp_path / name) for name in others))
    found = {each.name: each for each in list_candidates(mine.folder, manifest, words, loras=(INK,))}
    assert list(found) == [ENGINES, "without-loras", "eager-fp32", *(f"bundle-{name}" for name in others)]
    assert [each.fills for each in found.values()] == [True, False, True, False, True, True, True]
    assert [each.alike for each in found.values()] == [True, False, True, True, True, True, True]
    missing = {name for name, each in found.items() if each.missing}
    assert missing == {"bundle-weaker", "bundle-plain"}
    assert "with LoRAs in its weights" in found["bundle-baked"].label
    with pytest.raises(UsageError, match="no LoRA slots"):
        list_candidates(tmp_path / "plain", read_manifest(tmp_path / "plain"), (), loras=(INK,))


def test_the_usual_baselines_of_a_cpu() -> None:
    found = list_candidates(FOLDER, make_manifest(), None)
    assert [c.name for c in found] == [ENGINES, "eager-fp32", "eager-bf16", "compile"]
    assert [c.label for c in found][1:] == ["torch eager fp32", "torch eager bf16", "torch.compile fp32"]
    assert [c.kind for c in found] == [CandidateKind.ENGINES, *[CandidateKind.TORCH] * 3]
    assert found[3].settings == TorchSettings(compile=True)


def test_beside_engines_of_a_gpu_torch_runs_there_as_fast_as_it_can() -> None:
    found = list_candidates(FOLDER, ON_GPU, None)
    labels = ["TensorRT-RTX fp16", "torch eager fp16", "torch.compile max-autotune fp16"]
    assert [c.label for c in found] == labels


@pytest.mark.parametrize("manifest", [make_manifest(), ON_GPU])
def test_every_candidate_is_another_and_computes_where_the_engines_do(
    manifest: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(baselines.shutil, "which", lambda name: name)
    found = [c for c in list_candidates(FOLDER, manifest, tuple(Baseline))[1:] if c.kind is CandidateKind.TORCH]
    can_run = [c for c in found if not c.missing]
    device = "cuda" if manifest is ON_GPU else "cpu"
    assert {c.settings.device for c in can_run} == {device}  # type: ignore[union-attr]
    assert len({c.settings.model_dump_json() for c in found}) == len(found)  # type: ignore[union-attr]
    assert len({c.label for c in found}) == len({c.name for c in found}) == len(found)
    assert all(set(c.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-") for c in found)


def test_groups_stand_for_several_and_repeat_none() -> None:
    found = list_candidates(FOLDER, make_manifest(), ("eager-bf16", "eager", "attention"))
    assert [c.name for c in found][1:] == ["eager-bf16", "eager-fp32", "attention-math", "attention-flash"]
    assert [c.name for c in list_candidates(FOLDER, ON_GPU, ("eager",))][1:] == ["eager-fp16"]


def test_attention_on_a_gpu_is_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: name if name != "sageattention" else None)
    found = list_candidates(FOLDER, ON_GPU, ("attention", "flash-attn"))[1:]
    own = [f"attention-{each}" for each in ("math", "flash", "efficient", "cudnn")]
    assert [c.name for c in found] == [*own, "flash-attn", "attention-xformers"]
    assert [c.settings.attention for c in found][-2:] == ["flash-attn", "xformers"]  # type: ignore[union-attr]


def test_compile_without_a_compiler_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines.shutil, "which", lambda name: None)
    engines, eager, *compiled = list_candidates(
        FOLDER, make_manifest(), ("eager-fp32", "compile", "compile-max-autotune")
    )
    assert (engines.missing, eager.missing) == ("", "")
    assert all("C++ compiler" in each.missing for each in compiled)


@pytest.mark.parametrize("word", ["eager-fp16", "flash-attn"])
def test_what_a_cpu_cannot_have_is_a_row_with_the_reason(word: str) -> None:
    _, found = list_candidates(FOLDER, make_manifest(), (word,))
    assert found.precision is Precision.FP16
    assert "on a GPU, and these engines run on the CPU" in found.missing


@pytest.mark.usefixtures("nothing_installed")
def test_flash_attn_that_is_not_installed_is_a_row_with_the_remedy() -> None:
    _, found = list_candidates(FOLDER, ON_GPU, ("flash-attn",))
    assert "sdopt[baseline]" in found.missing


def test_optimum_without_an_environment_says_how_to_make_one() -> None:
    _, peer = list_candidates(FOLDER, make_manifest(), ("optimum",))
    assert (peer.kind, peer.python, peer.settings_by_component()) == (CandidateKind.PEER, None, {})
    for word in ("venv", "optimum-onnx", "--peer-python"):
        assert word in peer.missing
    _, peer = list_candidates(FOLDER, make_manifest(), ("optimum",), Path("venv/bin/python"))
    assert (peer.missing, peer.python, peer.label) == ("", Path("venv/bin/python"), "optimum ONNX Runtime fp32")


def test_optimum_is_not_asked_for_what_it_cannot_draw() -> None:
    bf16 = make_manifest(unet=make_component(TensorRTSettings(kind="tensorrt-rtx"), Precision.BF16, DType.BF16))
    assert "bf16 graphs" in list_candidates(FOLDER, bf16, ("optimum",), Path("python"))[1].missing
    refiner = make_manifest()
    refiner.own_task = Task.IMAGE_TO_IMAGE
    assert "starts from a picture" in list_candidates(FOLDER, refiner, ("optimum",), Path("python"))[1].missing


def save_bundle(folder: Path, **changes: Any) -> tuple[Path, BundleManifest]:
    bundle = make_bundle(folder, **changes)
    write_manifest(folder, bundle.manifest)
    return folder, bundle.manifest


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Reference bundles have no graphs to check; gives the folders that would have been."""
    checked: list[Path] = []
    monkeypatch.setattr(candidates_module, "require_sound", lambda folder, manifest: checked.append(folder))
    return checked


def test_other_bundles_are_candidates_with_names_of_their_own(tmp_path: Path, unchecked: list[Path]) -> None:
    mine, manifest = save_bundle(tmp_path / "mine")
    names = ["a/New <b>", "b/new b", "c/…"]
    others = [save_bundle(tmp_path / name)[0] for name in names]
    found = list_candidates(mine, manifest, tuple(map(str, others)))[1:]
    assert [c.name for c in found] == ["bundle-new-b", "bundle-new-b-2", "bundle-other"]
    assert [(c.kind, c.folder, c.missing) for c in found] == [(CandidateKind.BUNDLE, other, "") for other in others]
    assert "New <b>" in found[0].label
    assert found[0].manifest.name != manifest.name
    assert unchecked == others


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"family": Family.SD2}, "family sd2, not sd1"),
        ({"profile": ShapeProfile.static(height_px=64, width_px=128)}, "picture size 128x64, not 64x64"),
        ({"profile": ShapeProfile.static(height_px=64, width_px=64, batch=2)}, "batch 2, not 1"),
    ],
)
def test_a_bundle_that_draws_something_else_is_a_row(
    tmp_path: Path, unchecked: list[Path], changes: dict[str, Any], said: str
) -> None:
    mine, manifest = save_bundle(tmp_path / "mine")
    other, _ = save_bundle(tmp_path / "other", **changes)
    _, found = list_candidates(mine, manifest, (str(other),))
    assert said in found.missing


def test_one_bundle_twice_makes_no_sense(tmp_path: Path, unchecked: list[Path]) -> None:
    mine, manifest = save_bundle(tmp_path / "mine")
    other, _ = save_bundle(tmp_path / "other")
    (tmp_path / "link").symlink_to(other)
    for against in ((str(mine),), (str(other), str(tmp_path / "link"))):
        with pytest.raises(UsageError, match="twice"):
            list_candidates(mine, manifest, against)


def test_another_bundle_is_checked_before_anything_opens_it(pristine_bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(pristine_bundle)
    other = tmp_path / "other"
    shutil.copytree(pristine_bundle, other)
    assert list_candidates(pristine_bundle, manifest, (str(other),))[1].missing == ""
    (other / "unet" / "model.onnx").write_bytes(b"planted")
    with pytest.raises(ArtifactError, match=r"unet/model\.onnx"):
        list_candidates(pristine_bundle, manifest, (str(other),))
    with pytest.raises(ArtifactError, match="not an sdopt bundle"):
        list_candidates(pristine_bundle, manifest, (str(tmp_path / "none"),))


def test_plans_of_another_bundle_must_be_trusted(
    pristine_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pristine_bundle, other)
    asked: list[tuple[Path, tuple[str, ...]]] = []

    def refuse(folder: Path, manifest: BundleManifest, named: tuple[str, ...]) -> None:
        asked.append((folder, named))
        raise UnsafeInputError("nobody vouched for it")

    monkeypatch.setattr(candidates_module, "require_trusted", refuse)
    with pytest.raises(UnsafeInputError):
        list_candidates(pristine_bundle, read_manifest(pristine_bundle), (str(other),), None, ("ab",))
    assert asked == [(other, ("ab",))]
