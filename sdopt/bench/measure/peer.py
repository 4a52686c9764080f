"""Measure another tool in an environment of its own: same latents, prompts and scheduler, and the same table back."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from sdopt.bench.case.candidates import Candidate
from sdopt.bundle.manifest import BundleManifest
from sdopt.fidelity.candidate import engines_use_gpu
from sdopt.fidelity.scene import Scene
from sdopt.processes.call import Outcome, call_program
from sdopt.processes.channel import JsonTable

_SCRIPT = Path(__file__).with_name("optimum_peer.py")
_SCHEDULER = "ddim"


def run_peer(candidate: Candidate, arguments: JsonTable, timeout_s: float) -> Outcome[JsonTable]:
    """Run a peer once with its own interpreter; `arguments` are those of `measure`, and so is the value of the outcome.

    Raises `MissingDependency` where that environment lacks the tool, and `SdoptError` for whatever else fails there:
    its interpreter, a crash, the time limit, an answer that is none.
    """
    assert candidate.python is not None
    job = _describe_job(candidate, Scene.model_validate(arguments["scene"]), arguments)
    # -I: a PYTHONPATH of this environment, and the modules beside the script, are not the peer's.
    command = [str(candidate.python), "-I", str(_SCRIPT)]
    return call_program(
        command, job | {"launched_ns": time.monotonic_ns()}, name=f"{candidate.name} in {candidate.python}",
        timeout_s=timeout_s,
    )  # fmt: skip


def _describe_job(candidate: Candidate, scene: Scene, arguments: JsonTable) -> JsonTable:
    manifest = candidate.manifest
    return _describe_scheduler(candidate.folder, manifest) | {
        "parent_pid": os.getpid(),
        "label": arguments["label"],
        "folder": str(candidate.folder.resolve()),
        "provider": "CUDAExecutionProvider" if engines_use_gpu(manifest) else "CPUExecutionProvider",
        "prompts": list(scene.prompts),
        "steps": scene.steps,
        "guidance_scale": scene.guidance_scale,
        "inputs": str(scene.inputs.resolve()),
        "height_px": manifest.profile.height_px.opt,
        "width_px": manifest.profile.width_px.opt,
        "batch": manifest.profile.batch.min,
        "output": arguments["output"] and str(Path(arguments["output"]).resolve()),
        "effort": arguments["effort"],
    }


def _describe_scheduler(folder: Path, manifest: BundleManifest) -> dict[str, Any]:
    """Class and config of the scheduler that every other candidate gets."""
    from sdopt.pipeline.schedulers import label_of, make_scheduler

    own = json.loads((folder / "scheduler" / "scheduler_config.json").read_bytes())
    scheduler = make_scheduler(_SCHEDULER, own, family=manifest.family, prediction=manifest.prediction)
    return {
        "scheduler_class": type(scheduler).__name__,
        "scheduler_config": json.loads(scheduler.to_json_string()),
        "scheduler_label": label_of(scheduler),
    }
