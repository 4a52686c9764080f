"""The fidelity stage: the verdict on the pictures, from the store or by drawing.

Engines that this machine cannot run, because it has no GPU or one of another generation, are judged by their graphs:
ONNX Runtime runs those that are typed fp16 or fp32, OpenVINO those that are typed bf16. The verdict then says so, and
why.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sdopt.bundle.manifest import BundleManifest
from sdopt.bundle.records import ComponentRecord, FidelityRecord, Verdict
from sdopt.disk.digest import digest_of
from sdopt.disk.files import hash_file
from sdopt.disk.shelf import Shelf
from sdopt.disk.staging import Staging
from sdopt.disk.store import Store
from sdopt.errors import EnvironmentMissingError, FidelityError
from sdopt.fidelity.candidate import find_reference_device
from sdopt.machine.environment import Machine
from sdopt.model.backend_settings import OnnxRuntimeSettings, OpenVINOSettings, TensorRTSettings, needs_gpu
from sdopt.model.precision import Precision
from sdopt.preflight.runnable import require_runnable

if TYPE_CHECKING:
    from sdopt.fidelity.picture_limits import PictureBudget
    from sdopt.fidelity.references import References

SHELF = Shelf("fidelity", FidelityRecord)


class PictureJudge:
    """Judges the drafts of one build. torch's pictures, and those of the 16-bit engines, are drawn once for all drafts.

    `machine` is this one by default.
    """

    def __init__(self, store: Store, staging: Staging, machine: Machine | None = None) -> None:
        self._store, self._staging, self._machine = store, staging, machine
        self._references: References | None = None
        self._budget: PictureBudget | None = None

    def set_base(self, draft: BundleManifest) -> None:
        """Draw with the 16-bit engines of `draft`: quantised ones are judged by how much they lose against these.

        torch draws the references from the 16-bit weights, which are still in the staging folder. Raises
        `FidelityError` where the 16-bit engines themselves do not draw what torch draws.
        """
        from sdopt.fidelity import references, verdict
        from sdopt.fidelity.picture_limits import PictureBudget

        folder, work, settings = self._staging.folder, self._staging.work, draft.recipe.verify
        drawn, _ = runnable_here(draft, self._staging.output, self._machine)
        scene = references.make_scene(folder, drawn, work)
        drawn_by_torch = references.draw_references(folder, drawn, work, scene)
        drawn_by_engines = references.draw_engines(folder, drawn, work, scene)
        base = verdict.judge_with_bf16_reference(folder, drawn, work, drawn_by_torch, drawn_by_engines)
        _require_pass(base)
        base_psnr_db = tuple(image.psnr_db for image in base.images)
        self._references = drawn_by_torch
        self._budget = PictureBudget(base_psnr_db, settings.max_psnr_loss, settings.min_ssim)

    def drop_base(self) -> None:
        """Judge what comes as any other bundle: nothing is quantised after all, and a budget has nothing to excuse."""
        self._references = self._budget = None

    def judge(self, draft: BundleManifest) -> FidelityRecord:
        """The verdict on the engines, or on their graphs, from the store or by drawing."""
        drawn, obstacle = runnable_here(draft, self._staging.output, self._machine)
        key = _fidelity_key(drawn, self._staging.folder)
        record = SHELF.find(self._store, key)
        if record is None:
            record = self._draw_and_judge(drawn)
            if record.verdict is Verdict.PASS:  # a failure is looked at again: it may have been a fault of this run
                SHELF.put(self._store, key, record)
        return _of_graphs(record, obstacle) if obstacle and record.verdict is Verdict.PASS else record

    def _draw_and_judge(self, drawn: BundleManifest) -> FidelityRecord:
        from sdopt.fidelity import references, verdict

        folder, work = self._staging.folder, self._staging.work
        if self._references is None:
            return verdict.judge_fidelity(folder, drawn, work)
        engines = references.draw_engines(folder, drawn, work, self._references.scene)
        return verdict.judge_engines(drawn, self._references, engines, budget=self._budget)


def judge(draft: BundleManifest, pictures: PictureJudge) -> FidelityRecord:
    """The verdict on the engines, or on their graphs. Raises `FidelityError` where it is not a pass."""
    if not (draft.recipe.verify.enabled and draft.recipe.verify.fidelity):
        return draft.fidelity
    record = pictures.judge(draft)
    _require_pass(record)
    return record


def _require_pass(record: FidelityRecord) -> None:
    if record.verdict is Verdict.FAIL:
        raise FidelityError(
            f"the engines do not draw what torch draws: {record.reason}",
            hint="try --precision fp32; --no-verify publishes the bundle without a verdict",
        )


def runnable_here(draft: BundleManifest, output: Path, machine: Machine | None) -> tuple[BundleManifest, str]:
    """(the manifest, nothing), or (one whose engines are a CPU runtime on the same graphs, why they cannot run)."""
    obstacle = _find_obstacle(draft, output, machine)
    if not obstacle:
        return draft, ""
    components = {name: stand_in(record) for name, record in draft.components.items()}
    plans = {plan.file for record in draft.components.values() for plan in record.every_plan}
    files = {name: record for name, record in draft.files.items() if name not in plans}
    return draft.model_copy(update={"components": components, "files": files}), obstacle


def _find_obstacle(draft: BundleManifest, output: Path, machine: Machine | None) -> str:
    """Why the engines cannot run here though their graphs can; empty where they run."""
    if any(isinstance(record.backend, TensorRTSettings) and not record.plans for record in draft.components.values()):
        return "their plans are not built yet"
    try:
        require_runnable(output, draft, machine)
    except EnvironmentMissingError as error:
        if not any(needs_gpu(record.backend) for record in draft.components.values()):
            raise
        return error.message
    return ""


def stand_in(record: ComponentRecord) -> ComponentRecord:
    """The same graph on a runtime of the CPU."""
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
    Quantised graphs and weights are among the draft's files, too.
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
