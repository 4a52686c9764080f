"""A real Triton server on the CPU serves what `sdopt export triton` writes, and draws through HTTP and gRPC.

The server and its Python backend are those of the nvidia-pytriton wheel, in an environment that
scripts/triton_environment makes once in the user's cache.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc
import tritonclient.http
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

import sdopt
from sdopt.convert.convert import convert
from sdopt.convert.decide import open_plan
from sdopt.export.triton.repository import export_triton
from sdopt.model.family import Family
from sdopt.model.recipe import parse_recipe
from sdopt.pipeline.load import close_engines
from tests.checkpoints import make_model, small_recipe, write_folder
from tests.conftest import REPOSITORY

PROMPT = "a large red circle on a blue background"
MISSING = 5
_TYPES = {"prompt": "BYTES", "negative_prompt": "BYTES", "seed": "INT64", "steps": "INT32", "guidance_scale": "FP32",
          "latents": "FP32"}  # fmt: skip
_NUMPY = {"BYTES": np.object_, "INT64": np.int64, "INT32": np.int32, "FP32": np.float32}


@dataclass
class Server:
    """A running server, its two ports, and the bundles behind its models `shapes` and `xl`."""

    http_port: int
    grpc_port: int
    bundles: dict[str, Path]
    repositories: dict[str, Path]

    def draw(self, protocol: Any, model: str, **tensors: Any) -> np.ndarray[Any, Any]:
        port = self.http_port if protocol is tritonclient.http else self.grpc_port
        client = protocol.InferenceServerClient(f"127.0.0.1:{port}")
        try:
            inputs = [_make_input(protocol, name, value) for name, value in tensors.items()]
            pictures: np.ndarray[Any, Any] = client.infer(model, inputs).as_numpy("generated_image")
        finally:
            client.close()
        return pictures


def _make_input(protocol: Any, name: str, value: Any) -> Any:
    kind = _TYPES[name]
    array = np.atleast_1d(np.asarray(value, _NUMPY[kind]))
    tensor = protocol.InferInput(name, list(array.shape), kind)
    tensor.set_data_from_numpy(array)
    return tensor


@pytest.fixture(scope="module")
def tritonserver() -> Path:
    """The server's launcher. Skipped, with what is missing, where this machine cannot have one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "sdopt-triton-venv"
    script = REPOSITORY / "scripts" / "triton_environment"
    done = subprocess.run([script, folder], capture_output=True, text=True, check=False, timeout=1200)
    if done.returncode == MISSING:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return folder / "bin" / "tritonserver"


@pytest.fixture(scope="module")
def xl_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL with random weights, wider than high, two pictures a run."""
    folder = tmp_path_factory.mktemp("xl")
    source = write_folder(folder / "source", make_model(small_recipe(Family.SDXL)))
    values = {"source": str(source), "target": "onnxruntime", "precision": "fp32", "size": "64x32", "batch": 2,
              "verify": {"enabled": False}}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDOPT_CACHE", str(folder / "cache"))
        convert(open_plan(parse_recipe(values, where="the test")), folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module")
def server(
    tritonserver: Path, pristine_bundle: Path, xl_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("triton")
    bundles = {"shapes": pristine_bundle, "xl": xl_bundle}
    repositories = {name: folder / name for name in bundles}
    for name, bundle in bundles.items():
        export_triton(bundle, repositories[name], backend="python", name=name, scheduler="euler")
    with serving(tritonserver, list(repositories.values()), folder / "log") as (http_port, grpc_port):
        yield Server(http_port, grpc_port, bundles, repositories)


@contextmanager
def serving(tritonserver: Path, repositories: list[Path], log_file: Path) -> Iterator[tuple[int, int]]:
    """A server that is ready, until the block ends: its HTTP and its gRPC port."""
    http_port, grpc_port = _find_ports()
    command = [
        tritonserver, *(f"--model-repository={path}" for path in repositories), "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1", f"--http-port={http_port}", f"--grpc-port={grpc_port}", "--allow-metrics=false",
        # Servers beside each other must not share their shared memory.
        f"--backend-config=python,shm-region-prefix-name=sdopt-{http_port}-",
    ]  # fmt: skip
    with log_file.open("w") as log, subprocess.Popen(command, stdout=log, stderr=log, cwd="/") as process:
        try:
            _wait_until_ready(process, http_port, log_file)
            yield http_port, grpc_port
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _find_ports() -> list[int]:
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.bind(("127.0.0.1", 0))
        return [first.getsockname()[1], second.getsockname()[1]]


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{port}")
        try:
            if client.is_server_ready():
                return
        except (OSError, InferenceServerException):
            pass
        finally:
            client.close()
        time.sleep(0.2)
    pytest.fail(f"the server is not ready: {log.read_text()[-4000:]}")


def draw_with_sdopt(bundle: Path, **options: Any) -> np.ndarray[Any, Any]:
    pipe = sdopt.load(bundle, scheduler="euler")
    pipe.set_progress_bar_config(disable=True)
    try:
        return np.stack([np.asarray(image) for image in pipe(**options).images])
    finally:
        close_engines(pipe)


PROTOCOLS = pytest.mark.parametrize("protocol", [tritonclient.http, tritonclient.grpc], ids=["http", "grpc"])


@PROTOCOLS
def test_a_trained_model_draws_what_sdopt_draws(protocol: Any, server: Server) -> None:
    latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(1))
    drawn = server.draw(protocol, "shapes", prompt=PROMPT, steps=20, guidance_scale=4.0, latents=latents.numpy())
    ours = draw_with_sdopt(
        server.bundles["shapes"], prompt=PROMPT, num_inference_steps=20, guidance_scale=4.0, latents=latents
    )
    assert drawn.shape == ours.shape == (1, 64, 64, 3)
    # Another runtime computes: it may round a level differently.
    assert np.abs(drawn.astype(int) - ours).max() <= 2
    red, green, blue = np.moveaxis(drawn[0].astype(int), 2, 0)
    assert ((red > 2 * green) & (red > 2 * blue)).sum() > 400, "no large red circle"
    assert ((2 * blue > 3 * red) & (2 * blue > 3 * green)).sum() > 400, "no blue ground"


@PROTOCOLS
@pytest.mark.parametrize("negatives", [None, ["", "a castle", ""]], ids=["without", "with"])
def test_sdxl_draws_several_prompts_as_sdopt_does(protocol: Any, negatives: list[str] | None, server: Server) -> None:
    prompts = [PROMPT, "a small green star", "a yellow square"]
    latents = torch.randn((3, 4, 16, 32), generator=torch.Generator().manual_seed(2))
    extra = {} if negatives is None else {"negative_prompt": negatives}
    drawn = server.draw(
        protocol, "xl", prompt=prompts, steps=5, guidance_scale=3.0, latents=latents.numpy(), **extra
    )  # fmt: skip
    ours = draw_with_sdopt(
        server.bundles["xl"], prompt=prompts, num_inference_steps=5, guidance_scale=3.0, latents=latents, **extra
    )
    assert drawn.shape == ours.shape == (3, 32, 64, 3)
    assert np.abs(drawn.astype(int) - ours).max() <= 2
    assert ours.std() > 1, "a picture without anything in it proves nothing"


def test_a_seed_draws_the_same_picture_alone_and_in_company(server: Server) -> None:
    alone = server.draw(tritonclient.http, "shapes", prompt=PROMPT, seed=7, steps=3)
    together = server.draw(tritonclient.grpc, "shapes", prompt=["a small green star", PROMPT], seed=6, steps=3)
    assert np.array_equal(alone[0], together[1])
    assert not np.array_equal(alone[0], together[0])
    named = server.draw(tritonclient.http, "shapes", prompt=[PROMPT, PROMPT], seed=[7, 9], steps=3)
    assert np.array_equal(alone[0], named[0])
    assert not np.array_equal(named[0], named[1])


def test_a_prompt_alone_is_a_request(server: Server) -> None:
    first, second = (server.draw(tritonclient.http, "shapes", prompt=PROMPT) for _ in range(2))
    assert first.shape == (1, 64, 64, 3)
    assert not np.array_equal(first, second), "without a seed, each picture has its own"


def test_requests_at_the_same_time_do_not_meet(server: Server) -> None:
    def draw(seed: int) -> np.ndarray[Any, Any]:
        return server.draw(tritonclient.grpc, "shapes", prompt=PROMPT, seed=seed, steps=3)

    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(draw, [1, 2, 3, 1, 2, 3]))
    assert all(np.array_equal(drawn[i], drawn[i + 3]) for i in range(3))
    assert not np.array_equal(drawn[0], drawn[1])


@PROTOCOLS
@pytest.mark.parametrize(
    ("tensors", "said"),
    [({"steps": 0}, "steps must be 1 to 1000"), ({"steps": 1001}, "steps must be"), ({"steps": [1, 2]}, "steps"),
     ({"guidance_scale": np.nan}, "guidance_scale"), ({"guidance_scale": -1}, "guidance_scale"),
     ({"seed": -1}, "seed"), ({"seed": [1, 2]}, "seed"), ({"prompt": []}, "1 to 16 texts"),
     ({"prompt": ["x"] * 17}, "1 to 16 texts"), ({"prompt": "x" * 20_001}, "longer"),
     ({"prompt": np.array([b"\xff\xfe"], np.object_)}, "UTF-8"), ({"negative_prompt": ["a", "b"]}, "negative_prompt"),
     ({"latents": np.full((1, 4, 16, 16), np.inf)}, "finite"), ({"latents": np.zeros((2, 4, 16, 16))}, "latents"),
     ({"latents": np.zeros((1, 4, 8, 8))}, "latents")],
)  # fmt: skip
def test_a_bad_request_is_refused_by_name(protocol: Any, tensors: dict[str, Any], said: str, server: Server) -> None:
    with pytest.raises(InferenceServerException, match=said):
        server.draw(protocol, "shapes", **{"prompt": PROMPT} | tensors)


def test_the_server_reads_the_configs_as_they_are_written(server: Server) -> None:
    client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
    seen = 0
    for repository in server.repositories.values():
        for path in repository.glob("*/config.pbtxt"):
            written = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
            read = client.get_model_config(path.parent.name).config
            for kind in ("input", "output"):
                ours = [(t.name, t.data_type, list(t.dims)) for t in getattr(written, kind)]
                assert [(t.name, t.data_type, list(t.dims)) for t in getattr(read, kind)] == ours
            assert (read.backend, read.max_batch_size) == ("python", 0)
            seen += 1
    client.close()
    assert seen == 4 + 5


def test_a_served_repository_needs_nothing_beside_itself(tritonserver: Path, server: Server, tmp_path: Path) -> None:
    """Moved elsewhere, as into a container, and without the bundle that it came from."""
    moved = tmp_path / "moved"
    shutil.copytree(server.repositories["shapes"], moved)
    asked = {"prompt": PROMPT, "seed": 3, "steps": 2}
    ours = server.draw(tritonclient.http, "shapes", **asked)
    with serving(tritonserver, [moved], tmp_path / "log") as (http_port, grpc_port):
        elsewhere = Server(http_port, grpc_port, server.bundles, {})
        assert np.array_equal(elsewhere.draw(tritonclient.http, "shapes", **asked), ours)
