"""The values of a scheduler's config. diffusers tries them, in a child; the store keeps that it could."""

from __future__ import annotations

import json
from importlib.metadata import version

from sdopt._version import __version__
from sdopt.disk.digest import digest_of
from sdopt.disk.store import Store
from sdopt.errors import CheckpointError
from sdopt.model.component import Config
from sdopt.networks.built_scheduler import find_scheduler_fault
from sdopt.processes.call import call

_STAGE = "schedulers"


def require_usable_scheduler(config: Config, where: str) -> None:
    """Raise `CheckpointError` for values that the scheduler's class, which must be a known one, cannot take."""
    values = json.dumps(dict(config), sort_keys=True)  # diffusers itself writes -Infinity, which no digest takes
    key = digest_of({"config": values, "diffusers": version("diffusers"), "sdopt": __version__})
    store = Store()
    if store.find(_STAGE, key) is not None:
        return
    if fault := call(find_scheduler_fault, dict(config)).value["fault"]:
        raise CheckpointError(
            f"{where}: {config['_class_name']} cannot be built from scheduler/scheduler_config.json: {fault}",
            hint="download the folder scheduler/ again",
        )
    store.put(_STAGE, key, {"built.txt": b"built"})
