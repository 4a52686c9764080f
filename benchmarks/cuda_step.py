"""ONNX Runtime's ways to run a network on an NVIDIA GPU, beside torch: time of a run, error, kernels.

    sdopt convert CHECKPOINT --target onnxruntime --precision fp16 --lora-slots attention:64 --no-verify -o out/m
    python -m benchmarks.cuda_step out/m --json out/cuda-step.json
    python -m benchmarks.cuda_step out/m --part torch --part compile

Every way runs in turn in this process on the same seeded inputs, bound once in the memory of the GPU; the times are
medians of the wall clock between two synchronizations. The error is that of the outputs against torch in fp32 without
TF32, as a norm over a norm.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import torch

from sdopt.backends.component_files import component_files
from sdopt.backends.cuda_operators import CudaGraph
from sdopt.backends.open import open_session
from sdopt.backends.protocol import ComponentFiles
from sdopt.bundle.manifest import read_manifest
from sdopt.machine.environment import describe_machine
from sdopt.model.backend_settings import TorchSettings
from sdopt.model.component import ComponentName
from sdopt.model.file_names import SLOTS_GRAPH_NAME
from sdopt.model.precision import Precision
from sdopt.model.slots import input_names, slot_shapes
from sdopt.trace.seeded_inputs import make_inputs
from sdopt.weights.to_torch import TORCH_DTYPES

Tensors = dict[str, torch.Tensor]
_RUNS = 15
# Name: session options of the provider, whether group norms become the fused operator, whether a CUDA graph is made.
WAYS: dict[str, tuple[dict[str, str], bool, bool]] = {
    "as today": ({}, False, False),
    "NHWC": ({"prefer_nhwc": "1"}, False, False),
    "CUDA graph": ({}, False, True),
    "GroupNorm": ({}, True, False),
    "GroupNorm, NHWC": ({"prefer_nhwc": "1"}, True, False),
    "GroupNorm, NHWC, graph": ({"prefer_nhwc": "1"}, True, True),
    "GroupNorm, graph": ({}, True, True),
    "attention unfused": ({"sdpa_kernel": "16"}, False, False),
    "attention of cuDNN": ({"sdpa_kernel": "8"}, True, False),
    "efficient, GroupNorm, NHWC": ({"sdpa_kernel": "2", "prefer_nhwc": "1"}, True, False),
    "efficient, GroupNorm, NHWC, graph": ({"sdpa_kernel": "2", "prefer_nhwc": "1"}, True, True),
    "cuDNN, GroupNorm, NHWC, graph": ({"sdpa_kernel": "8", "prefer_nhwc": "1"}, True, True),
    "unfused, GroupNorm, NHWC, graph": ({"sdpa_kernel": "16", "prefer_nhwc": "1"}, True, True),
}


def fuse_group_norms(graph: Path, output: Path) -> int:
    """Write `graph` with its group norms as the product runs them on a GPU; returns how many."""
    rewritten = CudaGraph(graph)
    count = rewritten.fuse_group_norms()
    onnx.save(rewritten.model, str(output))
    return count


class OnnxWay:
    """A session whose inputs and outputs are bound once."""

    def __init__(self, graph: Path, options: Mapping[str, str], *, cuda_graph: bool, profile: bool = False) -> None:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.enable_profiling = profile
        settings.profile_file_prefix = "/tmp/sdopt-profile"
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        providers: list[Any] = ["CPUExecutionProvider"]
        if self.stream is not None:
            cuda = {"device_id": "0", "user_compute_stream": str(self.stream.cuda_stream), **options}
            if cuda_graph:
                cuda["enable_cuda_graph"] = "1"
            providers.insert(0, ("CUDAExecutionProvider", cuda))
        self.session = onnxruntime.InferenceSession(str(graph), settings, providers=providers)
        if self.stream is not None:
            assert self.session.get_providers()[0] == "CUDAExecutionProvider", self.session.get_providers()
        self.binding = self.session.io_binding()
        self.kept: list[torch.Tensor] = []
        self.outputs: Tensors = {}

    def bind(self, inputs: Tensors, outputs: Tensors) -> None:
        self.outputs = outputs
        for name, value in inputs.items():
            self._bind(self.binding.bind_input, name, value)
        for name, value in outputs.items():
            self._bind(self.binding.bind_output, name, value)

    def _bind(self, bind: Callable[..., None], name: str, value: torch.Tensor) -> None:
        self.kept.append(value)
        dtype = {torch.bfloat16: np.uint16}.get(value.dtype) or torch.empty(0, dtype=value.dtype).numpy().dtype.type
        bind(name, value.device.type, 0, dtype, tuple(value.shape), value.data_ptr())

    def __call__(self) -> Tensors:
        self.session.run_with_iobinding(self.binding)
        return self.outputs


def time_ms(run: Callable[[], object]) -> float:
    """Median over `_RUNS`, after three that warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(_RUNS):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def relative_error(outputs: Tensors, reference: Tensors) -> float:
    name = next(iter(reference))
    value, right = outputs[name].double(), reference[name].double()
    return float((value - right).norm() / right.norm())


def top_kernels(run: Callable[[], object], most: int = 14) -> list[tuple[str, int, float]]:
    """(name, calls, milliseconds) of one run's kernels, whoever launches them."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    totals = [
        (each.key[:90], each.count, each.self_device_time_total / 1e3)
        for each in profile.key_averages() if each.self_device_time_total > 0
    ]  # fmt: skip
    totals.sort(key=lambda each: -each[2])
    return [*totals[:most], ("all", sum(each[1] for each in totals), sum(each[2] for each in totals))]


def count_nodes(way: OnnxWay) -> dict[str, int]:
    """Of a profiled session: nodes by provider and operator."""
    path = Path(way.session.end_profiling())
    counts: Counter[str] = Counter()
    for event in json.loads(path.read_text()):
        arguments = event.get("args", {})
        if event.get("cat") == "Node" and "provider" in arguments and str(event["name"]).endswith("_kernel_time"):
            counts[f"{arguments['provider'].removesuffix('ExecutionProvider')}:{arguments['op_name']}"] += 1
    path.unlink()
    return dict(counts.most_common(24))


class Bench:
    def __init__(self, folder: Path, component: ComponentName, ways: tuple[str, ...]) -> None:
        self.manifest = read_manifest(folder)
        self.files: ComponentFiles = component_files(folder, self.manifest, component)
        self.component, self.ways = component, ways
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        inputs = make_inputs(self.files.spec, self.files.config, self.files.extents)
        self.inputs = {name: value.to(self.device) for name, value in inputs.items()}
        self.rows: dict[str, Any] = {}
        self.reference: Tensors = {}

    def torch_settings(self, **fields: Any) -> TorchSettings:
        return TorchSettings(device=self.device.type, **fields)

    def measure_torch(self, name: str, settings: TorchSettings, *, keep: bool = False) -> None:
        started = time.monotonic()
        session = open_session(self.files, settings)
        outputs = {key: value.clone() for key, value in session.run(self.inputs).items()}
        row: dict[str, Any] = {"first_run_s": time.monotonic() - started}
        if keep:
            self.reference = outputs
        else:
            row |= {"ms": time_ms(lambda: session.run(self.inputs)), "error": relative_error(outputs, self.reference)}
            if self.device.type == "cuda":
                row["kernels"] = top_kernels(lambda: session.run(self.inputs), 6)
        self.add(name, row)
        session.close()

    def measure_ways(self, *, slots: bool) -> None:
        folder = self.files.graph.parent
        plain = folder / SLOTS_GRAPH_NAME if slots else self.files.graph
        fused = folder / f"fused-{plain.name}"
        norms = fuse_group_norms(plain, fused)
        inputs = self.inputs
        if slots:
            assert self.files.slots is not None
            inputs = dict(inputs)
            for slot in self.files.slots.slots:
                shapes = slot_shapes(slot.shape, 16)
                for key, shape in zip(input_names(slot.layer), shapes, strict=True):
                    # Zeros in B leave the output as it is: it is the time that is asked for.
                    inputs[key] = torch.zeros(shape, dtype=self.float_type, device=self.device)
        for name in self.ways:
            options, group_norm, cuda_graph = WAYS[name]
            if group_norm and not norms:
                continue
            label = f"slots rank 16: {name}" if slots else name
            try:
                self.add(label, self._measure_way(fused if group_norm else plain, options, inputs, cuda_graph, slots))
            except Exception as error:  # What a way answers is a result; the next one is tried.
                self.add(label, {"message": f"{type(error).__name__}: {error}"[:600]})
            gc.collect()

    @property
    def float_type(self) -> torch.dtype:
        return TORCH_DTYPES[self.files.spec.outputs[0].dtype]

    def _measure_way(
        self, graph: Path, options: dict[str, str], inputs: Tensors, cuda_graph: bool, slots: bool
    ) -> dict[str, Any]:
        started = time.monotonic()
        way = OnnxWay(graph, options, cuda_graph=cuda_graph)
        outputs = {name: torch.full_like(value, float("nan"), dtype=self.output_type(name))
                   for name, value in self.reference.items()}  # fmt: skip
        way.bind(inputs, outputs)
        way()
        row: dict[str, Any] = {"first_run_s": time.monotonic() - started}
        row |= {"ms": time_ms(way), "error": relative_error(way.outputs, self.reference)}
        if self.device.type == "cuda" and not slots:
            row["kernels"] = top_kernels(way)
        if not slots and not cuda_graph:
            del way
            gc.collect()
            shown = OnnxWay(graph, options, cuda_graph=False, profile=True)
            shown.bind(inputs, outputs)
            shown()
            row["nodes"] = count_nodes(shown)
        return row

    def output_type(self, name: str) -> torch.dtype:
        return next(TORCH_DTYPES[each.dtype] for each in self.files.spec.outputs if each.name == name)

    def add(self, name: str, row: dict[str, Any]) -> None:
        self.rows[name] = row
        shown = row.get("message") or f"{row.get('ms', float('nan')):9.2f} ms  error {row.get('error', 0):.1e}"
        print(f"{self.component:14}{name:32}{shown}  first {row.get('first_run_s', 0):.1f} s", flush=True)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--component", "names", multiple=True, default=("unet", "vae_decoder", "text_encoder"))
@click.option("--part", "parts", multiple=True, type=click.Choice(["torch", "compile", "onnxruntime", "slots"]),
              default=("torch", "onnxruntime", "slots"), show_default=True)  # fmt: skip
@click.option("--way", "ways", multiple=True, type=click.Choice(list(WAYS)), default=tuple(WAYS))
@click.option("--json", "output", type=click.Path(path_type=Path), help="Renewed after each component.")
def main(folder: Path, names: tuple[str, ...], parts: tuple[str, ...], ways: tuple[str, ...], output: Path) -> None:
    torch.backends.cudnn.allow_tf32 = False
    report: dict[str, Any] = {"bundle": folder.name, "machine": describe_machine().model_dump(mode="json")}
    for name in names:
        bench = Bench(folder, ComponentName(name), ways)
        report[name] = bench.rows
        with torch.inference_mode():
            bench.measure_torch("torch fp32", bench.torch_settings(), keep=True)
            half = Precision.FP16 if bench.device.type == "cuda" else Precision.BF16
            if "torch" in parts:
                for last in (False, True):
                    settings = bench.torch_settings(precision=half, channels_last=last)
                    bench.measure_torch(f"torch eager{', channels last' if last else ''}", settings)
            if "compile" in parts:
                settings = bench.torch_settings(precision=half, compile=True, compile_mode="default")
                bench.measure_torch("torch.compile", settings)
            if "onnxruntime" in parts:
                bench.measure_ways(slots=False)
            if "slots" in parts and bench.files.slots is not None:
                bench.measure_ways(slots=True)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        gc.collect()
    print(file=sys.stderr)


if __name__ == "__main__":
    main()
