"""The quantisation stage of a build, and what it will cost: recorded drawings, scales, trials and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator

from sdopt.convert.build import Build, Stage, Step
from sdopt.convert.cost import PROCESS_BYTES, cost_of, picture_s, pipeline_bytes
from sdopt.model.component import ComponentName
from sdopt.model.quantization import ComponentQuantization

# Runs of a timed trial beside those that measure its error.
_TIMED_RUNS = 20
_PROMPTS = 2


def _estimate(build: Build) -> Iterator[Step]:
    plan, settings = build.plan, build.plan.quantization
    if settings is None:
        return
    calibration, verify = settings.calibration, plan.recipe.verify
    drawings = calibration.trajectories + calibration.held_out
    seconds = drawings * picture_s(plan, calibration.steps)
    yield Step("trajectories", "pipeline", "", False, 0, pipeline_bytes(plan), seconds)
    groups = 0
    for name, wanted in settings.components.items():
        if name not in plan.components:
            continue
        cost, part = cost_of(plan, name), plan.components[name]
        calls = calibration.steps if name is ComponentName.UNET else 1
        if wanted.scheme.quantizes_activations:
            runs = calibration.trajectories * calls
            yield Step("calibration", name, part.architecture, False, 0, cost.torch_bytes, runs * cost.run_s)
        count = _count_groups(wanted, list(part.tensors))
        groups += count
        runs = calibration.held_out * calls + (_TIMED_RUNS if settings.judge_speed else 0)
        # Each group alone, all that pay together, and once more to confirm; beside the 16-bit engine.
        memory = PROCESS_BYTES + 2 * cost.fp32_bytes + 2 * cost.activation_bytes
        yield Step("trials", name, part.architecture, False, 0, memory, (count + 2) * runs * cost.run_s)
    if build.draws_pictures and groups:
        pictures = (len(verify.prompts) or _PROMPTS) * picture_s(plan, verify.steps)
        # torch twice and the 16-bit engines once; then the quantised ones, as often as halving the groups asks.
        seconds = (3 + math.ceil(math.log2(groups + 1))) * pictures
        yield Step("pictures", "pipeline", "", False, 0, pipeline_bytes(plan), seconds)


def _count_groups(settings: ComponentQuantization, tensors: list[str]) -> int:
    """An upper bound: of a layer's name alone it is not known whether its shape can be quantised."""
    layers = (name.removesuffix(".weight") for name in tensors if name.endswith(".weight"))
    return len({group for layer in layers if "norm" not in layer and (group := settings.group_of(layer))})


def _run(build: Build) -> None:
    if build.plan.quantization is None:
        return
    from sdopt.convert.blocks.select import quantize  # torch and onnx, for seconds

    quantized = quantize(build)
    build.plan, build.draft, build.weights = quantized.plan, quantized.draft, quantized.weights


QUANTISE = Stage("quantise", _estimate, _run)
