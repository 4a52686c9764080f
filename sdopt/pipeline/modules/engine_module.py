"""What a network of a pipeline is when an engine computes it; the UNet, the VAE and text encoders are beside this file.

They have the attributes and calls that the Stable Diffusion pipelines use of the torch modules. What a fixed graph
cannot do (LoRA, other attention, a condition that it has no input for) is refused with a reason, never ignored. They do
not know which runtime computes, nor in which precision: to the pipeline they are fp32 on the device of their sessions.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers.configuration_utils import FrozenDict

from sdopt.bundle.again import variant_command
from sdopt.errors import UsageError
from sdopt.model.component import ComponentSpec, Config

if TYPE_CHECKING:
    from sdopt.backends.protocol import Session


class NotInEngineError(UsageError, AttributeError):
    """Code asked for a part of a torch network. An AttributeError too, so that `hasattr` says no."""


class EngineModule(torch.nn.Module):
    """A network that an engine computes: fp32 to the outside, and not to be moved, cast or changed."""

    config: Any
    sessions: tuple[Session, ...]
    dtype = torch.float32
    refuses_nonfinite = True
    """Whether NaN and infinity raise `DrawingError`. Fidelity lets them through: a verdict is to name the picture."""

    @property
    def device(self) -> torch.device:
        """Where the engine computes, and where its outputs are."""
        return self.sessions[0].device

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise NotInEngineError(
                f"{type(self).__name__} has no {name!r}: the graph of an engine is fixed when it is built",
                hint="change the checkpoint (merge the LoRA, say), then build again with sdopt convert",
            ) from None

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Nothing: an engine keeps its precision. Raises `UsageError` for another device than its own."""
        places = [v for v in (*args, *kwargs.values()) if isinstance(v, (str, torch.device))]
        if elsewhere := [place for place in places if torch.device(place).type != self.device.type]:
            raise UsageError(
                f"{type(self).__name__} cannot move to {elsewhere[0]}: an engine runs where it was built for",
                hint=f"leave out .to(...), or build for another: {variant_command('--target TARGET')}",
            )
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        del fn, recurse
        return self

    def close(self) -> None:
        """Free the engine. The module cannot be called any more."""
        for session in self.sessions:
            session.close()


def complete_config(kind: Any, config: Config) -> FrozenDict:
    """A component's config with the defaults of the diffusers class, as diffusers itself completes an older file."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    return FrozenDict({p.name: p.default for p in parameters if p.default is not p.empty} | dict(config))


def given_inputs(spec: ComponentSpec, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The arguments of a call that are inputs of an engine, by the names of its graph; None counts as not given.

    A tuple of tensors is `name.0`, `name.1` and so on. Raises `UsageError` for one that the graph has no input for.
    """
    inputs: dict[str, torch.Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, (tuple, list)):
            inputs |= {f"{name}.{index}": part for index, part in enumerate(value)}
        elif value is not None:
            inputs[name] = value
    known = {tensor.name for tensor in spec.inputs}
    for name in inputs:
        if name not in known:
            raise UsageError(
                f"{spec.name}: the engine has no input for {name.partition('.')[0]}: its graph was traced without it",
                hint="use the torch pipeline for this, or merge the change into the checkpoint and build again",
            )
    return inputs
