"""The adapters of a loaded pipeline: which are there, which are active and how strongly, and what its engines' slots
hold because of that.

Base weights are never touched. An adapter is laid out for the slots once, when it is loaded; what is active together is
put side by side along the rank, with the weights in B.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sdopt.adapters.adapter import Adapter
from sdopt.adapters.adapter_file import AdapterFile, read_adapter_file
from sdopt.adapters.match_layers import shapes_of_layers
from sdopt.adapters.resolve import resolve_adapter
from sdopt.backends.slot_layout import join, lay_out
from sdopt.backends.slotted_session import SlottedSession
from sdopt.bundle.again import variant_command
from sdopt.bundle.manifest import BundleManifest
from sdopt.errors import AdapterError, UsageError
from sdopt.model.component import ComponentName
from sdopt.model.file_names import WEIGHTS_NAME
from sdopt.model.slots import input_names
from sdopt.pipeline.lora_scales import LayerScales
from sdopt.weights.safetensors_header import TensorRef, read_header

Pair = tuple[torch.Tensor, torch.Tensor]
REQUEST_LIMIT_BYTES = 2_000_000_000
"""Of the adapters that were loaded for requests and not by the user: some twenty of 100 MB."""
Weights = Mapping[ComponentName, LayerScales]


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter as the slots take it: (A, B) by component and layer."""

    name: str
    sha256: str
    path: Path
    pairs: Mapping[ComponentName, Mapping[str, Pair]]
    tensors_sha256: str = ""
    of_request: bool = False
    """Loaded for a request that names it: diffusers' methods do not list it, and never make it active."""

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes + b.nbytes for layers in self.pairs.values() for a, b in layers.values())

    @property
    def components(self) -> tuple[ComponentName, ...]:
        return tuple(self.pairs)


class LoraStack:
    """`sessions` are the components that have slots; `folder` is the bundle's. Not safe to call from several threads:
    the pipeline's turn is for whoever calls it.
    """

    def __init__(
        self, folder: Path, manifest: BundleManifest, sessions: Mapping[ComponentName, SlottedSession]
    ) -> None:
        self._folder, self._manifest, self._sessions = folder, manifest, sessions
        self.adapters: dict[str, LoadedAdapter] = {}
        self.active: dict[str, Weights] = {}
        self._weights: dict[str, Weights] = {}
        self.enabled = True
        self._call_scale = 1.0
        self._tensors: dict[ComponentName, Mapping[str, TensorRef]] = {}

    def load(
        self, path: Path, name: str, *, error_limit: float, of_request: bool = False, kept: Collection[str] = ()
    ) -> LoadedAdapter:
        """Read an adapter's file for these engines; it is not active yet. One of a request may push out those of other
        requests, but not `kept`.

        Raises `AdapterError` for a file that is not one, or that these engines do not take, and `UsageError` where the
        bundle has no slots.
        """
        adapter = self.resolve(read_adapter_file(path), name, error_limit=error_limit)
        return self.add(adapter, of_request=of_request, kept=kept)

    def resolve(self, file: AdapterFile, name: str, *, error_limit: float) -> Adapter:
        self.require_slots()
        layers = {component: self._layers_of(component) for component in self._text_and_unet()}
        slots = {
            component: {slot.layer for slot in session.slots.slots} for component, session in self._sessions.items()
        }
        rank = min(session.slots.rank for session in self._sessions.values())
        base = {component: self._tensors[component] for component in layers}
        return resolve_adapter(
            file, layers, slots=slots, rank_limit=rank, error_limit=error_limit, base=base, name=name
        )  # fmt: skip

    def add(self, adapter: Adapter, *, of_request: bool = False, kept: Collection[str] = ()) -> LoadedAdapter:
        pairs: dict[ComponentName, dict[str, Pair]] = {}
        for component, layers in adapter.layers.items():
            session = self._sessions[component]
            laid: dict[str, Pair] = {}
            for layer, pair in layers.items():
                slot = session.slot_of(layer)
                assert slot is not None, "resolve_adapter refuses layers without a slot"
                a, b = lay_out(slot, torch.from_numpy(pair.down), torch.from_numpy(pair.up))
                laid[layer] = (a.to(session.device, session.slot_dtype), b.to(session.device, session.slot_dtype))
            pairs[component] = laid
        loaded = LoadedAdapter(adapter.name, adapter.sha256, adapter.path, pairs, adapter.tensors_sha256, of_request)
        self.adapters[adapter.name] = loaded
        if of_request:
            self._make_room({adapter.name, *kept})
        return loaded

    def _make_room(self, kept: Collection[str]) -> None:
        """Forget what requests have not used for longest, beyond `REQUEST_LIMIT_BYTES`: a server sees any number."""
        loaded = [each for each in self.adapters.values() if each.of_request]
        total = sum(each.nbytes for each in loaded)
        for each in loaded:
            if total <= REQUEST_LIMIT_BYTES:
                return
            if each.name not in kept and each.name not in self.active:
                del self.adapters[each.name]
                self._weights.pop(each.name, None)
                total -= each.nbytes

    def require_slots(self) -> None:
        """Raise `UsageError` for a bundle without slots."""
        if not self._sessions:
            raise UsageError(
                f"{self._folder.name} has no LoRA slots, so that its engines cannot take an adapter",
                hint=f"build it with slots: {variant_command('--lora-slots 64', self._folder)}",
            )

    def require_names(self, names: Sequence[str]) -> None:
        """Raise `UsageError` for a name that no loaded adapter has."""
        if unknown := [name for name in names if name not in self.adapters]:
            there = ", ".join(self.adapters) or "none"
            raise UsageError(f"no adapter called {unknown[0]!r} is loaded (loaded: {there})")

    def activate(self, weights: Mapping[str, Weights]) -> None:
        """Make just these adapters active. Raises `AdapterError`, and changes nothing, where they need a larger rank
        together than the slots have.
        """
        self.require_names(list(weights))
        for name in weights:
            if self.adapters[name].of_request:  # their order is that of their last use
                self.adapters[name] = self.adapters.pop(name)
        before = self.active
        self.active = dict(weights)
        try:
            self._apply()
        except AdapterError:
            self.active = before
            raise
        self._weights |= weights

    def enable(self, *, on: bool) -> None:
        self.enabled = on
        self._apply()

    def drop(self, names: Sequence[str]) -> None:
        """Forget adapters. Where none is active any more but some are left, the first of them is, as peft has it."""
        self.require_names(names)
        was_active = bool(self.active)
        for name in names:
            del self.adapters[name]
            self.active.pop(name, None)
            self._weights.pop(name, None)
        left = [name for name, adapter in self.adapters.items() if not adapter.of_request]
        if was_active and not self.active and left:
            self.active = {left[0]: self._weights[left[0]]}
        self._apply()

    def scale_calls(self, scale: float) -> None:
        """Multiply what is active, as `cross_attention_kwargs={"scale": …}` does for one call."""
        if scale != self._call_scale:
            self._call_scale = scale
            self._apply()

    def _apply(self) -> None:
        # All of them before the first is set: what does not fit changes nothing.
        filled = {
            component: self._fill(component, session) if self.enabled else {}
            for component, session in self._sessions.items()
        }
        for component, session in self._sessions.items():
            session.set_slots(filled[component])

    def _fill(self, component: ComponentName, session: SlottedSession) -> dict[str, torch.Tensor]:
        parts: dict[str, list[Pair]] = {}
        for name, weights in self.active.items():
            for layer, (a, b) in self.adapters[name].pairs.get(component, {}).items():
                if scale := weights[component].of(layer) * self._call_scale:
                    parts.setdefault(layer, []).append((a, b if scale == 1.0 else b * scale))
        filled: dict[str, torch.Tensor] = {}
        for layer, pairs in parts.items():
            slot = session.slot_of(layer)
            assert slot is not None
            a, b = join(slot, pairs)
            rank = b.shape[0] if len(slot.shape) == 2 else b.shape[1]
            if rank > session.slots.rank:
                raise AdapterError(
                    f"the active adapters need rank {rank} together, and the slots have {session.slots.rank}",
                    hint=f"build larger slots: {self._larger(session, rank)}",
                )
            filled |= dict(zip(input_names(layer), (a, b), strict=True))
        return filled

    def _larger(self, session: SlottedSession, rank: int) -> str:
        return variant_command(f"--lora-slots {session.slots.layers}:{rank}", self._folder)

    def _text_and_unet(self) -> list[ComponentName]:
        return [name for name in self._manifest.components if name.takes_adapters]

    def _layers_of(self, component: ComponentName) -> dict[str, tuple[int, ...]]:
        """Every layer with a weight: by the weight file, and where that is quantised by what torch has in its place."""
        if component not in self._tensors:
            self._tensors[component] = read_header(self._folder / component / WEIGHTS_NAME).tensors
        stored = shapes_of_layers(self._tensors[component])
        session = self._sessions.get(component)
        return stored | ({} if session is None else {slot.layer: slot.shape for slot in session.slots.slots})
