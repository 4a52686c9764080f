"""What diffusers' own loop costs a step, beside the step itself: should sdopt have a loop of its own?

    python benchmarks/loop_overhead.py

The real pipelines of SD1.5 (512x512) and SDXL (1024x1024) on a UNet session that costs nothing: it returns a tensor
that is already there. `loop` is all that the host does in one step, on one core, in CPU time, so that neighbours do not
count; `tight` is the same step in a bare loop: concatenate, scale, session, guidance, scheduler. The difference is what
a loop of one's own could save at most.

No GPU is measured. The share is of a step of `--step-ms`, which is an assumption about a fast GPU. On a GPU, moreover,
the elementwise arithmetic that is counted here is the GPU's, and the host runs ahead while it computes, as long as
nothing makes it wait. Exits with 3 where the difference is more than 5 % of such a step.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from sdopt.backends.protocol import MemoryUse
from sdopt.bench.case.random_checkpoint import UNET_SD15, UNET_SDXL
from sdopt.machine.environment import describe_machine
from sdopt.model.component import ComponentName, ComponentSpec, describe_component
from sdopt.model.family import Family, Prediction
from sdopt.model.precision import DType
from sdopt.model.samplers import SchedulerName
from sdopt.model.shape import Extent, ShapeProfile
from sdopt.pipeline.modules.engine_unet import EngineUNet
from sdopt.pipeline.modules.engine_vae import EngineVAE
from sdopt.pipeline.schedulers import make_scheduler

_STEPS, _REPEATS, _GUIDANCE = 50, 7, 7.5
_BUDGET = 0.05
_SCHEDULERS = (
    SchedulerName.DDIM, SchedulerName.PNDM, SchedulerName.EULER, SchedulerName.EULER_A, SchedulerName.DPMPP_2M,
    SchedulerName.UNIPC,
)  # fmt: skip
_VAE = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [128, 256, 512, 512]}


class FreeSession:
    """A session whose run costs nothing. `runs` counts them."""

    device = torch.device("cpu")

    def __init__(self, spec: ComponentSpec, extents: Mapping[str, Extent]) -> None:
        self.spec, self.extents, self.profiles = spec, extents, (extents,)
        self.outputs = {tensor.name: torch.randn(tensor.shape(extents)) for tensor in spec.outputs}
        self.runs = 0

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del inputs
        self.runs += 1
        return self.outputs

    def memory(self) -> MemoryUse:
        return MemoryUse(0, 0, 0)

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_pipeline(family: Family) -> tuple[Any, FreeSession, dict[str, torch.Tensor]]:
    """The family's own pipeline, its UNet's session, and prompts that are already encoded."""
    side_px, config = (1024, UNET_SDXL) if family.is_xl else (512, UNET_SD15)
    config = config | {"in_channels": 4, "out_channels": 4}
    extents = ShapeProfile.static(height_px=side_px, width_px=side_px).axis_extents(8)
    session = FreeSession(describe_component(ComponentName.UNET, config, family, DType.FP32), extents)
    unet = EngineUNet(session, config, sample_size=side_px // 8, pixels_per_latent=8)
    decoder = describe_component(ComponentName.VAE_DECODER, _VAE, family, DType.FP32)
    parts: dict[str, Any] = {
        "vae": EngineVAE(FreeSession(decoder, extents), None, _VAE), "unet": unet, "scheduler": None,
        "text_encoder": None, "tokenizer": None,
    }  # fmt: skip
    states = torch.randn(1, 77, int(config["cross_attention_dim"]))
    prompts = {"prompt_embeds": states, "negative_prompt_embeds": states * 0}
    if family.is_xl:
        pooled = torch.randn(1, 1280)
        prompts |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled * 0}
        parts |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
        pipeline = StableDiffusionXLPipeline(**parts)
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, session, prompts


def run_tight(scheduler: Any, session: FreeSession, latents: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        for timestep in scheduler.timesteps:
            sample = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
            without, with_prompt = session.run({"sample": sample, "timestep": timestep})["out_sample"].chunk(2)
            noise = without + _GUIDANCE * (with_prompt - without)
            latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
    return latents


def time_steps(draw: Callable[[], object], session: FreeSession) -> float:
    """Median of the repeats: CPU time of a picture over its calls of the UNet, in ms. The first is warm-up."""
    samples_ms = []
    for repeat in range(_REPEATS + 1):
        session.runs, started_ns = 0, time.thread_time_ns()
        draw()
        if repeat:
            samples_ms.append((time.thread_time_ns() - started_ns) / 1e6 / session.runs)
    return statistics.median(samples_ms)


def measure(family: Family, name: SchedulerName) -> dict[str, Any]:
    pipeline, session, prompts = make_pipeline(family)

    def draw() -> None:
        generator = torch.Generator().manual_seed(0)
        pipeline(
            num_inference_steps=_STEPS, guidance_scale=_GUIDANCE, output_type="latent", generator=generator, **prompts
        )

    pipeline.scheduler = make_scheduler(name, {}, family=family, prediction=Prediction.EPSILON)
    scheduler = make_scheduler(name, {}, family=family, prediction=Prediction.EPSILON)
    latents = torch.randn_like(session.outputs["out_sample"][:1])

    def draw_tight() -> None:
        scheduler.set_timesteps(_STEPS)
        run_tight(scheduler, session, latents)

    return {
        "family": family, "scheduler": name, "loop_ms": time_steps(draw, session),
        "tight_ms": time_steps(draw_tight, session),
    }  # fmt: skip


@click.command()
@click.option("--step-ms", default=8.0, show_default=True, help="Assumed time of one UNet step on a GPU.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures and the machine.")
def main(step_ms: float, json_path: Path | None) -> None:
    torch.set_num_threads(1)
    rows = [measure(family, name) for family in (Family.SD1, Family.SDXL) for name in _SCHEDULERS]
    print(f"{'':18}{'loop':>10}{'tight':>10}{'to save':>10}   of an assumed step of {step_ms:g} ms")
    for row in rows:
        row["saved_share"] = (row["loop_ms"] - row["tight_ms"]) / step_ms
        figures = [f"{row[key]:.3f} ms" for key in ("loop_ms", "tight_ms")]
        saved = f"{row['loop_ms'] - row['tight_ms']:.3f} ms"
        name = f"{row['family']:6}{row['scheduler']:12}"
        print(f"{name}{figures[0]:>10}{figures[1]:>10}{saved:>10}   {row['saved_share']:.1%}")
    if json_path is not None:
        table = {"machine": describe_machine().model_dump(mode="json"), "assumed_step_ms": step_ms, "rows": rows}
        json_path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    sys.exit(3 if any(row["saved_share"] > _BUDGET for row in rows) else 0)


if __name__ == "__main__":
    main()
