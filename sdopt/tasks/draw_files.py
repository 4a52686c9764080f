"""Requests to picture files: open the bundle, draw, name and write. What `sdopt generate` does, as a function."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdopt._version import __version__
from sdopt.bundle.linked import open_links
from sdopt.disk.files import disk_errors, require_writable
from sdopt.errors import UsageError
from sdopt.model.file_names import MANIFEST_NAME
from sdopt.model.request import DrawRequest
from sdopt.model.samplers import SCHEDULERS
from sdopt.pictures.png import PictureRecipe, write_picture
from sdopt.tasks.loras import LoraFinder, list_loras
from sdopt.tasks.prepare import PreparedRequest, check_prompts
from sdopt.tasks.proposals import ProposedRequest, take_proposals

# What a user means as the name of a picture, and not of a folder.
_OTHER_PICTURES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".jfif", ".jpe", ".jpeg", ".jpg", ".jxl", ".tga", ".tif", ".tiff", ".webp"}
)


@dataclass(frozen=True)
class DrawnPicture:
    """A picture that was written, and what it was drawn with. `sampler` is A1111's name of the scheduler."""

    path: Path
    sampler: str
    request: DrawRequest
    width_px: int
    height_px: int

    def to_table(self) -> dict[str, Any]:
        """As `sdopt generate --json` prints it."""
        return {
            "path": str(self.path),
            "sampler": self.sampler,
            **self.request.model_dump(mode="json"),
            "width_px": self.width_px,
            "height_px": self.height_px,
        }


def draw_files(
    folder: Path,
    output: Path,
    requests: Sequence[DrawRequest],
    *,
    trust_engines: Iterable[str] = (),
    names: Mapping[str, str] | None = None,
    on_bundle: Callable[[str], None] = lambda digest: None,
    on_step: Callable[[float], None] | None = None,
    on_proposal: Callable[[str], None] = lambda told: None,
    lora_folders: Sequence[Path] = (),
    expected_loras: Mapping[str, str] = MappingProxyType({}),
    expected_words: Mapping[str, str] = MappingProxyType({}),
) -> list[DrawnPicture]:
    """Draw the requests with the bundle in `folder`, and write each picture as soon as it is drawn.

    `output` is a folder, made where it is missing, or the .png file of the only picture; nothing is overwritten.
    What a request does not say and a few-step model or LoRA proposes is taken, and `on_proposal` is told so in a line.
    `on_bundle` is told the digest of the bundle before anything is drawn, `on_step` the share of the work done, and
    `names` are what the user calls the fields of a request. LoRAs are looked for in `lora_folders`, and their files
    have the digests of `expected_loras`, by name, and those of textual inversions of `expected_words`. Raises what
    `draw_pictures` and `sdopt.load` raise,
    `UsageError` for an output that cannot be, and `ArtifactError` or `MissingHardware` where it cannot be written.
    """
    from sdopt.pipeline.assemble import read_scheduler
    from sdopt.pipeline.load import close_engines, load_pipeline
    from sdopt.pipeline.opened import opened_bundle
    from sdopt.pipeline.step_limit import require_steps
    from sdopt.tasks.draw import draw_pictures

    finder = LoraFinder(lora_folders)
    for request in requests:
        check_prompts(request)
        for use in list_loras(request):
            finder.find(use.source)
    _require_output(output, len(requests))
    folder = open_links(folder)
    proposed = take_proposals(folder, requests, finder, names or {})
    requests = [each.request for each in proposed]
    for told in dict.fromkeys(each.told for each in proposed if each.told):
        on_proposal(told)
    for request in requests:
        # Opening a large bundle takes long; its scheduler is a small file.
        require_steps(
            read_scheduler(folder, request.scheduler), request.steps, name=(names or {}).get("steps", "steps")
        )
    pipe = load_pipeline(folder, trust_engines=trust_engines)
    try:
        pipe.set_progress_bar_config(disable=True)
        bundle = opened_bundle(pipe)
        on_bundle(bundle.digest)
        prepared: list[PreparedRequest] = []
        images = draw_pictures(
            pipe, requests, names=names, on_step=on_step, loras=finder, on_prepared=prepared.extend,
            expected_loras=expected_loras, expected_words=expected_words,
        )  # fmt: skip
        # `prepared` is filled when the first picture is asked for.
        return [_write(output, pipe, proposed[number], image, prepared[number]) for number, image in enumerate(images)]
    finally:
        close_engines(pipe)


def is_picture(output: Path) -> bool:
    """Whether an output names a file, and not the folder to write to."""
    return output.suffix.lower() == ".png" and not output.is_dir()


def _write(
    output: Path, pipe: Any, proposed: ProposedRequest, image: Any, prepared: PreparedRequest
) -> DrawnPicture:  # fmt: skip
    from sdopt.pipeline.opened import opened_bundle
    from sdopt.pipeline.schedulers import label_of

    bundle, request = opened_bundle(pipe), proposed.request
    manifest = bundle.manifest
    sampler = label_of(pipe.scheduler) if request.scheduler is None else SCHEDULERS[request.scheduler].label
    recipe = PictureRecipe(
        sdopt=__version__, bundle=manifest.name, bundle_sha256=bundle.digest, request=request, loras=prepared.loras,
        embeddings=prepared.embeddings, proposed=proposed.told,
    )  # fmt: skip
    path = write_picture(output, image, recipe, sampler=sampler, model_hash=manifest.source.digest[:10])
    return DrawnPicture(path, sampler, request, image.width, image.height)


def _require_output(output: Path, pictures: int) -> None:
    """Make the folder, and see that a file can be put into it, before hours of drawing."""
    if output.suffix.lower() in _OTHER_PICTURES and not output.is_dir():
        right = output.with_suffix(".png" if pictures == 1 else "")
        raise UsageError(
            f"{output} cannot be written: pictures are PNG files",
            hint=f"choose another name: -o {shlex.quote(str(right))}",
        )
    _require_outside_bundles(output)
    folder = output
    if is_picture(output):
        if pictures > 1:
            raise UsageError(
                f"{output} is one file, and {pictures} pictures are asked for",
                hint=f"sdopt numbers and names them in a folder: -o {output.with_suffix('')}",
            )
        if os.path.lexists(output):
            raise UsageError(f"{output} exists, and pictures are never overwritten", hint="choose another name with -o")
        folder = output.parent
    try:
        with disk_errors(output):
            folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(
            f"{folder} cannot be a folder: a file is in its place", hint="choose another with -o"
        ) from error
    require_writable(output if output != folder else folder / "picture.png")


def _require_outside_bundles(output: Path) -> None:
    """Pictures in a bundle would look like a part of it, and go with it when it is built again."""
    place = output.resolve()
    for folder in (place, *place.parents):
        if (folder / MANIFEST_NAME).is_file():
            beside = folder.parent / f"{folder.name}-pictures"
            typed = str(beside) if output.is_absolute() else os.path.relpath(beside)
            what = "is a bundle" if folder == place else f"is in the bundle {folder}"
            raise UsageError(
                f"{output} {what}, and pictures do not belong there",
                hint=f"choose a folder outside: -o {shlex.quote(typed)}",
            )
