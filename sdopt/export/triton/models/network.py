"""A network of a Triton repository that onnxruntime runs inside the Python backend, for a Triton without its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]


class TritonPythonModel:
    def initialize(self, args: dict[str, Any]) -> None:
        providers: list[Any] = ["CPUExecutionProvider"]
        if args["model_instance_kind"] == "GPU":
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(args["model_instance_device_id"])}))
        self._session = onnxruntime.InferenceSession(Path(__file__).parent / "model.onnx", providers=providers)
        self._ranks = {value.name: len(value.shape) for value in self._session.get_inputs()}

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        # Triton knows no scalars: they come as one element.
        fitted = {name: value if self._ranks[name] else value.reshape(()) for name, value in inputs.items()}
        names = list(request.requested_output_names())
        values = self._session.run(names, fitted)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, value) for name, value in zip(names, values, strict=True)]
        )
