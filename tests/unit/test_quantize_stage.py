"""The stage that quantises, on engines and pictures that exist on paper only: what it tries, keeps, stages and says.

Blocks have planted figures. Real `Candidate`s ask for them; the child process of trials and the writer of graphs are
fakes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sdopt.convert.blocks.quantized_component as candidate_module
import sdopt.convert.blocks.select as stage
import sdopt.convert.blocks.trials as trials_module
from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.records import FidelityRecord, SpeedupRecord, Verdict
from sdopt.checkpoint.source import open_checkpoint
from sdopt.convert import fidelity as judge_module
from sdopt.convert.blocks.choose import Measurement, harm_of
from sdopt.convert.blocks.quantized_component import Candidate
from sdopt.convert.blocks.recording import Call
from sdopt.convert.blocks.select import explain_none, quantize
from sdopt.convert.blocks.trajectories import Trajectories
from sdopt.convert.blocks.trials import Trial, TrialJob, TrialRecord, measure_error, run_trials
from sdopt.convert.blocks.write import Stock
from sdopt.convert.build import Build
from sdopt.convert.fidelity import runnable_here
from sdopt.convert.plan import BuildPlan, resolve_build
from sdopt.disk.digest import FileRecord
from sdopt.disk.staging import Staging
from sdopt.disk.store import Store
from sdopt.errors import CalibrationError, FidelityError
from sdopt.fidelity.scene import DEFAULT_PROMPTS
from sdopt.graph.qdq import LayerChoice
from sdopt.graph.sites import WeightedLayer
from sdopt.model.backend_settings import OnnxRuntimeSettings, OpenVINOSettings, TensorRTSettings
from sdopt.model.component import ComponentName, ComponentSpec, TensorSpec, Tolerance
from sdopt.model.family import Family
from sdopt.model.precision import DType
from sdopt.model.quantization import ComponentQuantization, Scheme
from sdopt.model.recipe import parse_recipe
from sdopt.processes.channel import JsonTable
from tests.conftest import TINY_SHAPES
from tests.planted_plans import make_machine, make_plan, with_plans
from tests.reference_session import make_bundle

UNET, TEXT = ComponentName.UNET, ComponentName.TEXT_ENCODER
INT8, W8 = Scheme.INT8, Scheme.INT8_WEIGHTS
BASE_NS = 100_000_000
BASE_ERROR = 0.001


@dataclass(frozen=True)
class Block:
    """What a block of layers does to its component: the error that it adds, and the share of a run that it saves."""

    error: float = 0.005
    saves: float = 0.05
    layers: int = 2
    floats: int = 0


@dataclass
class Bench:
    """Fakes for what takes a process: engines that are measured, and graphs that are written."""

    blocks: dict[ComponentName, dict[str, Block]]
    measured: list[frozenset[str]] = field(default_factory=list)
    timed: bool = True

    def run_trials(self, job: TrialJob) -> dict[str, TrialRecord]:
        return {trial.key: self._measure(job.spec.name, trial.layers) for trial in job.trials}

    def _measure(self, name: ComponentName, layers: Mapping[str, LayerChoice]) -> TrialRecord:
        groups = frozenset(layer.rpartition(".")[0] for layer in layers)
        self.measured.append(groups)
        blocks = [self.blocks[name][group] for group in groups]
        took_ns = round(BASE_NS * (1 - sum(block.saves for block in blocks)))
        return TrialRecord(
            error=math.hypot(BASE_ERROR, *(block.error for block in blocks)), base_error=BASE_ERROR,
            base_ns=[BASE_NS] * 8 if self.timed else [], trial_ns=[took_ns] * 8 if self.timed else [],
            integer_layers=sum(block.layers - block.floats for block in blocks),
        )  # fmt: skip

    def publish(self, stock: Stock, target: Path, layers: Mapping[str, LayerChoice], label: str) -> FileRecord:
        groups = sorted({layer.rpartition(".")[0] for layer in layers})
        assert (stock.folder / "quantized.safetensors").is_file()
        target.mkdir()
        (target / "model.onnx").write_text("\n".join(groups))
        (target / "weights.safetensors").write_text("weights " + " ".join(groups))
        return FileRecord(sha256="0" * 64, size_bytes=1000 - 10 * len(layers))


@dataclass
class Pictures:
    """Stands for the judge of pictures: what is staged decides. `draws` are the choices that were drawn."""

    folder: Path
    fails: Any
    draws: list[dict[str, set[str]]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def set_base(self, draft: BundleManifest) -> None:
        assert "16-bit" in (self.folder / UNET / "model.onnx").read_text(), "the base is drawn with 16-bit engines"
        self.said.append("set")

    def drop_base(self) -> None:
        self.said.append("drop")

    def judge(self, draft: BundleManifest) -> FidelityRecord:
        choice = read_staged(self.folder)
        for name in draft.components:
            assert f"{name}/model.onnx" in draft.files, "what is drawn tells one choice from another"
        self.draws.append(choice)
        if fault := self.fails(choice):
            return FidelityRecord(verdict=Verdict.FAIL, reason=fault)
        # Where no GPU is, that the graphs pass is the best there is.
        return FidelityRecord(verdict=Verdict.GRAPHS_PASS, reason="they are alike")


def read_staged(folder: Path) -> dict[str, set[str]]:
    """The quantised blocks of each component in the staging folder; none of one that is as it was."""
    texts = {path.parent.name: path.read_text() for path in folder.glob("*/model.onnx")}
    return {name: set(text.split("\n")) - {"16-bit", ""} for name, text in texts.items()}


@pytest.fixture(scope="module")
def plan() -> BuildPlan:
    recipe = parse_recipe({"source": str(TINY_SHAPES), "precision": "int8"}, where="a test")
    return resolve_build(open_checkpoint(str(TINY_SHAPES)), recipe)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> BundleManifest:
    return make_bundle(tmp_path_factory.mktemp("made") / "bundle").manifest


class Workshop:
    """A stage that is ready to run, but for what takes a process."""

    def __init__(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: BuildPlan, draft: BundleManifest,
        blocks: dict[ComponentName, dict[str, Block]], fails: Any = lambda choice: "", *, draws: bool = True,
        timed: bool = True, **recipe: Any,
    ) -> None:  # fmt: skip
        self.bench = Bench(blocks, timed=timed)
        monkeypatch.setattr(candidate_module, "run_trials", self.bench.run_trials)
        monkeypatch.setattr(candidate_module, "publish_choice", self.bench.publish)
        monkeypatch.setattr(stage, "_prepare", lambda build, name, trajectories: self._make_candidate(name))
        monkeypatch.setattr(stage, "record_trajectories", self._record)
        self.staging = Staging(tmp_path / "out")
        self.prompts: list[str] = []
        for name in draft.components:
            folder = self.staging.folder / name
            folder.mkdir()
            (folder / "model.onnx").write_text("16-bit")
            for file in ("config.json", "weights.safetensors", "quantized.safetensors"):
                (folder / file).write_text("{}")
        changed = plan.recipe.model_copy(update=recipe)
        weights = {name: FileRecord(sha256="1" * 64, size_bytes=1000) for name in draft.components}
        self.pictures = Pictures(self.staging.folder, fails)
        if not draws:
            changed = changed.model_copy(update={"verify": changed.verify.model_copy(update={"fidelity": False})})
        self.build = Build(
            dataclasses.replace(plan, recipe=changed), tmp_path / "out", Store(tmp_path / "cache"), tmp_path / "cache",
            weights=weights, draft=draft.model_copy(update={"recipe": changed}),
        )  # fmt: skip
        self.build.__dict__.update(staging=self.staging, pictures=self.pictures)
        self.tmp_path = tmp_path

    @property
    def settings(self) -> Any:
        return self.build.plan.quantization

    def _record(
        self, folder: Path, draft: BundleManifest, store: Store, settings: Any, prompts: Any, cache: Path
    ) -> Any:
        self.prompts = list(prompts)
        return Trajectories((), (), "7" * 64)

    def _make_candidate(self, name: ComponentName) -> Candidate | None:
        if name not in self.bench.blocks:
            return None
        settings = self.settings.components[name]
        groups = {
            group: {f"{group}.{number}": LayerChoice(settings.scheme) for number in range(block.layers)}
            for group, block in self.bench.blocks[name].items()
        }
        spec: Any = SimpleNamespace(name=name)
        choices = {layer: choice for group in groups.values() for layer, choice in group.items()}
        job = TrialJob(
            Stock(self.staging.folder / name, DType.FP32, choices), spec, {}, Family.SD1, {}, OpenVINOSettings(),
            True, [], [], self.tmp_path / "cache",
        )  # fmt: skip
        return Candidate(settings, groups, job, "identity")

    def quantize(self) -> tuple[dict[str, set[str]], dict[ComponentName, dict[str, str]]]:
        """The blocks that are staged as quantised, and the reasons of the others."""
        self.result = quantize(self.build)
        records = {name: record.quantization for name, record in self.result.draft.components.items()}
        reasons = {
            name: {block.name: block.reason for block in record.blocks if not block.quantized}
            for name, record in records.items() if record is not None
        }  # fmt: skip
        return read_staged(self.staging.folder), reasons


Make = Any


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: BuildPlan, draft: BundleManifest) -> Make:
    return lambda *arguments, **options: Workshop(tmp_path, monkeypatch, plan, draft, *arguments, **options)


def name_blocks(count: int) -> dict[str, Block]:
    """Blocks of falling harm, so that the order of the graph is not that of harm."""
    return {f"block {number}": Block(error=0.001 * (count - number), saves=0.03) for number in range(count)}


def by_harm(blocks: Mapping[str, Block]) -> list[str]:
    return sorted(blocks, key=lambda name: blocks[name].error)


def test_a_block_that_int8_breaks_and_one_that_it_slows_down_stay_in_16_bits(make: Make) -> None:
    blocks = {
        "fine": Block(), "broken": Block(error=0.6), "slowed": Block(saves=-0.1), "also fine": Block(error=0.01),
        "in floats": Block(floats=1),
    }  # fmt: skip
    workshop = make({UNET: blocks})
    staged, reasons = workshop.quantize()
    assert staged["unet"] == {"fine", "also fine"}
    assert reasons[UNET]["broken"] == "error 60.0% alone, above 5.0%"
    assert reasons[UNET]["slowed"].startswith("slower: 0.91 times as fast")
    assert reasons[UNET]["in floats"].startswith("1 of its layers")
    record = workshop.result.draft.components[UNET].quantization
    assert [block.name for block in record.blocks] == list(blocks), "in the order of the graph"
    assert record.quantized_layers == 4
    assert record.error == pytest.approx(math.hypot(BASE_ERROR, 0.005, 0.01))
    assert record.base_error == BASE_ERROR
    assert record.speedup.value == pytest.approx(1 / 0.9)
    assert record.integer_layers == 4
    assert (record.weights_bytes, record.weights_bytes_16bit) == (960, 1000)
    assert record.trajectories == "7" * 64
    assert "2 of 5 blocks (4 layers) in int8: 1.11 times as fast" in record.describe()
    assert workshop.result.plan.components[UNET].quantized == {
        f"{group}.{number}": INT8 for group in ("fine", "also fine") for number in range(2)
    }
    assert workshop.result.weights[UNET].size_bytes == 960
    assert workshop.result.weights[TEXT].size_bytes == 1000
    assert workshop.result.draft.components[TEXT].quantization is None
    assert BundleManifest.model_validate_json(workshop.result.draft.to_json()) == workshop.result.draft


@pytest.mark.parametrize("bear", range(14))
def test_halving_keeps_all_that_the_pictures_bear(bear: int, make: Make) -> None:
    """The pictures bear so many blocks, the gentlest first; each drawing is dear."""
    blocks = name_blocks(13)
    blocks = {name: Block(error=block.error / 5, saves=0.03) for name, block in blocks.items()}
    workshop = make({UNET: blocks}, lambda choice: "too far from torch" if len(choice["unet"]) > bear else "")
    staged, reasons = workshop.quantize()
    assert staged["unet"] == set(by_harm(blocks)[:bear])
    assert all(
        reason == "the pictures leave the budget with it: too far from torch" for reason in reasons[UNET].values()
    )
    assert len(reasons[UNET]) == 13 - bear
    assert len(workshop.pictures.draws) <= 2 + math.ceil(math.log2(13))
    assert all(drawn["unet"] == set(by_harm(blocks)[: len(drawn["unet"])]) for drawn in workshop.pictures.draws)
    if bear == 13:
        assert len(workshop.pictures.draws) == 1, "what passes whole is not searched"


def test_what_is_published_is_what_passed(make: Make) -> None:
    """Faults that are not monotone: the search may miss a larger set, but never stages one that failed."""
    blocks = name_blocks(7)

    def fails(choice: dict[str, set[str]]) -> str:
        return "odd" if len(choice["unet"]) in (5, 7) else ""

    workshop = make({UNET: blocks}, fails)
    staged, _ = workshop.quantize()
    assert len(staged["unet"]) == 4, "and six would do"
    assert staged in workshop.pictures.draws


def test_one_bad_block_among_the_gentlest_takes_what_is_harsher_with_it_and_says_so(make: Make) -> None:
    blocks = name_blocks(6)
    order = by_harm(blocks)
    workshop = make({UNET: blocks}, lambda choice: "a hole" if order[2] in choice["unet"] else "")
    staged, reasons = workshop.quantize()
    assert staged["unet"] == set(order[:2])
    assert all("a hole" in reasons[UNET][name] for name in order[2:])


def test_where_no_choice_draws_well_nothing_is_quantised_and_the_bundle_is_that_of_16_bits(make: Make) -> None:
    workshop = make({UNET: name_blocks(5), TEXT: {"all layers": Block(saves=0.0)}}, lambda choice: "a black picture")
    staged, reasons = workshop.quantize()
    assert not any(staged.values())
    assert all("a black picture" in reason for each in reasons.values() for reason in each.values())
    assert sorted(reasons) == [TEXT, UNET]
    assert len(reasons[UNET]) == 5
    record = workshop.result.draft.components[UNET].quantization
    assert record.error is None
    assert record.speedup is None
    assert record.describe() == "no block of 5 pays in int8"
    assert not workshop.result.draft.components[UNET].is_quantized
    assert workshop.result.plan.components[UNET].quantized == {}
    assert workshop.result.weights[UNET].size_bytes == 1000
    assert workshop.pictures.said == ["set", "drop"], "a bundle of 16 bits has the limits of 16 bits"


def test_blocks_of_all_components_compete_by_harm(make: Make) -> None:
    blocks = {
        UNET: {"gentle": Block(0.001, 0.2), "harsh": Block(0.04, 0.03)},
        TEXT: {"all layers": Block(0.01, 0.02)},
    }

    def fails(choice: dict[str, set[str]]) -> str:
        return "blurred" if sum(map(len, choice.values())) > 2 else ""

    workshop = make(blocks, fails)
    staged, reasons = workshop.quantize()
    assert staged["unet"] == {"gentle"}
    assert staged["text_encoder"] == {"all layers"}
    assert "blurred" in reasons[UNET]["harsh"]
    assert reasons[TEXT] == {}
    assert workshop.pictures.draws[0] == {**staged, "unet": {"gentle", "harsh"}}


def test_what_is_left_by_the_pictures_has_to_be_faster_still(make: Make) -> None:
    """The block that made it worth while is the one that the pictures do not bear."""
    blocks = {"fast": Block(0.04, 0.3), "gentle": Block(0.0001, 0.004), "gentle too": Block(0.0001, 0.004)}
    workshop = make({UNET: blocks}, lambda choice: "smeared" if "fast" in choice["unet"] else "")
    staged, reasons = workshop.quantize()
    assert staged["unet"] == set()
    assert "smeared" in reasons[UNET]["fast"]
    assert reasons[UNET]["gentle"].startswith("all together are not faster: 1.01 times")
    assert workshop.result.weights[UNET].size_bytes == 1000
    assert workshop.pictures.said[-1] == "drop"


def test_without_pictures_measurements_alone_decide(make: Make) -> None:
    workshop = make({UNET: {**name_blocks(4), "broken": Block(0.5)}}, draws=False)
    staged, reasons = workshop.quantize()
    assert staged["unet"] == set(name_blocks(4))
    assert list(reasons[UNET]) == ["broken"]
    assert workshop.pictures.draws == []


def test_engines_that_do_not_run_here_are_judged_by_error_and_pictures(make: Make) -> None:
    blocks = {"fine": Block(saves=-5), "broken": Block(error=0.2, saves=0.9)}
    workshop = make({UNET: blocks}, timed=False)
    staged, _ = workshop.quantize()
    assert staged["unet"] == {"fine"}
    record = workshop.result.draft.components[UNET].quantization
    assert record.speedup is None
    assert "not timed here" in record.describe()


def test_nothing_that_pays_costs_no_drawing_and_leaves_the_engines_alone(make: Make) -> None:
    workshop = make({UNET: {"slow": Block(saves=-0.2)}})
    staged, reasons = workshop.quantize()
    assert workshop.pictures.draws == []
    assert "set" not in workshop.pictures.said
    assert not any(staged.values())
    assert (workshop.staging.folder / "unet" / "model.onnx").read_text() == "16-bit"
    assert workshop.result.weights == workshop.build.weights
    assert reasons[UNET]["slow"].startswith("slower")


@pytest.mark.parametrize(
    ("blocks", "fails", "said"),
    [
        ({UNET: {"slow": Block(saves=-0.2), "harsh": Block(error=0.3)}}, "",
         "of 2, the gentlest (slow) stays in 16 bits: slower: 0.83"),
        ({UNET: {"fine": Block()}}, "a black picture", "the pictures leave the budget with it: a black picture"),
        ({}, "", "no layer that the quantization file names"),
    ],
)  # fmt: skip
def test_a_bundle_that_has_to_be_quantised_and_is_not_is_no_bundle(
    blocks: Any, fails: str, said: str, make: Make
) -> None:
    workshop = make(blocks, lambda choice: fails if choice["unet"] else "", require_quantized=True)
    with pytest.raises(FidelityError) as caught:
        workshop.quantize()
    assert caught.value.exit_code == 3
    assert said in caught.value.message
    assert "--require" in caught.value.hint


def test_a_bundle_that_has_to_be_quantised_and_is_passes(make: Make) -> None:
    assert make({UNET: {"fine": Block(), "slow": Block(saves=-1)}}, require_quantized=True).quantize()[0]["unet"]


def test_scales_that_cannot_be_found_stop_the_build(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop = make({UNET: {"fine": Block()}})

    def prepare(*arguments: Any) -> None:
        raise CalibrationError("the layer 'a' cannot be calibrated: its input is always 0")

    monkeypatch.setattr(stage, "_prepare", prepare)
    with pytest.raises(CalibrationError, match="the layer 'a'"):
        workshop.quantize()


def test_prompts_that_pictures_are_judged_by_are_not_calibrated_with(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    drawn = DEFAULT_PROMPTS[0]
    file.write_text(f"a cat\n{drawn}\na dog\n")
    workshop = make({UNET: {"fine": Block()}})
    settings = workshop.settings
    calibration = settings.calibration.model_copy(update={"prompts": str(file)})
    changed = settings.model_copy(update={"calibration": calibration})
    workshop.build.plan = dataclasses.replace(workshop.build.plan, quantization=changed)
    workshop.quantize()
    assert workshop.prompts == ["a cat", "a dog"]


@pytest.mark.parametrize(("slower", "kept"), [(0.08, True), (0.12, False)])
def test_other_networks_may_cost_a_hundredth_of_a_picture(slower: float, kept: bool, make: Make) -> None:
    """A picture is ten runs of the UNet here: a text encoder that takes as long as one may be a tenth slower."""
    workshop = make({TEXT: {"all layers": Block(saves=-slower)}, UNET: {"fine": Block()}})
    assert workshop.build.plan.recipe.verify.steps == 10
    staged, reasons = workshop.quantize()
    assert bool(staged["text_encoder"]) == kept
    assert kept or reasons[TEXT]["all layers"] == "slower by 12.0 ms, of which 10.0 ms are borne"


harms = st.lists(st.tuples(st.floats(0, 0.2), st.floats(-0.5, 0.09)), min_size=1, max_size=10)


@given(harms, st.integers(0, 10))
def test_any_blocks_and_any_pictures_end_in_what_passed(figures: list[tuple[float, float]], bear: int) -> None:
    """Of the search alone: no file is written."""
    made = SimpleNamespace(
        name=UNET,
        verdicts={str(n): SimpleNamespace(measured=trial_of(e, s)) for n, (e, s) in enumerate(figures)},
        kept=tuple(str(n) for n in range(len(figures))),
    )
    chosen: list[Collection[str]] = []
    ranked = sorted(made.kept, key=lambda group: (harm_of(made.verdicts[group].measured), group))

    def keep_only(groups: Collection[str], reason: str) -> None:
        chosen.append(groups)
        made.kept = tuple(group for group in made.kept if group in groups)

    made.keep_only, made.confirm = keep_only, lambda: None
    made.publish = lambda target, groups: frozenset(groups)
    staged: list[frozenset[str]] = []

    def judge(build: Any, weights: Mapping[ComponentName, Any]) -> str:
        staged.append(weights[UNET])
        return "too far" if len(weights[UNET]) > bear else ""

    build: Any = SimpleNamespace(staging=SimpleNamespace(folder=Path("staged")), weights={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_judge", judge)
        records = stage._hold_pictures(build, [made])
    assert records == {UNET: frozenset(ranked[:bear])}
    assert set(made.kept) == set(ranked[:bear])
    assert len(staged) == len(set(staged)) <= 2 + math.ceil(math.log2(len(figures)))


def trial_of(error: float, saves: float) -> Any:
    value = 1 / (1 - saves)
    return Measurement(error, SpeedupRecord(value=value, low=value, high=value))


def test_the_gentlest_block_tells_why_nothing_is_quantised() -> None:
    assert "no layer" in explain_none([])
    verdicts = {"a": SimpleNamespace(measured=trial_of(0.2, 0), reason="A"),
                "b": SimpleNamespace(measured=trial_of(0.1, 0), reason="B")}  # fmt: skip
    said = explain_none([SimpleNamespace(verdicts=verdicts)])  # type: ignore[list-item]
    assert said == "of 2, the gentlest (b) stays in 16 bits: B"


def test_layers_are_grouped_and_what_does_not_take_the_scheme_is_left_out() -> None:
    layers = [
        WeightedLayer("conv_in", "Conv", (8, 4, 3, 3)),
        WeightedLayer("mid_block.resnets.0.conv1", "Conv", (8, 8, 3, 3)),
        WeightedLayer("mid_block.attentions.0.to_q", "MatMul", (8, 128)),
        WeightedLayer("mid_block.attentions.0.to_k", "MatMul", (8, 96)),
        WeightedLayer("embedding", "Gather", (8, 128)),
    ]

    def group(scheme: Scheme, *, smooth: bool = False) -> dict[str, dict[str, LayerChoice]]:
        settings = ComponentQuantization(scheme=scheme, keep=("conv_in",))
        return stage._group_layers(settings, layers, smooth=smooth)

    q, k, conv = "mid_block.attentions.0.to_q", "mid_block.attentions.0.to_k", "mid_block.resnets.0.conv1"
    assert group(INT8, smooth=True) == {
        "mid_block": {conv: LayerChoice(INT8), q: LayerChoice(INT8, smooth=True), k: LayerChoice(INT8, smooth=True)}
    }
    weights = group(W8, smooth=True)
    assert weights.keys() == {"mid_block", "embedding"}
    assert not any(choice.smooth for each in weights.values() for choice in each.values())
    assert group(Scheme.INT4_WEIGHTS) == {"mid_block": {q: LayerChoice(Scheme.INT4_WEIGHTS)}}


# Measurements that are kept


def make_trial(number: int) -> Trial:
    return Trial(f"{number}" * 64, f"block {number}", {f"layer {number}": LayerChoice(INT8)})


def make_job(cache: Path, trials: list[Trial]) -> TrialJob:
    spec = ComponentSpec(UNET, (), (), Tolerance(1e-3, 1e-6))
    return TrialJob(
        Stock(cache, DType.FP32, {}), spec, {}, Family.SD1, {}, OpenVINOSettings(), True, [cache / "held-out"], trials,
        cache,
    )  # fmt: skip


def test_trials_that_were_interrupted_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, asked = Store(tmp_path), []

    def call_here(function: Any, arguments: JsonTable, killed_after: int = 9) -> None:
        assert function is trials_module.measure_in_child
        job = trials_module._JOB.validate_python(arguments)
        assert job.runtime == OpenVINOSettings()
        asked.append([trial.label for trial in job.trials])
        for done, trial in enumerate(job.trials):
            if done == killed_after:
                raise KeyboardInterrupt
            record = TrialRecord(
                error=int(trial.key[0]) / 100, base_error=0, base_ns=[], trial_ns=[], integer_layers=None
            )
            trials_module.SHELF.put(store, trial.key, record)

    job = make_job(tmp_path, [make_trial(number) for number in range(4)])
    monkeypatch.setattr(trials_module, "call", lambda *arguments: call_here(*arguments, killed_after=2))
    with pytest.raises(KeyboardInterrupt):
        run_trials(job)
    monkeypatch.setattr(trials_module, "call", call_here)
    assert {key[0]: record.error for key, record in run_trials(job).items()} == {
        "0": 0.0, "1": 0.01, "2": 0.02, "3": 0.03,
    }  # fmt: skip
    run_trials(job)
    assert asked == [[f"block {n}" for n in range(4)], ["block 2", "block 3"]]


def test_a_trial_is_known_by_its_layers_and_all_that_they_depend_on(make: Make) -> None:
    workshop = make({UNET: {"a": Block(), "b": Block()}})
    ours = workshop._make_candidate(UNET)
    keys = {ours._make_trial(groups).key for groups in (("a",), ("b",), ("a", "b"))}
    other = Candidate(ours.settings, ours.groups, ours._job, "of another checkpoint")
    smoothed = {
        group: {layer: LayerChoice(INT8, smooth=True) for layer in layers} for group, layers in ours.groups.items()
    }
    keys |= {
        other._make_trial(("a",)).key,
        Candidate(ours.settings, smoothed, ours._job, "identity")._make_trial(("a",)).key,
    }
    assert len(keys) == 5
    assert ours._make_trial(("a",)).key in keys


class Engine:
    """A session that gives what it was told to."""

    def __init__(self, **outputs: torch.Tensor) -> None:
        axes = tuple(TensorSpec(name, DType.FP32, (4,)) for name in outputs)
        self.spec = ComponentSpec(UNET, (TensorSpec("x", DType.FP16, (4,)),), axes, Tolerance(1e-3, 1e-6))
        self.outputs = outputs

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert inputs["x"].dtype is torch.float16, "in the types that the graph takes"
        return self.outputs


def error_of(given: dict[str, list[float]], expected: dict[str, list[float]]) -> float:
    call = Call({"x": torch.zeros(4)}, {name: torch.tensor(values) for name, values in expected.items()})
    session: Any = Engine(**{name: torch.tensor(values) for name, values in given.items()})
    return measure_error(session, [call, call])


def test_an_error_is_relative_and_that_of_the_worst_output() -> None:
    assert error_of({"a": [3.0, 4, 0, 0]}, {"a": [3.0, 4, 0, 0]}) == 0
    assert error_of({"a": [3.0, 4, 0, 0.5]}, {"a": [3.0, 4, 0, 0]}) == pytest.approx(0.1)
    assert error_of({"a": [0.0] * 4, "b": [1.0] * 4}, {"a": [1.0] * 4, "b": [1.0] * 4}) == 1
    assert error_of({"b": [1.0] * 4, "a": [0.0] * 4}, {"a": [1.0] * 4, "b": [1.0] * 4}) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_error_that_is_no_number_is_above_any_limit_and_goes_through_json(value: float) -> None:
    error = error_of({"a": [1.0, 1, 1, value]}, {"a": [1.0] * 4})
    assert error >= 1e30
    record = TrialRecord(error=error, base_error=0, base_ns=[], trial_ns=[], integer_layers=None)
    assert TrialRecord.model_validate_json(record.model_dump_json()) == record
    assert error_of({"a": [1.0] * 4}, {"a": [0.0] * 4}) >= 1e30, "something, where torch gives nothing"
    assert error_of({"a": [0.0] * 4}, {"a": [0.0] * 4}) == 0


# Where plans are still to be built


def test_engines_without_plans_are_drawn_by_their_graphs_also_beside_a_gpu(
    draft: BundleManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a target of TensorRT are chosen before its plans are built: there is nothing to open yet."""
    monkeypatch.setattr(judge_module, "require_runnable", lambda *arguments: {})  # a machine that has it all
    backend = TensorRTSettings(kind="tensorrt-rtx")
    components = {name: record.model_copy(update={"backend": backend}) for name, record in draft.components.items()}
    drawn, obstacle = runnable_here(draft.model_copy(update={"components": components}), tmp_path, make_machine())
    assert {record.backend for record in drawn.components.values()} == {OnnxRuntimeSettings()}
    assert "not built" in obstacle
    built = with_plans(draft, {name: [make_plan("sm89", name)] for name in draft.components})
    assert runnable_here(built, tmp_path, make_machine()) == (built, "")
    assert runnable_here(draft, tmp_path, None) == (draft, "")
