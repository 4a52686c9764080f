"""The console script as a user has it: from a checkpoint to pictures, and through everything that may go wrong.

One store serves the module, so that a network is traced once; what a test wants to see done again, it removes from a
copy of that store.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import sdopt
from sdopt.bundle.manifest import BundleManifest, read_manifest
from sdopt.bundle.records import Verdict
from sdopt.preflight.check import check_bundle
from tests.conftest import TINY_SHAPES
from tests.sdopt_process import run_sdopt

RECIPE = """
target = "onnxruntime"
precision = "fp32"
[verify]
steps = 2
prompts = ["a large red circle on a blue background"]
"""
SCRIPT = Path(sys.executable).parent / "sdopt"


def _hear_interrupts() -> None:
    """A shell starts what runs in its background deaf to Ctrl-C, and a test run may be such."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class Cli:
    """`sdopt` with a store of its own and a recipe file for `convert`."""

    cache: Path
    recipe: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def convert_words(self, output: Path, *more: str) -> list[str]:
        return ["convert", str(TINY_SHAPES), "-o", str(output), "--recipe", str(self.recipe), *more]

    def start(self, *words: str, wrapper: tuple[str, ...] = (str(SCRIPT),)) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*wrapper, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
            env={**os.environ, "SDOPT_CACHE": str(self.cache)}, preexec_fn=_hear_interrupts,
        )  # fmt: skip
        self.started.append(process)
        return process

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return run_sdopt(*words, cache=self.cache)

    def run_script(self, *words: str, wrapper: tuple[str, ...] = (str(SCRIPT),)) -> subprocess.CompletedProcess[str]:
        """By the console script: for what tests the start itself, and for the whole way once."""
        process = self.start(*words, wrapper=wrapper)
        out, err = process.communicate(timeout=500)
        assert "Traceback" not in err, err
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def convert(self, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
        return self.run(*self.convert_words(output, *more))

    def forget(self, stage: str, entry: str = "") -> None:
        shutil.rmtree(self.cache / "store" / stage / entry[:2] / entry)


def wait_for(process: subprocess.Popen[str], line: str) -> str:
    """Read stderr until a line that starts with `line`; return what was read."""
    assert process.stderr is not None
    seen = ""
    for text in process.stderr:
        seen += text
        if text.startswith(line):
            return seen
    pytest.fail(f"never said {line!r}: {seen}")


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the end; return the rest of stderr."""
    _, err = process.communicate(timeout=500)
    return err


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cli, Path]:
    """The command line, and a bundle that passed. Neither is to be changed."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "recipe.toml").write_text(RECIPE)
    cli = Cli(folder / "cache", folder / "recipe.toml")
    done = cli.run_script(*cli.convert_words(folder / "out" / "b", "--save-recipe", str(folder / "saved.toml")))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return cli, folder / "out" / "b"


@pytest.fixture
def cli(built: tuple[Cli, Path], tmp_path: Path) -> Iterator[Cli]:
    """The command line with a copy of the warm store."""
    shutil.copytree(built[0].cache, tmp_path / "cache")
    one = Cli(tmp_path / "cache", built[0].recipe)
    yield one
    for process in one.started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def copy(built: tuple[Cli, Path], tmp_path: Path) -> Path:
    shutil.copytree(built[1], tmp_path / "copy" / "b")
    return tmp_path / "copy" / "b"


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def require_published(output: Path) -> BundleManifest:
    """A whole bundle with nothing left beside it."""
    report = check_bundle(output)
    assert report.problems == ()
    assert [path.name for path in output.parent.iterdir() if "sdopt-partial" in path.name] == []
    return report.manifest


def test_the_way_from_a_checkpoint_to_a_picture(built: tuple[Cli, Path], tmp_path: Path) -> None:
    cli, bundle = built
    manifest = require_published(bundle)
    assert manifest.fidelity.verdict is Verdict.PASS
    assert manifest.fidelity.steps == 2
    assert manifest.build is not None
    assert manifest.build.wall_ns > 0
    assert manifest.build.reused == (), "the store was empty"
    assert all(part.parity and part.parity.passed for part in manifest.components.values())
    assert "license" in (bundle / "README.md").read_text()

    checked = cli.run_script("check", str(bundle), "--json")
    assert checked.returncode == 0
    assert json.loads(checked.stdout)["ok"] is True

    drawn = cli.run_script(
        "generate", str(bundle), "a large red circle on a blue background", "-o", str(tmp_path / "o"), "--steps", "20",
        "--seed", "1", "--json",
    )  # fmt: skip
    assert drawn.returncode == 0, drawn.stderr
    (picture,) = json.loads(drawn.stdout)["pictures"]
    with Image.open(picture["path"]) as image:
        assert image.size == (64, 64)
        red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), np.int64), 2, 0)
    assert ((red > 2 * green) & (red > 2 * blue)).sum() > 400, "no large red circle"
    assert ((2 * blue > 3 * red) & (2 * blue > 3 * green)).sum() > 400, "no blue ground"

    inspected = cli.run_script("inspect", str(bundle), "--json")
    assert json.loads(inspected.stdout)["kind"] == "bundle"

    measured = cli.run_script(
        "bench", str(bundle), "--against", "eager-fp32", "--repeats", "1", "--steps", "2", "--json"
    )
    assert measured.returncode == 0, measured.stderr
    assert json.loads(measured.stdout)["schema_version"] == 4


def test_the_python_api_loads_it(built: tuple[Cli, Path]) -> None:
    pipe = sdopt.load(built[1])
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a small green star", num_inference_steps=2).images[0]
    assert image.size == (64, 64)


def test_the_saved_recipe_is_what_ran(built: tuple[Cli, Path], cli: Cli, tmp_path: Path) -> None:
    again = cli.run("convert", "--recipe", str(built[1].parent.parent / "saved.toml"), "-o", str(built[1]))
    assert again.returncode == 0, again.stderr
    assert "tracing" not in again.stderr
    assert "drawing" not in again.stderr


def test_a_second_run_changes_nothing(built: tuple[Cli, Path], cli: Cli) -> None:
    before = snapshot(built[1])
    again = cli.convert(built[1], "--json")
    assert again.returncode == 0
    assert snapshot(built[1]) == before
    assert "copying" not in again.stderr
    manifest = BundleManifest.model_validate(json.loads(again.stdout)["manifest"])
    assert manifest == read_manifest(built[1])


def steps_of(done: subprocess.CompletedProcess[str]) -> dict[str, set[bool]]:
    assert done.returncode == 0, done.stderr
    found: dict[str, set[bool]] = {}
    for step in json.loads(done.stdout)["steps"]:
        found.setdefault(step["stage"], set()).add(step["found"])
    return found


def test_a_dry_run_says_what_is_there_and_writes_nothing(built: tuple[Cli, Path], cli: Cli, tmp_path: Path) -> None:
    everything = {stage: {True} for stage in ("weights", "graph", "words", "parity", "fidelity")}
    assert steps_of(cli.convert(built[1], "--dry-run", "--json")) == everything
    elsewhere = steps_of(cli.convert(tmp_path / "new", "--dry-run", "--json"))
    assert (elsewhere["weights"], elsewhere["graph"]) == ({False}, {True})
    larger = steps_of(cli.convert(tmp_path / "new", "--dry-run", "--json", "--size", "96x96"))
    # Only the text encoder does not depend on the size; its graph with words is made again.
    assert larger == {stage: {False} for stage in everything} | {"graph": {True, False}}
    assert not (tmp_path / "new").exists()


def test_another_runtime_takes_the_same_graphs(built: tuple[Cli, Path], cli: Cli, copy: Path) -> None:
    done = cli.convert(copy, "--target", "openvino", "--no-verify")
    assert done.returncode == 0, done.stderr
    assert "tracing" not in done.stderr
    manifest = require_published(copy)
    assert manifest.fidelity.verdict is Verdict.NOT_VERIFIED
    assert {part.backend.kind for part in manifest.components.values()} == {"openvino"}
    assert manifest.source.digest == read_manifest(built[1]).source.digest


@pytest.mark.parametrize("kind", ["file in it", "file in its place", "link", "file above it"])
def test_what_sdopt_did_not_make_is_left_alone(kind: str, cli: Cli, tmp_path: Path) -> None:
    output = tmp_path / "place" / "mine"
    output.parent.mkdir()
    if kind == "file in it":
        output.mkdir()
        (output / "thesis.txt").write_text("years of work")
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "thesis.txt").write_text("years of work")
        output.symlink_to(tmp_path / "elsewhere")
    elif kind == "file in its place":
        output.write_text("years of work")
    else:
        shutil.rmtree(output.parent)
        output.parent.write_text("years of work")
    before = snapshot(tmp_path)
    done = cli.convert(output)
    assert done.returncode == 1
    assert "-o" in done.stderr
    assert {name: entry for name, entry in snapshot(tmp_path).items() if not name.startswith("cache/")} == {
        name: entry for name, entry in before.items() if not name.startswith("cache/")
    }


def test_an_empty_folder_and_the_current_one_are_taken(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    words = cli.convert_words(Path("."), "--no-verify")
    done = cli.run_script(*words, wrapper=("env", "-C", str(tmp_path / "here"), str(SCRIPT)))
    assert done.returncode == 0, done.stderr
    assert require_published(tmp_path / "here").name == "here"


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--size", "65x64"), "multiple of"), (("--size", "64x66"), "nearest"), (("--batch", "0"), "batch"),
     (("--precision", "bf16"), "fp16"), (("--precision", "int3"), "fp32"), (("--target", "tensort"), "openvino"),
     (("--vae", "/none"), "/none")],
)  # fmt: skip
def test_an_impossible_request_is_refused_before_the_work(
    words: tuple[str, ...], said: str, cli: Cli, tmp_path: Path
) -> None:
    done = cli.convert(tmp_path / "new", *words)
    assert done.returncode in (1, 2)
    assert done.returncode == 2 or words[0] == "--vae"
    assert said in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "changed weights": ("unet/weights.safetensors", lambda p: flip_byte(p)),
    "truncated weights": ("unet/weights.safetensors", lambda p: os.truncate(p, 5000)),
    "missing config": ("vae_decoder/config.json", lambda p: p.unlink()),
    "changed graph": ("text_encoder/model.onnx", lambda p: flip_byte(p)),
    "changed scheduler": ("scheduler/scheduler_config.json", lambda p: p.write_text("{}")),
}


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def test_damage_is_named_with_the_command_that_mends_it(cli: Cli, copy: Path) -> None:
    for name, change in DAMAGE.values():
        change(copy / name)
    report = check_bundle(copy)
    for name, _ in DAMAGE.values():
        assert any(problem.startswith(name) for problem in report.problems), name
    done = cli.run("check", str(copy), "--json")
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "ArtifactError"
    drawn = cli.run("generate", str(copy), "a star", "-o", str(copy.parent / "pictures"))
    assert drawn.returncode == 1
    assert "damaged" in drawn.stderr

    mended = cli.run(*error["hint"].removeprefix("sdopt ").split(), "--no-verify")
    assert mended.returncode == 0, mended.stderr
    recipe = require_published(copy).recipe
    assert (str(recipe.target), recipe.precision) == ("onnxruntime", "fp32"), "the hint makes another bundle"


def test_a_bundle_may_be_moved(cli: Cli, copy: Path, tmp_path: Path) -> None:
    moved = copy.rename(tmp_path / "größer [1] name")
    assert cli.run("check", str(moved)).returncode == 0
    done = cli.run("generate", str(moved), "a star", "-o", str(tmp_path / "o"), "--steps", "1")
    assert done.returncode == 0, done.stderr


STAGES = ["copying the weights of unet", "tracing text_encoder", "parity: torch runs", "parity: onnxruntime runs",
          "drawing with torch", "drawing with the engines"]  # fmt: skip


@pytest.mark.timeout(3000)  # a build for each stage
@pytest.mark.parametrize(
    ("how", "stages"), [(signal.SIGKILL, STAGES), (signal.SIGINT, STAGES[1::2])], ids=["KILL", "INT"]
)
def test_a_build_that_is_stopped_at_every_stage_goes_on(
    how: signal.Signals, stages: list[str], built: tuple[Cli, Path], cli: Cli, tmp_path: Path
) -> None:
    cli.forget("graph", read_manifest(built[1]).components["text_encoder"].architecture)  # type: ignore[index]
    cli.forget("parity")
    cli.forget("fidelity")
    output = tmp_path / "out" / "b"
    for stage in stages:
        process = cli.start(*cli.convert_words(output))
        wait_for(process, stage)
        process.send_signal(how)
        rest = finish(process)
        assert not output.exists(), stage
        if how is signal.SIGINT:
            assert process.returncode == 130, rest
            assert "run the same command" in rest
            assert "Traceback" not in rest
    process = cli.start(*cli.convert_words(output))
    told = finish(process)
    assert process.returncode == 0, told
    for done in ("copying the weights", "tracing", "parity: "):
        assert done not in told, "it was done before the last stop"
    manifest, expected = require_published(output), read_manifest(built[1])
    for name, part in expected.components.items():
        assert manifest.components[name].architecture == part.architecture
        assert manifest.components[name].weights_key == part.weights_key
    assert manifest.fidelity.verdict is Verdict.PASS
    assert manifest.files["unet/weights.safetensors"] == expected.files["unet/weights.safetensors"]


_DIES_AT_RENAME = """
import os, signal, sys
from pathlib import Path
import sdopt.disk.staging as staging
real, left = Path.rename, int(sys.argv.pop(1))

def rename(self, target):
    global left
    ours = "sdopt-partial" in f"{self}{target}"
    if ours and left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= ours
    return real(self, target)

staging.Path.rename = rename
from sdopt.cli.main import main
main()
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_a_publication_that_is_killed_loses_neither_bundle(renames: int, cli: Cli, copy: Path) -> None:
    before = snapshot(copy)
    words = cli.convert_words(copy, "--target", "openvino", "--no-verify")
    done = cli.run_script(str(renames), *words, wrapper=(sys.executable, "-c", _DIES_AT_RENAME))
    assert done.returncode == -signal.SIGKILL
    old = copy if renames == 0 else copy.parent / ".b.sdopt-partial" / "retired"
    assert snapshot(old) == before
    again = cli.run(*words)
    assert again.returncode == 0, again.stderr
    manifest = require_published(copy)
    assert {part.backend.kind for part in manifest.components.values()} == {"openvino"}


def test_two_builds_of_one_output_both_succeed(cli: Cli, tmp_path: Path) -> None:
    output = tmp_path / "out" / "b"
    words = cli.convert_words(output, "--no-verify")
    processes = [cli.start(*words), cli.start(*words)]
    told = [finish(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert sum("copying the weights of unet" in text for text in told) == 1, "the second did it again"
    require_published(output)


def test_a_full_disk_loses_nothing(cli: Cli, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: both fail in the middle of a write."""
    output = tmp_path / "out" / "b"
    words = cli.convert_words(output, "--no-verify")
    done = cli.run_script(*words, wrapper=("bash", "-c", 'ulimit -f 1500; exec "$0" "$@"', str(SCRIPT)))
    assert done.returncode == 5, done.stderr
    assert "weights.safetensors" in done.stderr
    assert "free some space" in done.stderr
    assert not output.exists()
    again = cli.run(*words)
    assert again.returncode == 0, again.stderr
    require_published(output)


def swap_weights(graph: Path) -> None:
    """Let two projections of one shape change places in the graph: it is sound, and another network."""
    model = onnx.load(graph, load_external_data=False)
    by_name = {tensor.name: tensor for tensor in model.graph.initializer}
    name = next(name for name in by_name if name.endswith("attn1.to_q.weight"))
    first, second = by_name[name], by_name[name.replace("to_q", "to_v")]
    assert first.dims == second.dims
    kept = list(first.external_data)
    del first.external_data[:]
    first.external_data.extend(second.external_data)
    del second.external_data[:]
    second.external_data.extend(kept)
    graph.write_bytes(model.SerializeToString())


def test_an_engine_that_draws_something_else_is_not_published(cli: Cli, tmp_path: Path) -> None:
    """The graph is changed behind parity's back: only the pictures can show it."""
    cli.forget("fidelity")
    output = tmp_path / "out" / "b"
    process = cli.start(*cli.convert_words(output, "--json"))
    staged = tmp_path / "out" / ".b.sdopt-partial" / "bundle"
    # The last of the small files; parity is found in the store, and the engines are opened by a process that has to
    # start first.
    while not (staged / "model_index.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    swap_weights(staged / "unet" / "model.onnx")
    out, err = process.communicate(timeout=500)
    assert process.returncode == 3, err
    assert json.loads(out)["error"]["kind"] == "FidelityError"
    assert "PSNR" in err
    assert not output.exists()

    again = cli.convert(output)
    assert again.returncode == 0, "a fault of one run condemned the bundle for ever: " + again.stderr
    assert require_published(output).fidelity.verdict is Verdict.PASS
