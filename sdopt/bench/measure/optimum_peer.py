"""Draw and time a scene with optimum's ONNX Runtime pipeline. A program of its own, for optimum's environment.

It must not import sdopt, which is not installed there. It speaks as `sdopt.processes.channel` says: one JSON table on
stdin, JSON lines on stdout; `sdopt.bench.measure.peer` writes the table. What it times and in which order is what
`sdopt.bench.measure.measure` does; its calls are of optimum-onnx 0.1.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import statistics
import sys
import time
import traceback
from typing import Any, Callable  # noqa: UP035 - the interpreter may be an older one

_STAGES = {
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder",
    "unet": "unet_step",
    "vae_decoder": "vae_decoder",
}
_OVERLAPPING = ("end_to_end", "overhead", "first_step")


class Clock:
    """Samples in ns by stage. ONNX Runtime has done its work when a call returns, on a GPU too."""

    def __init__(self) -> None:
        self.samples_ns: dict[str, list[int]] = {}
        self._started_ns = 0
        self._first_step_ns = 0

    def watch(self, part: Any, stage: str) -> None:
        forward = part.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun_ns = time.perf_counter_ns()
            result = forward(*args, **kwargs)
            self._add(stage, time.perf_counter_ns() - begun_ns)
            return result

        part.forward = timed

    def end_step(self) -> None:
        self._first_step_ns = self._first_step_ns or time.perf_counter_ns() - self._started_ns

    def time_picture(self, draw: Callable[[], Any]) -> int:
        before_ns = self._network_ns()
        self._first_step_ns, self._started_ns = 0, time.perf_counter_ns()
        draw()
        whole_ns = time.perf_counter_ns() - self._started_ns
        self._add("end_to_end", whole_ns)
        self._add("overhead", whole_ns - (self._network_ns() - before_ns))
        self._add("first_step", self._first_step_ns)
        return whole_ns

    def take(self) -> dict[str, list[int]]:
        taken, self.samples_ns = self.samples_ns, {}
        return taken

    def _add(self, stage: str, taken_ns: int) -> None:
        self.samples_ns.setdefault(stage, []).append(taken_ns)

    def _network_ns(self) -> int:
        return sum(sum(each) for stage, each in self.samples_ns.items() if stage not in _OVERLAPPING)


class Painter:
    """Draws the prompts of the scene, a batch at a time."""

    def __init__(self, pipeline: Any, job: dict[str, Any], clock: Clock) -> None:
        from safetensors.torch import load_file

        self._pipeline, self._job, self._clock = pipeline, job, clock
        self._latents = load_file(job["inputs"])["latents"]
        self._turn = itertools.cycle(range(len(job["prompts"])))

    def draw(self, indices: list[int], steps: int, end_step: Callable[[Any], None]) -> Any:
        """Float RGB in [0, 1], (pictures, height, width, 3). `end_step` gets the latents after each step."""

        def step(pipeline: Any, index: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
            end_step(state["latents"])
            return state

        job = self._job
        return self._pipeline(
            prompt=[job["prompts"][i] for i in indices], num_inference_steps=steps,
            guidance_scale=job["guidance_scale"], latents=self._latents[indices], height=job["height_px"],
            width=job["width_px"], output_type="np", callback_on_step_end=step,
        ).images  # fmt: skip

    def draw_next(self, steps: int | None = None) -> int:
        """Time one call of the scene's number of steps, or another; in ns."""
        indices = list(itertools.islice(self._turn, self._job["batch"]))
        count = steps or self._job["steps"]
        return self._clock.time_picture(lambda: self.draw(indices, count, lambda _: self._clock.end_step()))


def measure(job: dict[str, Any], tell: Callable[[str, float], None]) -> dict[str, Any]:
    """What `sdopt.bench.measure.measure.measure` returns, as far as it can be known from outside."""
    from optimum.onnxruntime import ORTDiffusionPipeline

    import diffusers  # isort: skip - which takes seconds, and is of no use without the above

    imported_ns, rss_imported_bytes = time.monotonic_ns(), read_status("VmRSS")
    tell("opening", 0.0)
    pipeline = open_pipeline(ORTDiffusionPipeline, getattr(diffusers, job["scheduler_class"]), job)
    opened_ns, rss_loaded_bytes = time.monotonic_ns(), read_status("VmRSS")
    clock = Clock()
    for name, stage in _STAGES.items():
        part = getattr(pipeline, name, None)
        if part is not None:
            clock.watch(part, stage)
    painter = Painter(pipeline, job, clock)
    drawn_ns, done_ns = draw_scene(painter, job, tell)
    clock.take()
    tell("warming up", 0.0)
    warm_up_ns = warm_up(painter.draw_next, done_ns, drawn_ns - opened_ns, job["effort"])
    clock.take()
    time_calls(painter.draw_next, job["effort"], lambda share: tell("timing", share))
    samples_ns = clock.take()
    return {
        "import_ns": imported_ns - job["launched_ns"],
        "load_ns": opened_ns - imported_ns,
        "first_picture_ns": drawn_ns - opened_ns,
        "cold_start_ns": drawn_ns - job["launched_ns"],
        "rss_imported_bytes": rss_imported_bytes,
        "rss_loaded_bytes": rss_loaded_bytes,
        "samples_ns": samples_ns,
        "warm_up_ns": warm_up_ns,
        "settled": has_settled(warm_up_ns, job["effort"]),
        "sweep_ns": sweep(painter, samples_ns, job, clock),
        "scheduler": job["scheduler_label"],
    }


def open_pipeline(kind: Any, scheduler: Any, job: dict[str, Any]) -> Any:
    pipeline = kind.from_pretrained(job["folder"], provider=job["provider"])
    pipeline.scheduler = scheduler.from_config(job["scheduler_config"])
    pipeline.watermark = None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_scene(painter: Painter, job: dict[str, Any], tell: Callable[[str, float], None]) -> tuple[int, list[int]]:
    """Draw the first batch, and where there is an `output` the others, too. Returns when the first was there, and the
    times of the others.
    """
    import numpy as np

    images: list[Any] = []
    latents: list[Any] = []
    drawn_ns, done_ns = 0, []
    for start in range(0, len(job["prompts"]), job["batch"]):
        if drawn_ns and not job["output"]:
            break
        steps: list[Any] = []
        indices = list(range(start, min(start + job["batch"], len(job["prompts"]))))
        begun_ns = time.monotonic_ns()
        tell("drawing" if drawn_ns else "cold start", start / len(job["prompts"]))
        pictures = painter.draw(indices, job["steps"], keep_in(steps))
        if drawn_ns:
            done_ns.append(time.monotonic_ns() - begun_ns)
        drawn_ns = drawn_ns or time.monotonic_ns()
        images.append(np.asarray(pictures, dtype=np.float32))
        latents.append(np.stack(steps, axis=1).astype(np.float32))
    if job["output"]:
        write_drawing(np.concatenate(images), np.concatenate(latents), job)
    return drawn_ns, done_ns


def keep_in(steps: list[Any]) -> Callable[[Any], None]:
    return lambda latents: steps.append(latents.float().cpu().numpy().copy())


def write_drawing(images: Any, latents: Any, job: dict[str, Any]) -> None:
    """As `sdopt.fidelity.drawings.write_drawing`, which reads it."""
    import numpy as np
    from safetensors.numpy import save_file

    tensors = {"images": np.ascontiguousarray(images), "latents": np.ascontiguousarray(latents)}
    save_file(tensors, job["output"], metadata={"scheduler": job["scheduler_label"]})


def has_settled(samples_ns: list[int], effort: dict[str, Any]) -> bool:
    window = effort["settle_window"]
    if len(samples_ns) < 2 * window:
        return False
    before = statistics.median(samples_ns[-2 * window : -window])
    moved = abs(statistics.median(samples_ns[-window:]) - before)
    return bool(moved < effort["settle_tolerance"] * before)


def warm_up(run: Callable[[], int], done_ns: list[int], expected_ns: int, effort: dict[str, Any]) -> list[int]:
    samples_ns, spent_ns = list(done_ns), 0
    while not has_settled(samples_ns, effort) and len(samples_ns) < effort["most_warm_up"]:
        if spent_ns + (samples_ns[-1] if samples_ns else expected_ns) > effort["picture_budget_s"] * 1e9:
            break
        samples_ns.append(run())
        spent_ns += samples_ns[-1]
    return samples_ns


def time_calls(run: Callable[[], int], effort: dict[str, Any], tell: Callable[[float], None]) -> list[int]:
    samples_ns: list[int] = []
    while len(samples_ns) < effort["most_pictures"]:
        if len(samples_ns) >= effort["least_pictures"] and sum(samples_ns) > effort["picture_budget_s"] * 1e9:
            break
        tell(len(samples_ns) / effort["most_pictures"])
        samples_ns.append(run())
    return samples_ns


def sweep(
    painter: Painter, samples_ns: dict[str, list[int]], job: dict[str, Any], clock: Clock
) -> dict[int, list[int]]:
    """End-to-end samples by number of steps, in the process that also keeps the pictures."""
    swept_ns = {job["steps"]: samples_ns["end_to_end"]}
    if job["output"]:
        for steps in sorted({max(1, job["steps"] // 4), max(1, job["steps"] // 2)} - {job["steps"]}):
            painter.draw_next(steps)
            swept_ns[steps] = clock.take()["end_to_end"]
    return swept_ns


def read_status(name: str) -> int:
    """A size of this process in bytes, as Linux names it; VmHWM is the peak of what was resident."""
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def main() -> int:
    # Ctrl-C reaches the whole terminal group: the parent decides, and this dies with it (PR_SET_PDEATHSIG).
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    job = json.load(sys.stdin)
    if os.getppid() != job["parent_pid"]:
        return 1
    # Libraries print to stdout; the conversation keeps a descriptor of its own.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    def tell(what: str, share: float) -> None:
        send({"progress": [f"{job['label']}: {what}", share]})

    try:
        value = measure(job, tell)
        send({"value": value, "peak_rss_bytes": read_status("VmHWM")})
    except ImportError as error:
        send({"error": "MissingDependency", "message": f"{sys.executable} has no optimum: {error}", "hint": ""})
    except Exception:
        send({"error": "", "message": traceback.format_exc(), "hint": ""})
    return 0


if __name__ == "__main__":
    sys.exit(main())
