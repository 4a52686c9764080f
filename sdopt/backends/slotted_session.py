"""A component with LoRA slots, or with a place for words: two engines over one weight file, of which one runs.

While no adapter is in the slots, and no loaded word in the text, the plain engine runs, so that a picture without them
costs nothing and has the same bytes as ever.

Runtimes keep their own copy of the weights in each open engine: where the machine has no room for two,
the one that does not run is closed, and opened again when it is needed.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping

import torch

from sdopt import progress
from sdopt.backends.engine_session import EngineSession, has_room
from sdopt.backends.protocol import ComponentFiles, MemoryUse, Session, ShowsKernels
from sdopt.backends.wrapped_session import WrappedSession
from sdopt.bundle.records import SlotsRecord
from sdopt.errors import BackendError
from sdopt.model.backend_settings import BackendSettings, OpenVINOSettings
from sdopt.model.file_names import SLOTS_GRAPH_NAME
from sdopt.model.slots import WORDS_INPUT, WORDS_LIMIT, Slot, input_names, slot_shapes
from sdopt.weights.to_torch import TORCH_DTYPES

Open = Callable[[ComponentFiles, BackendSettings], Session]


class SlottedSession(WrappedSession):
    """A `Session` whose LoRA slots `set_slots` fills, and to whose vocabulary `set_words` adds.

    `open_engine` opens one engine of the component.

    Everything else is that of the engine that runs.
    """

    def __init__(self, component: ComponentFiles, settings: BackendSettings, open_engine: Open) -> None:
        assert component.slots is not None
        self.slots: SlotsRecord = component.slots
        self._component, self._settings, self._open_engine = component, settings, open_engine
        self._by_layer = {slot.layer: slot for slot in self.slots.slots}
        self._filled: Mapping[str, torch.Tensor] = {}
        self._words: torch.Tensor | None = None
        self._turn = threading.RLock()
        self._closed = False
        plain = self._open(dataclasses.replace(component, slots=None))
        self._plain: EngineSession | None = plain
        self._slotted: EngineSession | None = None
        super().__init__(plain)

    def _open(self, files: ComponentFiles) -> EngineSession:
        engine = self._open_engine(files, self._settings)
        assert isinstance(engine, EngineSession), "torch has no slots"
        return engine

    @property
    def _what(self) -> str:
        return "LoRA slots" if self.slots.slots else "words"

    @property
    def least_rank(self) -> int:
        """Of a slot without an adapter. ONNX Runtime 1.31 computes convolutions of 0 rows wrongly, and TensorRT's plans
        are built from 1.
        """
        return 0 if isinstance(self._settings, OpenVINOSettings) else 1

    @property
    def slot_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.spec.outputs[0].dtype]

    def slot_of(self, layer: str) -> Slot | None:
        return self._by_layer.get(layer)

    def set_slots(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill slots, from the next run on, with tensors by the names of `input_names`; nothing empties all of them.

        A and B of one layer have one rank, from 1 to that of the slots; the shapes are those of `slot_shapes`. The
        tensors are used where they are, until others are set. Raises `BackendError` for tensors that do not fit.
        """
        with self._turn:
            if not tensors:
                self._filled = {}
                if self._slotted is not None and self.slots.words is not None:
                    self._slotted.bind(self._complete({}))  # words run there, and would with the adapters of before
                return
            complete = self._complete(tensors)
            self._engine(slotted=True).bind(complete)
            self._filled = tensors

    def set_words(self, vectors: torch.Tensor | None) -> None:
        """Let ids from the vocabulary's end on stand for these vectors, [vectors, width]; None takes all words away.

        Raises `BackendError` for vectors that do not fit, and where the engine has no place for words.
        """
        with self._turn:
            if vectors is not None:
                words, shape = self.slots.words, tuple(vectors.shape)
                if words is None or len(shape) != 2 or shape[1] != words.width or not 1 <= shape[0] <= WORDS_LIMIT:
                    raise BackendError(f"{self.spec.name}: vectors of the shape {shape} do not fit {words}")
                vectors = vectors.to(self.device, self.slot_dtype)
            self._words = vectors
            if self._slotted is not None:
                self._slotted.bind(self._complete(self._filled))

    def _complete(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All inputs of the slots: those without an adapter get the least rank, of zeros, and no words are one of 0."""
        complete: dict[str, torch.Tensor] = {}
        left = dict(tensors)
        for slot in self.slots.slots:
            names = input_names(slot.layer)
            pair = [left.pop(name, None) for name in names]
            if pair == [None, None]:
                shapes = slot_shapes(slot.shape, self.least_rank)
                pair = [torch.zeros(shape, dtype=self.slot_dtype, device=self.device) for shape in shapes]
            self._require_fits(slot, pair)
            complete |= {name: value for name, value in zip(names, pair, strict=True) if value is not None}
        if left:
            raise BackendError(f"{self.spec.name}: the engine has no slot {min(left)!r}")
        if self.slots.words is not None:
            none = torch.zeros(1, self.slots.words.width, dtype=self.slot_dtype, device=self.device)
            complete[WORDS_INPUT] = none if self._words is None else self._words
        return complete

    def _require_fits(self, slot: Slot, pair: list[torch.Tensor | None]) -> None:
        given = [None if value is None else tuple(value.shape) for value in pair]
        ranks = range(self.least_rank, self.slots.rank + 1)
        if given[0] is None or all(tuple(given) != slot_shapes(slot.shape, rank) for rank in ranks):
            raise BackendError(f"{self.spec.name}: {given} do not fit the slot of {slot.layer}, up to rank {ranks[-1]}")

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with self._turn:
            return self._engine(slotted=bool(self._filled) or self._has_words(inputs)).run(inputs)

    def _has_words(self, inputs: Mapping[str, torch.Tensor]) -> bool:
        """Raises `BackendError` for an id that stands for nothing: runtimes would read beyond the table, or crash."""
        if self._words is None or self.slots.words is None:
            return False
        ids = inputs["input_ids"]
        most = int(ids.max()) if ids.numel() else 0
        if most >= self.slots.words.vocabulary + len(self._words):
            raise BackendError(f"{self.spec.name}: the id {most} stands for no word")
        return most >= self.slots.words.vocabulary

    def _engine(self, *, slotted: bool) -> EngineSession:
        if self._closed:
            raise BackendError(f"the session of {self.spec.name} is closed")
        engine = self._slotted if slotted else self._plain
        if engine is not None:
            return self._use(engine)
        other = self._plain if slotted else self._slotted
        if other is not None and not has_room(self._component.weights, self.device):
            other.close()
            self._plain = self._slotted = None
        progress.update(f"opening {self.spec.name} {'with' if slotted else 'without'} {self._what}", 0.0)
        files = dataclasses.replace(self._component, slots=None)
        if slotted:
            names = tuple(name for slot in self.slots.slots for name in input_names(slot.layer))
            names += () if self.slots.words is None else (WORDS_INPUT,)
            files = dataclasses.replace(
                files, graph_name=SLOTS_GRAPH_NAME, plans=self._component.slot_plans, slot_inputs=names
            )
        engine = self._open(files)
        if slotted:
            self._slotted = engine
            engine.bind(self._complete(self._filled))
        else:
            self._plain = engine
        return self._use(engine)

    def _use(self, engine: EngineSession) -> EngineSession:
        """Everything that is asked of this session is now asked of that one."""
        self.inner = engine
        if isinstance(engine, ShowsKernels):
            self.integer_layers = engine.integer_layers
        return engine

    def memory(self) -> MemoryUse:
        return self._engine(slotted=bool(self._filled)).memory()

    def close(self) -> None:
        with self._turn:
            for engine in (self._plain, self._slotted):
                if engine is not None:
                    engine.close()
            self._plain = self._slotted = None
            self._closed = True


def find_slotted(session: Session) -> SlottedSession | None:
    """The session whose slots can be filled, below whatever wraps it."""
    while not isinstance(session, SlottedSession):
        inner = getattr(session, "inner", None)
        if inner is None:
            return None
        session = inner
    return session
