"""A peer in an environment of its own: what it is asked, what it must answer, and every way in which it can fail."""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdopt.bench.case.candidates import Candidate, list_candidates
from sdopt.bench.case.report import Stage
from sdopt.bench.measure import optimum_peer as peer_optimum
from sdopt.bench.measure import steady
from sdopt.bench.measure.peer import run_peer
from sdopt.bench.measure.steady import Effort
from sdopt.bundle.manifest import BundleManifest, write_manifest
from sdopt.errors import MissingDependency, SdoptError
from sdopt.fidelity.scene import Scene, write_scene
from sdopt.processes.channel import JsonTable
from tests.reference_session import make_bundle

ANSWER = 'import json, sys\njob = json.load(sys.stdin)\nprint(json.dumps({"value": job, "peak_rss_bytes": 7}))'


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BundleManifest]:
    made = make_bundle(tmp_path_factory.mktemp("peer") / "b")
    write_manifest(made.folder, made.manifest)
    return made.folder, made.manifest


def write_interpreter(folder: Path, program: str) -> Path:
    """A program that takes an interpreter's place, whatever script it is given."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{program}\n")
    path.chmod(0o755)
    return path


def make_peer(bundle: tuple[Path, BundleManifest], python: Path) -> Candidate:
    _, peer = list_candidates(*bundle, ("optimum",), python)
    assert peer.missing == ""
    return peer


def describe(tmp_path: Path) -> JsonTable:
    scene = Scene(prompts=("a <b>", "ש" * 9), seed=3, steps=4, guidance_scale=5.0, inputs=tmp_path / "inputs")
    return {"scene": scene.model_dump(mode="json"), "label": "optimum", "output": "", "effort": asdict(Effort())}


def test_it_is_asked_for_the_same_scene(bundle: tuple[Path, BundleManifest], tmp_path: Path) -> None:
    peer = make_peer(bundle, write_interpreter(tmp_path, ANSWER))
    outcome = run_peer(peer, describe(tmp_path), 60)
    job = outcome.value
    assert outcome.peak_rss_bytes == 7
    assert job["prompts"] == ["a <b>", "ש" * 9]
    assert (job["steps"], job["guidance_scale"], job["inputs"]) == (4, 5.0, str(tmp_path / "inputs"))
    assert (job["folder"], job["width_px"], job["height_px"], job["batch"]) == (str(peer.folder), 64, 64, 1)
    assert (job["scheduler_class"], job["scheduler_label"]) == ("DDIMScheduler", "DDIM")
    assert job["scheduler_config"]["clip_sample"] is False
    assert job["provider"] == "CPUExecutionProvider"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; sys.exit('no such luck')", "no such luck"),
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("print('Welcome!')", "not a message of the protocol: 'Welcome!'"),
        ("print('[1]')", "not a message"),
        ("print('{\"value\": {}}')", "not a message"),
        ("import sys; sys.stdout.buffer.write(b'\\xff\\n')", "not a message"),
        ('print(\'{"error": "", "message": "out of luck", "hint": ""}\')', "out of luck"),
        ("", "ended with exit code 0"),
    ],
)
def test_a_failure_says_what_the_peer_said(
    bundle: tuple[Path, BundleManifest], tmp_path: Path, program: str, said: str
) -> None:
    peer = make_peer(bundle, write_interpreter(tmp_path, program))
    with pytest.raises(SdoptError, match=said):
        run_peer(peer, describe(tmp_path), 60)


def test_one_that_hangs_is_ended(bundle: tuple[Path, BundleManifest], tmp_path: Path) -> None:
    program = f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    peer = make_peer(bundle, write_interpreter(tmp_path, program))
    with pytest.raises(SdoptError, match="did not finish in the time"):
        run_peer(peer, describe(tmp_path), 3)
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_a_python_that_is_none_is_told(bundle: tuple[Path, BundleManifest], tmp_path: Path) -> None:
    (tmp_path / "python").write_text("text")
    with pytest.raises(SdoptError, match="cannot be started"):
        run_peer(make_peer(bundle, tmp_path / "python"), describe(tmp_path), 60)


def test_an_environment_without_optimum_is_told(bundle: tuple[Path, BundleManifest], tmp_path: Path) -> None:
    with pytest.raises(MissingDependency, match="has no optimum"):
        run_peer(make_peer(bundle, Path(sys.executable)), describe(tmp_path), 60)


def test_the_program_needs_nothing_of_sdopt() -> None:
    tree = ast.parse(Path(peer_optimum.__file__).read_text("utf-8"))
    froms = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    names = {each.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for each in node.names}
    assert "optimum" in froms
    assert "sdopt" not in froms | names


EFFORTS = st.builds(
    Effort, least_pictures=st.integers(1, 3), most_pictures=st.integers(3, 8), picture_budget_s=st.floats(0.1, 9),
    settle_window=st.integers(1, 3), most_warm_up=st.integers(0, 9),
)  # fmt: skip
TIMES_NS = st.lists(st.sampled_from([10**8, 101 * 10**6, 10**9, 2 * 10**9]), min_size=20, max_size=20)


@given(EFFORTS, TIMES_NS, st.lists(st.sampled_from([10**8, 10**9]), max_size=3))
def test_it_warms_up_and_counts_as_every_candidate_does(effort: Effort, times: list[int], done: list[int]) -> None:
    def both(*calls: Any) -> list[Any]:
        return [list(call(iter(times).__next__)) for call in calls]

    ours, its = both(
        lambda run: steady.warm_up(run, done, times[0], effort),
        lambda run: peer_optimum.warm_up(run, done, times[0], asdict(effort)),
    )
    assert ours == its
    assert steady.has_settled(ours, effort) == peer_optimum.has_settled(its, asdict(effort))
    ours, its = both(
        lambda run: steady.time_calls(run, effort, None, lambda share: None).samples_ns,
        lambda run: peer_optimum.time_calls(run, asdict(effort), lambda share: None),
    )
    assert ours == its


class FakePipeline:
    """optimum's pipeline: takes the latents it is given through its parts, and draws what it is told."""

    def __init__(self) -> None:
        self.unet, self.text_encoder, self.vae_decoder = (FakePart() for _ in range(3))
        self.calls: list[dict[str, Any]] = []

    @classmethod
    def from_pretrained(cls, folder: str, provider: str) -> FakePipeline:
        assert (Path(folder) / "bundle.json").is_file()
        return cls()

    def set_progress_bar_config(self, disable: bool) -> None:
        assert disable

    def __call__(self, **call: Any) -> Any:
        import numpy as np

        self.calls.append(call)
        self.text_encoder.forward()
        latents = call["latents"]
        for step in range(call["num_inference_steps"]):
            latents = self.unet.forward(latents)
            call["callback_on_step_end"](self, step, 0, {"latents": latents})
        count = len(call["prompt"])
        images = np.full((count, 64, 64, 3), float(self.vae_decoder.forward(latents).mean()), np.float64)
        return type("Output", (), {"images": images})


class FakePart:
    def forward(self, value: Any = None) -> Any:
        return value if value is None else value * 0.5


def test_what_the_program_draws_and_times(
    bundle: tuple[Path, BundleManifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import types

    import numpy as np

    from sdopt.fidelity.drawings import read_drawing

    folder, manifest = bundle
    scene = Scene(prompts=("a", "b", "c"), seed=3, steps=4, guidance_scale=5.0, inputs=tmp_path / "inputs")
    write_scene(folder, manifest, scene)
    arguments = describe(tmp_path) | {"scene": scene.model_dump(mode="json"), "output": str(tmp_path / "drawing")}
    job = run_peer(make_peer(bundle, write_interpreter(tmp_path, ANSWER)), arguments, 60).value
    module: Any = types.ModuleType("optimum.onnxruntime")
    module.ORTDiffusionPipeline = FakePipeline
    monkeypatch.setitem(sys.modules, "optimum.onnxruntime", module)
    monkeypatch.setitem(sys.modules, "optimum", types.ModuleType("optimum"))
    value = peer_optimum.measure(json.loads(json.dumps(job)), lambda what, share: None)

    drawing = read_drawing(tmp_path / "drawing")
    assert (drawing.images.shape, drawing.latents.shape) == ((3, 64, 64, 3), (3, 4, 4, 16, 16))
    assert np.allclose(drawing.latents[:, 0], drawing.latents[:, 1] * 2)
    assert not np.allclose(drawing.latents[0], drawing.latents[1])
    assert drawing.scheduler == value["scheduler"] == "DDIM"
    samples = {Stage(stage): each for stage, each in value["samples_ns"].items()}
    calls = len(samples[Stage.END_TO_END])
    assert calls == Effort().most_pictures
    counts = {stage: len(each) // calls for stage, each in samples.items()}
    assert counts == {
        Stage.TEXT_ENCODER: 1, Stage.UNET_STEP: 4, Stage.VAE_DECODER: 1, Stage.END_TO_END: 1, Stage.OVERHEAD: 1,
        Stage.FIRST_STEP: 1,
    }  # fmt: skip
    networks = (Stage.TEXT_ENCODER, Stage.UNET_STEP, Stage.VAE_DECODER, Stage.OVERHEAD)
    assert sum(sum(samples[stage]) for stage in networks) == sum(samples[Stage.END_TO_END])
    assert {steps: len(each) for steps, each in value["sweep_ns"].items()} == {4: calls, 1: 1, 2: 1}
