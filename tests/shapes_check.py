"""`scripts/tiny_shapes_check.py` as a module: what `tiny-shapes` draws, and the judge of its pictures."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_check() -> ModuleType:
    """The script, loaded once."""
    name = "tiny_shapes_check"
    if name not in sys.modules:
        path = Path(__file__).parents[1] / "scripts" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]
