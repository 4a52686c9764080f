"""Which scheduler classes of diffusers draw with a Stable Diffusion model, read from a config without diffusers."""

from __future__ import annotations

from sdopt.errors import CheckpointError
from sdopt.model.component import Config

# Those whose `set_timesteps` and `step` go from noise to a picture along a table of betas. Left out are the ones for
# flow matching, for EDM's noise levels, for inversion, and for other kinds of models.
SCHEDULER_CLASSES = frozenset({
    "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler",
})  # fmt: skip
_HINT = "if the model is Stable Diffusion, put the scheduler/ folder of the model that it was made from in its place"


def require_known_scheduler(config: Config, where: str) -> None:
    """Raise `CheckpointError` for a scheduler config that no Stable Diffusion model can be drawn with."""
    name = config.get("_class_name")
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if flow or "FlowMatch" in str(name):
        raise CheckpointError(
            f"{where}: the scheduler {name} is set up for flow matching, which sdopt does not draw with", hint=_HINT
        )
    if name not in SCHEDULER_CLASSES:
        said = "has no _class_name" if name is None else f"is {name!r}, which is not a scheduler that sdopt draws with"
        raise CheckpointError(f"{where}: the scheduler {said}", hint=_HINT)
