"""The fidelity stage: the verdict on the pictures, from the store or by drawing.

Engines that this machine cannot run, because it has no GPU or one of another generation, are judged by their graphs:
ONNX Runtime runs those that are typed fp16 or fp32, OpenVINO those that are typed bf16. The verdict then says so, and
why.
"""

from __future__ import annotations

import json
from pathlib import Path

from sdopt.artifacts.files import hash_file
from sdopt.artifacts.fingerprint import digest_of
from sdopt.artifacts.machine import Machine
from sdopt.artifacts.manifest import BundleManifest, ComponentRecord, FidelityRecord, Verdict
from sdopt.artifacts.store import Store
from sdopt.build.staging import Staging
from sdopt.errors import EnvironmentMissingError, FidelityError
from sdopt.fidelity.candidate import find_reference_device
from sdopt.model.precision import Precision
from sdopt.model.recipe import OnnxRuntimeSettings, OpenVINOSettings, needs_gpu
from sdopt.pipeline.preflight import require_runnable

STAGE = "fidelity"
_RECORD_NAME = "fidelity.json"


def judge(draft: BundleManifest, store: Store, staging: Staging, machine: Machine | None = None) -> FidelityRecord:
    """The verdict on the engines, or on their graphs. Raises `FidelityError` where it is no pass.

    `machine` is this one by default.
    """
    if not (draft.recipe.verify.enabled and draft.recipe.verify.fidelity):
        return draft.fidelity
    drawn, obstacle = _runnable_here(draft, staging.output, machine)
    key = _fidelity_key(drawn, staging.folder)
    folder = store.find(STAGE, key)
    if folder is None:
        from sdopt.fidelity.verdict import judge_fidelity

        record = judge_fidelity(staging.folder, drawn, staging.work)
        if record.verdict is Verdict.PASS:  # a failure is looked at again: it may have been a fault of this run
            store.put(STAGE, key, {_RECORD_NAME: json.dumps(record.model_dump(mode="json")).encode()})
    else:
        record = FidelityRecord.model_validate_json((folder / _RECORD_NAME).read_bytes())
    if record.verdict is Verdict.FAIL:
        raise FidelityError(
            f"the engines do not draw what torch draws: {record.reason}",
            hint="try --precision fp32; --no-verify publishes the bundle without a verdict",
        )
    return _of_graphs(record, obstacle) if obstacle else record


def _runnable_here(draft: BundleManifest, output: Path, machine: Machine | None) -> tuple[BundleManifest, str]:
    """(the manifest, nothing), or (one whose engines are a CPU runtime on the same graphs, why they cannot run)."""
    try:
        require_runnable(output, draft, machine)
    except EnvironmentMissingError as error:
        if not any(needs_gpu(record.backend) for record in draft.components.values()):
            raise
        components = {name: _on_cpu(record) for name, record in draft.components.items()}
        return draft.model_copy(update={"components": components, "files": {}}), error.message
    return draft, ""


def _on_cpu(record: ComponentRecord) -> ComponentRecord:
    bf16 = record.precision is Precision.BF16
    return record.model_copy(update={"backend": OpenVINOSettings() if bf16 else OnnxRuntimeSettings(), "plans": ()})


def _of_graphs(record: FidelityRecord, obstacle: str) -> FidelityRecord:
    reason = (
        f"the graphs, run on the CPU, draw what torch draws; the engines have not run on a GPU ({obstacle}). "
        f"{record.reason}"
    )
    return record.model_copy(update={"verdict": Verdict.GRAPHS_PASS, "reason": reason})


def _fidelity_key(draft: BundleManifest, folder: Path) -> str:
    """Digest of everything that the pictures depend on: engines, weights, scheduler, tokenizers, machine, sdopt.

    The GPUs count where torch draws on one of them, and plans by their digests: two builds of one may differ in pixels.
    """
    dump = draft.model_dump(mode="json")
    parts = {name: [part["architecture"], part["backend"]] for name, part in dump["components"].items()}
    environment = dump["environment"]
    device = find_reference_device(draft)
    texts = sorted([*folder.glob("scheduler/*"), *folder.glob("tokenizer*/*")])
    return digest_of(
        [parts, dump["files"], dump["source"]["digest"], dump["recipe"]["verify"], dump["prediction"],
         environment["libraries"], environment["processor"], environment["cpu_features"], environment["sdopt"],
         device, environment["gpus"] if device == "cuda" else [],
         [[path.relative_to(folder).as_posix(), hash_file(path)] for path in texts]]
    )  # fmt: skip
