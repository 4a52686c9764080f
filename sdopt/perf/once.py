"""The work that the nightly job has done by a tree's own code: build a bundle, bench it, measure one process of it.

Each function is the entry of a child (`Tree.call`), which may run in the tree of an older commit: what it takes and
gives back is an API, JSON both ways, and `protocol` counts its changes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt.bench.case.report import write_report
from sdopt.bench.case.suite import SuiteCase, SuiteMethod
from sdopt.bench.case.suites import SuiteRun
from sdopt.disk.files import hash_file
from sdopt.errors import SdoptError
from sdopt.model.file_names import MANIFEST_NAME
from sdopt.perf.night.worktree import require_tree
from sdopt.processes.channel import JsonTable

if TYPE_CHECKING:
    from sdopt.bench.run import BenchRequest

PROTOCOL = 1


def dump_job(job: SuiteRun) -> dict[str, Any]:
    """A run of a suite as `bench` and `measure` take it."""
    return {
        "name": job.name, "case": job.case.model_dump(mode="json"), "steps": job.steps,
        "method": job.method.model_dump(mode="json"),
    }  # fmt: skip


def build(arguments: JsonTable) -> JsonTable:
    """Convert `source` by `recipe` to the folder `output`. Returns the digest of its manifest, the time that the build
    took in ns, and what of it was found in the store; both null where a manifest does not say.
    """
    _require_protocol(arguments)
    from sdopt.convert.convert import convert
    from sdopt.convert.decide import open_plan
    from sdopt.model.recipe import parse_recipe

    recipe = parse_recipe({**arguments["recipe"], "source": arguments["source"]}, where="the suite")
    output = Path(arguments["output"])
    manifest = convert(open_plan(recipe), output)
    record = manifest.build
    return {
        "digest": hash_file(output / MANIFEST_NAME),
        "wall_ns": record.wall_ns if record else None,
        "reused": list(record.reused) if record else None,
    }


def bench(arguments: JsonTable) -> JsonTable:
    """Run `job` on the bundle in `folder`, all its candidates, and write the report to the file `report`."""
    _require_protocol(arguments)
    from sdopt.bench.run import run_bench

    with tempfile.TemporaryDirectory(prefix="sdopt-perf-") as work:
        write_report(Path(arguments["report"]), run_bench(_make_request(arguments), Path(work)).report)
    return {}


def measure(arguments: JsonTable) -> JsonTable:
    """One process of `candidate` on the bundle in `folder`, in `job`'s way: its `ProcessRecord` of a bench report."""
    _require_protocol(arguments)
    from sdopt.bench.run import measure_process

    with tempfile.TemporaryDirectory(prefix="sdopt-perf-") as work:
        process = measure_process(_make_request(arguments), str(arguments["candidate"]), Path(work))
    return {"process": process.model_dump(mode="json")}


def _make_request(arguments: JsonTable) -> BenchRequest:
    from sdopt.bench.run import BenchRequest, apply_run

    base = BenchRequest(Path(arguments["folder"]), command=str(arguments.get("command", "")))
    return apply_run(base, str(arguments.get("suite", "")), _read_job(arguments))


def _read_job(arguments: JsonTable) -> SuiteRun:
    values = arguments["job"]
    return SuiteRun(
        values["name"], SuiteCase.model_validate_json(json.dumps(values["case"])), int(values["steps"]),
        SuiteMethod.model_validate_json(json.dumps(values["method"])),
    )  # fmt: skip


def _require_protocol(arguments: JsonTable) -> None:
    require_tree(arguments)
    if arguments["protocol"] != PROTOCOL:
        raise SdoptError(f"this tree speaks protocol {PROTOCOL}, and was asked in {arguments['protocol']}")
