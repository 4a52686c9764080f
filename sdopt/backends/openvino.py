"""OpenVINO on the CPU, in fp32 or bf16. It reads opset 23 with `Attention` as it is, and graphs that are typed bf16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdopt.backends.engine_session import EngineSession, has_room
from sdopt.backends.probes import probe_backend
from sdopt.backends.protocol import ComponentFiles, axis_sizes
from sdopt.errors import BackendError, MissingDependency, MissingHardware
from sdopt.model.backend_settings import OpenVINOSettings
from sdopt.model.precision import DType, Precision

try:
    import openvino
    from openvino import opset13 as opset
except ImportError as error:
    raise MissingDependency.of("openvino", extra="cpu") from error

_LATENCY = {"PERFORMANCE_HINT": "LATENCY"}
_HINTS = {Precision.FP32: "f32", Precision.BF16: "bf16"}


class OpenVINOBackend:
    def __init__(self, settings: OpenVINOSettings) -> None:
        self._settings = settings

    def open(self, component: ComponentFiles) -> OpenVINOSession:
        precision = self._settings.inference_precision
        if precision not in probe_backend(self._settings).precisions:
            # OpenVINO would emulate bf16 in silence, slower than fp32.
            raise MissingHardware("this processor has no bf16 arithmetic", hint="convert again with --precision fp32")
        try:
            return OpenVINOSession(component, precision)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO refuses {component.graph}: {error}") from error


@dataclass(frozen=True)
class _Engine:
    """The compiled network; with bf16, `sines` computes some of its inputs from the others, in fp32."""

    network: Any
    sines: Any | None

    def bind(self, feeds: Mapping[str, Any]) -> None:
        """Set inputs once, without a copy: whoever calls keeps them alive. A run sets the others alone."""
        for name, value in feeds.items():
            tensor = value if isinstance(value, openvino.Tensor) else openvino.Tensor(value, shared_memory=True)
            self.network.set_tensor(name, tensor)

    def run(self, feeds: Mapping[str, Any]) -> Any:
        if self.sines is not None:
            known = {name: feeds[name] for name in _input_names(self.sines)}
            angles = self.sines.infer(known, share_inputs=True, share_outputs=False)
            feeds = {**feeds, **{name: angles[name] for name in _output_names(self.sines)}}
        known = {name: feeds[name] for name in _input_names(self.network) if name in feeds}
        # Outputs are copied: the request's own buffers are written again by the next run.
        return self.network.infer(known, share_inputs=True, share_outputs=False)


def _compile(graph: Path, precision: Precision, rows: Mapping[str, int]) -> _Engine:
    """`rows` fixes the first axis of inputs that the graph leaves open: the fastest kernels know their sizes."""
    core = openvino.Core()
    model = _read(core, graph, rows)
    sines = None
    if precision is Precision.BF16 and _find_sines(model):
        # bf16 has 8 bits: it rounds the angle of a time embedding, up to 999 radians, to whole radians and more. torch
        # keeps it in fp32. tests/unit/test_openvino_bf16.py shows what it does to the embedding.
        apart = _read(core, graph, rows)
        sines = _cut_sines_out(apart)
        _replace_sines(model)
    network = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": _HINTS[precision], **_LATENCY})
    fp32 = {"INFERENCE_PRECISION_HINT": _HINTS[Precision.FP32], **_LATENCY}
    small = core.compile_model(sines, "CPU", fp32).create_infer_request() if sines is not None else None
    return _Engine(network.create_infer_request(), small)


def _read(core: Any, graph: Path, rows: Mapping[str, int]) -> Any:
    model = core.read_model(graph)
    shapes = {name: model.input(name).get_partial_shape() for name in rows}
    for name, shape in shapes.items():
        shape[0] = rows[name]
    if shapes:
        model.reshape(shapes)
    return model


def _find_sines(model: Any) -> list[Any]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() in ("Sin", "Cos")]


def _cut_sines_out(model: Any) -> Any:
    """The part of a model from its inputs to its sines and cosines, as a model of its own."""
    results = []
    for number, node in enumerate(_find_sines(model)):
        node.output(0).set_names({f"sdopt_sine_{number}"})
        results.append(opset.result(node.output(0)))
    needed = {node.get_friendly_name() for node in _ancestors(results)}
    return openvino.Model(results, [p for p in model.get_parameters() if p.get_friendly_name() in needed], "sines")


def _replace_sines(model: Any) -> None:
    """Make every sine and cosine an input of the model, and drop the inputs that only they needed."""
    added = []
    for number, node in enumerate(_find_sines(model)):
        value = opset.parameter(node.output(0).get_partial_shape(), openvino.Type.f32)
        value.output(0).set_names({f"sdopt_sine_{number}"})
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(value.output(0))
        added.append(value)
    model.add_parameters(added)
    needed = {node.get_friendly_name() for node in _ancestors(model.get_results())}
    for parameter in model.get_parameters():
        if parameter.get_friendly_name() not in needed:
            model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()


def _ancestors(nodes: list[Any]) -> list[Any]:
    found: dict[str, Any] = {}
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node.get_friendly_name() not in found:
            found[node.get_friendly_name()] = node
            todo += [port.get_source_output().get_node() for port in node.inputs()]
    return list(found.values())


def _input_names(request: Any) -> list[str]:
    return [port.get_any_name() for port in request.model_inputs]


def _output_names(request: Any) -> list[str]:
    return [port.get_any_name() for port in request.model_outputs]


_MATRIX_PRODUCTS = ("Convolution", "FullyConnected", "MatMul")


class OpenVINOSession(EngineSession):
    """`engine` is the one that runs. Where the UNet takes a number of rows or its double, each has one of its own: that
    of drawings without guidance is compiled when the first is drawn, and where the machine has no room for two, takes
    the other's place.
    """

    def __init__(self, component: ComponentFiles, precision: Precision) -> None:
        self._precision = precision
        rows = component.extents["cfg_batch"] if "cfg_batch" in component.spec.named_axes else None
        self._rows = rows.max if rows is not None and rows.max == 2 * rows.min else None
        self._others: dict[int | None, _Engine] = {}
        super().__init__(component, None)
        self.engine = self._open(self._rows)

    def _open(self, rows: int | None) -> _Engine:
        batched = [t.name for t in self.spec.inputs if t.axes[:1] == ("cfg_batch",)] if rows is not None else []
        return _compile(self._component.graph, self._precision, dict.fromkeys(batched, rows or 0))

    def _switch(self, rows: int) -> None:
        """Make the engine for so many rows the one that runs."""
        if self._rows is None or rows == self._rows:
            return
        if has_room(self._component.weights, self.device):
            self._others[self._rows] = self.engine
        self.engine = None
        self.engine = self._others.pop(rows, None) or self._open(rows)
        self._rows = rows
        self.engine.bind({name: _to_feed(tensor) for name, tensor in self.bound.items()})

    def integer_layers(self) -> int:
        nodes = [op.get_rt_info() for op in self.engine.network.get_compiled_model().get_runtime_model().get_ops()]
        return sum(
            node["layerType"].astype(str) in _MATRIX_PRODUCTS and node["runtimePrecision"].astype(str) in ("i8", "u8")
            for node in nodes
        )

    def _bind(self, inputs: Mapping[str, torch.Tensor]) -> None:
        super()._bind(inputs)
        self.engine.bind({name: _to_feed(tensor) for name, tensor in inputs.items()})

    def _compute(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        feeds = {name: _to_feed(tensor) for name, tensor in inputs.items()}
        try:
            self._switch(axis_sizes(self.spec, inputs).get("cfg_batch", 0))
            results = self.engine.run(feeds)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO failed in {self.spec.name}: {error}") from error
        return {tensor.name: _to_tensor(results[tensor.name], tensor.dtype) for tensor in self.spec.outputs}


def _to_feed(tensor: torch.Tensor) -> Any:
    tensor = tensor.detach().contiguous()
    if tensor.dtype is torch.bfloat16:  # numpy has no bf16
        return openvino.Tensor(tensor.view(torch.int16).numpy(), tensor.shape, openvino.Type.bf16)
    return tensor.numpy()


def _to_tensor(result: Any, dtype: DType) -> torch.Tensor:
    tensor = torch.from_numpy(result)
    # OpenVINO calls the array of a bf16 output fp16; its bits are those of bf16.
    return tensor.view(torch.bfloat16) if dtype is DType.BF16 else tensor
