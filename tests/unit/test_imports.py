"""Importing sdopt and asking for help load no heavy library: each is poisoned, and still all works."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sdopt.cli.main import _COMMANDS

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino",
         "tensorrt", "tensorrt_rtx", "modelopt", "torchmetrics", "scipy", "matplotlib", "huggingface_hub")  # fmt: skip

_POISON = f"""
import sys

class Poison:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise AssertionError(f"{{name}} was imported")

sys.meta_path.insert(0, Poison())
"""


def run_poisoned(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", _POISON + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_poison_works() -> None:
    with pytest.raises(AssertionError, match="torch was imported"):
        run_poisoned("import torch")


def test_importing_sdopt_is_light() -> None:
    loaded = json.loads(run_poisoned("import sdopt, json; print(json.dumps(sorted(sys.modules)))"))
    assert not {name.partition(".")[0] for name in loaded} & {"numpy", "pydantic", "click", "rich", "PIL"}


def test_help_is_light() -> None:
    code = "sys.argv = ['sdopt', '--help']\nfrom sdopt.cli.main import main\nmain()"
    assert "convert" in run_poisoned(code)


@pytest.mark.parametrize("command", _COMMANDS)
def test_the_help_of_a_command_is_light(command: str) -> None:
    code = f"sys.argv = ['sdopt', {command!r}, '--help']\nfrom sdopt.cli.main import main\nmain()"
    assert f"sdopt {command}" in run_poisoned(code)


def test_the_lower_rooms_are_light() -> None:
    """`model` knows no library; `disk`, `machine` and `bundle` read and write with none but pydantic."""
    run_poisoned(
        "import pkgutil, importlib, sdopt.model, sdopt.disk, sdopt.machine, sdopt.bundle\n"
        "for package in (sdopt.model, sdopt.disk, sdopt.machine, sdopt.bundle):\n"
        "    for module in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "import sdopt.processes.call, sdopt.progress, sdopt.errors"
    )


def test_comparing_outputs_needs_torch_alone() -> None:
    """The process that runs engines for parity compares tensors; diffusers would cost it five seconds."""
    code = (
        "import sys, sdopt.trace.compare_outputs, sdopt.trace.seeded_inputs\n"
        "print([name for name in ('diffusers', 'transformers', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
