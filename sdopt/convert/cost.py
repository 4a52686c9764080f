"""How much a network computes and holds at a size, counted from its config and its tensors. Estimates, all of them.

A convolution or a linear layer costs two operations for each weight and position, and its position count follows from
the level of the U that its block is on. Attention adds the products of its positions with each other. Memory is what
lives at once: the skip connections of a UNet, and four copies of the largest activation.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sdopt.convert.plan import BuildPlan, ComponentPlan
from sdopt.model.component import ComponentName
from sdopt.model.shape import CHUNK_TOKENS

# Rough rates of two cores, to tell seconds from minutes; benchmarks/export_budget.py measures real builds.
COPY_BYTES_PER_S = 250e6
FLOPS_PER_S = 100e9
PROCESS_BYTES = 400_000_000
"""Of a process that has imported torch and diffusers and holds nothing yet."""
_LIVE_ACTIVATIONS = 4
_FP32_BYTES = 4
_GUIDED = 2
"""A UNet draws with and without the prompt in one run."""
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.")
_VAE = (ComponentName.VAE_DECODER, ComponentName.VAE_ENCODER)


@dataclass(frozen=True)
class Cost:
    """One run of a component at the plan's largest usual size: operations, and bytes of fp32 activations."""

    flops: float
    activation_bytes: int
    fp32_bytes: int
    """Of the weights."""

    @property
    def run_s(self) -> float:
        return self.flops / FLOPS_PER_S

    @property
    def torch_bytes(self) -> int:
        """What torch holds while it runs the component in fp32."""
        return PROCESS_BYTES + self.fp32_bytes + self.activation_bytes


def cost_of(plan: BuildPlan, name: ComponentName) -> Cost:
    """The cost of one run of a component."""
    part = plan.components[name]
    batch = max(profile.batch.opt for profile in plan.profiles) * (_GUIDED if name is ComponentName.UNET else 1)
    flops, largest, skips = 0.0, 0, 0
    for tensor, ref in part.tensors.items():
        shape = tuple(ref.shape)
        if not tensor.endswith("weight") or len(shape) < 2 or "embedding" in tensor:
            continue
        positions = _positions(plan, part, name, tensor)
        flops += 2.0 * math.prod(shape) * positions
        if "to_q." in tensor or "query." in tensor or "q_proj." in tensor:
            seen = plan.profile.tokens.max if "attn2" in tensor else positions
            flops += 4.0 * positions * seen * shape[0]
        largest = max(largest, shape[0] * positions)
        if name is ComponentName.UNET and tensor.startswith("down_blocks.") and tensor.endswith("conv2.weight"):
            skips += shape[0] * positions
    held = (_LIVE_ACTIVATIONS * largest + skips) * batch * _FP32_BYTES
    return Cost(flops * batch, held, _fp32_bytes(part))


def picture_s(plan: BuildPlan, steps: int) -> float:
    """Seconds of one picture in so many steps: the UNet's runs, one of the text encoders' and of the VAE's."""
    costs = {name: cost_of(plan, name) for name in plan.components if name is not ComponentName.VAE_ENCODER}
    return sum(cost.run_s * (steps if name is ComponentName.UNET else 1) for name, cost in costs.items())


def pipeline_bytes(plan: BuildPlan) -> int:
    """What a process holds that draws in fp32: all weights, and the activations of the largest network."""
    costs = [cost_of(plan, name) for name in plan.components]
    return PROCESS_BYTES + sum(cost.fp32_bytes for cost in costs) + max(cost.activation_bytes for cost in costs)


def _positions(plan: BuildPlan, part: ComponentPlan, name: ComponentName, tensor: str) -> int:
    """How many positions of a picture or a prompt a layer is applied to."""
    if name not in (*_VAE, ComponentName.UNET):
        return plan.profile.tokens.max
    if "time_emb" in tensor or "add_embedding" in tensor:
        return 1
    if "attn2.to_k" in tensor or "attn2.to_v" in tensor:
        return max(CHUNK_TOKENS, plan.profile.tokens.max)
    pixels = max(profile.width_px.opt * profile.height_px.opt for profile in plan.profiles)
    levels = len(part.config["block_out_channels"])
    found = _BLOCK.search(tensor)
    if found:
        level = int(found[2]) if found[1] == "down" else levels - 1 - int(found[2])
        level += {"downsamplers": 1, "upsamplers": -1}.get(tensor[found.end() :].partition(".")[0], 0)
    else:
        outer = "conv_in" if name is not ComponentName.VAE_DECODER else "conv_out"
        level = 0 if (name is ComponentName.UNET and "mid_block" not in tensor) or outer in tensor else levels - 1
    if name is ComponentName.UNET:
        pixels //= plan.checkpoint.pixels_per_latent**2
    return max(1, pixels >> (2 * max(0, level)))


def _fp32_bytes(part: ComponentPlan) -> int:
    return sum(ref.nbytes // ref.dtype.itemsize_bytes for ref in part.tensors.values()) * _FP32_BYTES
