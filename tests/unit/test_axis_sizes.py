"""The sizes of a component's named axes, as its inputs have them."""

from __future__ import annotations

import torch

from sdopt.backends.protocol import axis_sizes
from sdopt.model.component import ComponentName, ComponentSpec, TensorSpec, Tolerance
from sdopt.model.precision import DType

UNET = ComponentSpec(
    ComponentName.UNET,
    inputs=(
        TensorSpec("sample", DType.FP16, ("cfg_batch", 4, "latent_height", "latent_width")),
        TensorSpec("timestep", DType.FP32, ()),
        TensorSpec("encoder_hidden_states", DType.FP16, ("cfg_batch", "prompt_tokens", 768)),
    ),
    outputs=(TensorSpec("out_sample", DType.FP16, ("cfg_batch", 4, "latent_height", "latent_width")),),
    tolerance=Tolerance(1e-3, 1e-6),
)


def test_named_axes_have_the_inputs_sizes_and_fixed_ones_are_left_out() -> None:
    inputs = {
        "sample": torch.empty(2, 4, 64, 96), "timestep": torch.tensor(1.0),
        "encoder_hidden_states": torch.empty(2, 154, 768),
    }  # fmt: skip
    assert axis_sizes(UNET, inputs) == {
        "cfg_batch": 2, "latent_height": 64, "latent_width": 96, "prompt_tokens": 154
    }  # fmt: skip
