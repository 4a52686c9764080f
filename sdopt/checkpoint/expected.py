"""What names and shapes a config asks for. torch knows, in a child; the store keeps its answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

from pydantic import TypeAdapter

from sdopt._version import __version__
from sdopt.disk.digest import digest_of
from sdopt.disk.store import Store
from sdopt.errors import CheckpointError
from sdopt.model.component import ComponentName, Config
from sdopt.processes.call import call

_STAGE = "shapes"
_FILE = "expected.json"
# Of what the answer is made from: another version may add a key to a config or rename a tensor.
_LIBRARIES = ("torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Question:
    name: ComponentName
    config: Config


@dataclass(frozen=True)
class Expected:
    """A config with every key that the installed libraries know, and the shapes of the tensors that it needs."""

    config: Config
    shapes: Mapping[str, tuple[int, ...]]


_EXPECTED = TypeAdapter(Expected)


def expect_component(name: ComponentName, config: Config) -> Expected:
    """Complete a config and list its tensors. Raises `CheckpointError` for a config that cannot be built."""
    try:
        key = _key(name, config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the config of the {name} holds values that are not JSON: {error}") from error
    store = Store()
    if (found := store.find(_STAGE, key)) is not None:
        return _EXPECTED.validate_json((found / _FILE).read_bytes())
    expected = call(expect_in_child, Question(name, config)).value
    store.put(_STAGE, key, {_FILE: _EXPECTED.dump_json(expected)})
    return expected


def expect_in_child(question: Question) -> Expected:
    from sdopt.networks.built_shapes import build_shapes

    return Expected(*build_shapes(question.name, question.config))


def _key(name: ComponentName, config: Config) -> str:
    versions = {library: version(library) for library in _LIBRARIES}
    plain = json.loads(json.dumps(dict(config), allow_nan=False))
    return digest_of({"component": name, "config": plain, "versions": versions, "sdopt": __version__})
