"""Builds, checks and times what this machine's GPU can run, the most valuable first, and stops when the time is up.

    scripts/gpu
    scripts/gpu --minutes 20 --case sd15
    scripts/gpu --candidate onnxruntime --candidate tensorrt-rtx   # adds to the report of an earlier run
    scripts/gpu --dry                # the same steps on the CPU with the checkpoint that ships with the package

Where nothing can be downloaded, `python -m benchmarks.gpu_run` does the same in the Python that is there.

Networks of the full size with random weights: SD1.5 (512x512, 50 steps) and SDXL (1024x1024, 30 steps). Candidates:
torch eager in fp16, ONNX Runtime CUDA, TensorRT-RTX, TensorRT, torch.compile (max-autotune, channels last; it compiles
for minutes and comes last); each in a fresh process, by sdopt's own build and bench. `report.json` is written after
each, so that what was measured is kept whatever comes next; what was left out is there with the reason. Each one's
picture is compared with that of torch in fp32. Exits with 5 where there is no GPU.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from benchmarks.roofline import find_peak_flops
from sdopt.backends.component_files import component_files
from sdopt.backends.probes import probe_backend
from sdopt.bench.case.report import Stage
from sdopt.bench.measure.roofline import count_flops
from sdopt.bench.measure.steady import Effort
from sdopt.bundle.manifest import read_manifest
from sdopt.bundle.plan_header import find_rtx_target
from sdopt.disk.files import write_file
from sdopt.errors import SdoptError
from sdopt.fidelity.candidate import dump_settings
from sdopt.fidelity.compare_drawings import compare_drawings, format_psnr
from sdopt.fidelity.drawings import draw_isolated, read_drawing
from sdopt.fidelity.scene import Scene, write_scene
from sdopt.machine.environment import describe_machine
from sdopt.model.backend_settings import BackendSettings, OnnxRuntimeSettings, TensorRTSettings, TorchSettings
from sdopt.model.component import ComponentName
from sdopt.model.file_names import MANIFEST_NAME
from sdopt.model.precision import Precision
from sdopt.processes.call import call_by_name

_REPOSITORY = Path(__file__).resolve().parent.parent
_TINY = _REPOSITORY / "sdopt" / "assets" / "tiny-shapes"
# Less is not enough to open an engine and draw a picture.
_LEAST_S = 15.0
# Of the time that is left, so that one that compiles for minutes leaves some for those after it.
_LARGEST_SHARE = 0.6
_STAGES = (Stage.TEXT_ENCODER, Stage.UNET_STEP, Stage.VAE_DECODER, Stage.OVERHEAD, Stage.END_TO_END)


@dataclass(frozen=True)
class Case:
    """What is drawn."""

    name: str
    steps: int


@dataclass(frozen=True)
class Candidate:
    """`settings` open the graphs of the base bundle; with a `target`, a bundle of plans is built and opened instead."""

    name: str
    settings: BackendSettings
    target: str = ""


@dataclass
class Row:
    """What was measured of one candidate. `message` says why there is nothing."""

    candidate: str
    message: str = ""
    stages_ms: dict[str, float] = field(default_factory=dict)
    """Medians; of `unet_step`, one guided step."""
    pictures_per_s: float | None = None
    unet_roofline: float | None = None
    """Share of the peak arithmetic of the GPU that a step of the UNet reaches."""
    peak_device_bytes: int | None = None
    torch_peak_device_bytes: int | None = None
    load_s: float | None = None
    build_s: float | None = None
    psnr_db: float | None = None
    ssim: float | None = None


# Of a candidate that the GPU's generation has no plans for.
_NO_TARGET = "none"
CASES = {"sd15": Case("sd15", 50), "sdxl": Case("sdxl", 30)}
DRY_CASE = Case("tiny-shapes", 4)


def list_candidates(generation: str) -> dict[str, Candidate]:
    """By the name that `--candidate` takes, in the order of measuring.

    TensorRT-RTX runs on some generations alone; on others, sm90 among them, the plan is not built and the row says why.
    """
    fp16 = TorchSettings(device="cuda", precision=Precision.FP16)
    target = find_rtx_target(generation) if generation else None
    rtx = _NO_TARGET if target is None else str(target)
    return {
        "eager": Candidate("torch eager fp16", fp16),
        "onnxruntime": Candidate("ONNX Runtime CUDA fp16", OnnxRuntimeSettings(device="cuda")),
        "tensorrt-rtx": Candidate("TensorRT-RTX fp16", TensorRTSettings(kind="tensorrt-rtx"), rtx),
        "tensorrt": Candidate("TensorRT fp16", TensorRTSettings(kind="tensorrt"), "tensorrt"),
        "compile": Candidate("torch.compile fp16", fp16.model_copy(update={"compile": True})),
    }


DRY_CANDIDATES = (
    Candidate("torch eager fp32", TorchSettings()),
    Candidate("ONNX Runtime fp32", OnnxRuntimeSettings()),
    Candidate("TensorRT-RTX fp16", TensorRTSettings(kind="tensorrt-rtx"), "rtx"),
)


class Deadline:
    """The time that is left, in seconds."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    def take(self, share: float = _LARGEST_SHARE) -> float:
        """Seconds for the next piece of work. Raises `SdoptError` where too few are left."""
        if self.left_s < _LEAST_S:
            raise SdoptError("the time was up")
        return max(_LEAST_S, self.left_s * share)


class Run:
    """One case: its checkpoint, its bundles, its rows."""

    def __init__(self, case: Case, work: Path, deadline: Deadline, gpu: str | None) -> None:
        self.case, self.deadline, self.gpu = case, deadline, gpu
        self.folder = work / case.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._reference: Any = None

    @property
    def base(self) -> Path:
        return self.folder / "graphs"

    def prepare(self) -> None:
        """The checkpoint, and a bundle with graphs and weights alone: torch and ONNX Runtime need no more.

        What an earlier run prepared is used again.
        """
        source = _TINY
        if self.gpu is not None:
            source = self.folder / "checkpoint"
            if not (source / "model_index.json").is_file():
                script = _REPOSITORY / "benchmarks" / "random_checkpoints.py"
                self._call([sys.executable, str(script), self.case.name, str(source)], share=1.0)
        self._source = source
        precision = "fp32" if self.gpu is None else "fp16"
        if not (self.base / MANIFEST_NAME).is_file():
            self._convert(self.base, "--target", "onnxruntime", "--precision", precision)
        manifest = read_manifest(self.base)
        verify = manifest.recipe.verify
        self.scene = Scene(
            prompts=("a large red circle on a blue background",), seed=verify.seed, steps=self.case.steps,
            guidance_scale=verify.guidance_scale, inputs=self.folder / "inputs.safetensors",
        )  # fmt: skip
        write_scene(self.base, manifest, self.scene)
        self.flops = count_flops(component_files(self.base, manifest, ComponentName.UNET))

    def measure(self, candidate: Candidate) -> Row:
        """A row, with the reason where there is no figure."""
        row = Row(candidate.name)
        try:
            if candidate.target == _NO_TARGET:
                raise SdoptError(f"{candidate.settings.kind} does not run on this GPU's generation")
            probe = probe_backend(candidate.settings)
            if not probe.available:
                raise SdoptError(f"{probe.missing}: {probe.remedy}")
            folder, settings = self.base, dump_settings(candidate.settings)
            if candidate.target:
                folder, settings, started = self.folder / candidate.settings.kind, None, time.monotonic()
                self._convert(folder, "--target", candidate.target)
                row.build_s = time.monotonic() - started
            self._measure(row, folder, settings)
        except SdoptError as error:
            row.message = error.message
        return row

    def _measure(self, row: Row, folder: Path, settings: dict[str, Any] | None) -> None:
        output = self.folder / "drawing.safetensors"
        arguments = {
            "folder": str(folder), "manifest": read_manifest(folder).model_dump_json(), "settings": settings,
            "scene": self.scene.model_dump(mode="json"), "output": str(output), "label": row.candidate,
            "effort": asdict(Effort(least_pictures=2, most_pictures=6, picture_budget_s=4.0)),
            "launched_ns": time.monotonic_ns(),
        }  # fmt: skip
        outcome = call_by_name("sdopt.bench.measure.measure:measure", arguments, timeout_s=self.deadline.take())
        samples = {Stage(stage): times for stage, times in outcome.value["samples_ns"].items()}
        row.stages_ms = {stage: statistics.median(samples[stage]) / 1e6 for stage in _STAGES if stage in samples}
        row.pictures_per_s = 1e3 / row.stages_ms[Stage.END_TO_END]
        peak = find_peak_flops(self.gpu or "")
        if peak:
            row.unet_roofline = self.flops / (row.stages_ms[Stage.UNET_STEP] / 1e3 * peak)
        row.peak_device_bytes = outcome.value["peak_device_bytes"]
        row.torch_peak_device_bytes = outcome.value["torch_peak_device_bytes"]
        row.load_s = outcome.value["load_ns"] / 1e9
        (image,) = compare_drawings(self.scene, self._draw_reference(), read_drawing(output))
        row.psnr_db, row.ssim = image.psnr_db, image.ssim

    def _draw_reference(self) -> Any:
        """torch in fp32 on the same device, drawn once."""
        drawn = self.folder / "reference.safetensors"
        if self._reference is None and drawn.is_file():
            self._reference = read_drawing(drawn)
        if self._reference is None:
            settings = TorchSettings(device="cpu" if self.gpu is None else "cuda")
            self._reference = draw_isolated(
                self.base, read_manifest(self.base), settings, self.scene, drawn, label="torch fp32",
                timeout_s=self.deadline.take(),
            )  # fmt: skip
        return self._reference

    def _convert(self, output: Path, *options: str) -> None:
        command = [sys.executable, "-m", "sdopt", "convert", str(self._source), "-o", str(output), "--no-verify"]
        self._call([*command, *options])

    def _call(self, command: list[str], share: float = _LARGEST_SHARE) -> None:
        try:
            subprocess.run(
                command, check=True, timeout=self.deadline.take(share), capture_output=True, text=True, cwd=_REPOSITORY,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise SdoptError(f"{Path(command[1]).name} {command[-1]} did not finish in time") from error
        except subprocess.CalledProcessError as error:
            raise SdoptError(str(error.stderr).strip()[-1000:]) from error


def format_row(row: Row) -> str:
    if row.message:
        return f"{row.candidate:24} {row.message.splitlines()[0][:200]}"

    def ms(stage: Stage) -> str:
        return f"{row.stages_ms[stage]:9.2f}" if stage in row.stages_ms else f"{'-':>9}"

    share = "-" if row.unet_roofline is None else f"{row.unet_roofline:.0%}"
    memory = "-" if row.peak_device_bytes is None else f"{row.peak_device_bytes / 1e9:.2f}"
    stages = "".join(ms(stage) for stage in (Stage.TEXT_ENCODER, Stage.UNET_STEP))
    vae, speed = ms(Stage.VAE_DECODER), f"{row.pictures_per_s:9.3f}"
    return f"{row.candidate:24}{stages}{share:>9}{vae}{speed}{memory:>9}  {format_psnr(row.psnr_db)}"


HEADER = (
    f"{'':30}{'text ms':>9}{'step ms':>9}{'roofline':>9}{'VAE ms':>9}{'img/s':>9}{'VRAM GB':>9}  PSNR to torch fp32"
)


def prepare_all(runs: list[Run]) -> dict[str, str]:
    """Prepare the cases beside each other; the reason for each that could not be prepared, by its name."""

    def prepare(run: Run) -> str:
        try:
            run.prepare()
        except SdoptError as error:
            return f"not prepared: {error.message}"
        return ""

    with ThreadPoolExecutor(len(runs)) as threads:
        return dict(zip((run.case.name for run in runs), threads.map(prepare, runs), strict=True))


def run_all(
    cases: list[Case], candidates: tuple[Candidate, ...], work: Path, deadline: Deadline, gpu: str | None
) -> dict[str, Any]:
    """Everything that fits into the time, each candidate in all cases before the next.

    `report.json` in `work` is renewed after each row. Rows of an earlier run stay in it until they are measured again.
    """
    path = work / "report.json"
    table: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {"cases": {}}
    table["environment"] = describe_machine().model_dump(mode="json")
    runs = [Run(case, work, deadline, gpu) for case in cases]
    reasons = prepare_all(runs)
    print(HEADER, flush=True)
    for candidate in candidates:
        for run in runs:
            reason = reasons[run.case.name]
            row = Row(candidate.name, reason) if reason else run.measure(candidate)
            print(f"{run.case.name:6}{format_row(row)}", flush=True)
            case = table["cases"].setdefault(run.case.name, {"candidates": []})
            case |= {"steps": run.case.steps, "unet_step_flops": getattr(run, "flops", None)}
            kept = [other for other in case["candidates"] if other["candidate"] != row.candidate]
            case["candidates"] = [*kept, asdict(row)]
            write_file(path, (json.dumps(table, indent=1) + "\n").encode())
    return table


@click.command()
@click.option("--minutes", default=8.0, show_default=True, type=click.FloatRange(0.1), help="When to stop.")
@click.option("--case", "names", multiple=True, type=click.Choice(list(CASES)), help="[default: all]")
@click.option("--candidate", "chosen", multiple=True, type=click.Choice(list(list_candidates(""))),
              help="[default: all]")  # fmt: skip
@click.option("-o", "work", type=click.Path(path_type=Path), default=Path("out/gpu"), show_default=True)
@click.option("--dry", is_flag=True, help="On the CPU, with tiny-shapes: to test this script.")
def main(minutes: float, names: tuple[str, ...], chosen: tuple[str, ...], work: Path, dry: bool) -> None:
    deadline = Deadline(minutes * 60)
    if dry:
        run_all([DRY_CASE], DRY_CANDIDATES, work, deadline, None)
        return
    from sdopt.backends.cuda import describe_missing_gpu, find_gpu

    gpu = find_gpu()
    if gpu is None:
        print(": ".join(describe_missing_gpu()), file=sys.stderr)
        sys.exit(5)
    print(f"{gpu.name} ({gpu.generation}), driver {gpu.driver or 'unknown'}")
    candidates = list_candidates(gpu.generation)
    taken = tuple(candidate for name, candidate in candidates.items() if not chosen or name in chosen)
    run_all([CASES[name] for name in names or CASES], taken, work, deadline, gpu.name)
    print(f"\n{work / 'report.json'}")


if __name__ == "__main__":
    main()
