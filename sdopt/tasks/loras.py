"""The LoRAs that a request asks for, by its own list and by the tags of its prompt, as files that are there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt.errors import AdapterError, UsageError
from sdopt.model.lora import LoraUse
from sdopt.model.request import DrawRequest
from sdopt.model.suggest import suggest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from sdopt.pipeline.lora_stack import LoadedAdapter, LoraStack

_SUFFIX = ".safetensors"


@dataclass
class LoraFinder:
    """Where LoRAs are looked for by name: as a path, then by file name in the folders, then by `ss_output_name`."""

    folders: Sequence[Path] = ()
    _names: dict[str, list[Path]] | None = field(default=None, repr=False)

    def find(self, name: str) -> Path:
        """Raises `AdapterError` where no file has the name, or several have."""
        path = Path(name).expanduser()
        if path.is_file():
            return path
        bare = Path(name).name.removesuffix(_SUFFIX)
        found = self._index().get(bare.casefold(), [])
        if len(found) > 1:
            raise AdapterError(
                f"several files are called {name!r}: {', '.join(map(str, found[:3]))}", hint="give the file's path"
            )
        if found:
            return found[0]
        where = f"in {', '.join(map(str, self.folders))}" if self.folders else "here"
        hint = suggest(bare, list(self._index())) or "say where your LoRAs are: --lora-folder FOLDER"
        raise AdapterError(f"there is no LoRA {name!r} {where}", hint=hint)

    def _index(self) -> dict[str, list[Path]]:
        if self._names is None:
            files = [path for folder in self.folders for path in sorted(_list_files(folder))]
            self._names = {}
            for path in files:
                self._names.setdefault(path.name.removesuffix(_SUFFIX).casefold(), []).append(path)
            stems = set(self._names)
            for path in files:
                alias = _read_alias(path).casefold()
                if alias and alias not in stems and path not in self._names.setdefault(alias, []):
                    self._names[alias].append(path)
        return self._names


def _list_files(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", hint="--lora-folder takes the folder that your LoRAs are in")
    return (path for path in folder.rglob(f"*{_SUFFIX}") if path.is_file())


def _read_alias(path: Path) -> str:
    from sdopt.adapters.adapter_file import read_adapter_file
    from sdopt.errors import SdoptError

    try:
        return read_adapter_file(path).alias
    except SdoptError:  # the folder has other files, too
        return ""


def list_loras(request: DrawRequest) -> tuple[LoraUse, ...]:
    """What a request asks for, tags after its own list. One that is named twice is there twice.

    Raises `UsageError` for a tag in the negative prompt, which has no drawing of its own.
    """
    from sdopt.pipeline.prompt_grammar import take_adapters

    if take_adapters(request.negative_prompt or "")[1]:
        raise UsageError(
            "the negative prompt names a LoRA, which would act on the whole picture",
            hint="name it in the prompt, with a negative weight where it is to be taken away",
        )
    tags = take_adapters(request.prompt)[1]
    return (*request.loras, *(LoraUse(source=t.name, unet=t.unet_weight, text=t.te_weight) for t in tags))


def load_loras(
    pipe: DiffusionPipeline, request: DrawRequest, finder: LoraFinder, expected: Mapping[str, str]
) -> tuple[LoraUse, ...]:
    """Load what the request asks for into the pipeline's engines; returns it with the files' digests.

    `expected` are digests by `source`. Raises `AdapterError` for a file that is missing, that the engines do not take,
    or that is another than was expected.
    """
    from sdopt.pipeline.lora_methods import stack_of

    used = []
    for use in list_loras(request):
        stack = stack_of(pipe)
        stack.require_slots()
        path = finder.find(use.source).resolve()
        name = _name_of(path)
        loaded = _load(stack, name, path)
        sha256, autov3 = loaded.sha256, loaded.tensors_sha256
        wanted = use.sha256 or expected.get(use.source, "")
        if wanted not in ("", sha256):
            raise AdapterError(
                f"{path} is another file than the LoRA {use.source!r} that the picture was drawn with",
                hint="put the file of that picture in its place, or give the prompt and leave out --from-image",
            )
        used.append(use.model_copy(update={"sha256": sha256, "autov3": autov3, "name": name}))
    return tuple(used)


def _name_of(path: Path) -> str:
    """Of the adapter in the pipeline: another state of the file is another adapter."""
    return f"{path}@{path.stat().st_mtime_ns}"


def _load(stack: LoraStack, name: str, path: Path, kept: Collection[str] = ()) -> LoadedAdapter:
    from sdopt.adapters.resolve import ERROR_LIMIT

    if name in stack.adapters:
        return stack.adapters[name]
    return stack.load(path, name, error_limit=ERROR_LIMIT, of_request=True, kept=kept)


def _load_again(stack: LoraStack, used: Sequence[LoraUse]) -> None:
    """What other requests have pushed out since this one was prepared. Raises `AdapterError` for another file."""
    kept = [use.name for use in used]
    for use in used:
        path = Path(use.name.rpartition("@")[0])
        if use.name not in stack.adapters and _load(stack, use.name, path, kept).sha256 != use.sha256:
            stack.drop([use.name])
            raise AdapterError(f"{path} was changed while requests were drawn", hint="draw the request again")


@contextmanager
def active_loras(pipe: Any, used: Sequence[LoraUse]) -> Iterator[None]:
    """While open, just these LoRAs act; where there are none, what the user has made active does."""
    if not used:
        yield
        return
    from sdopt.pipeline.lora_methods import stack_of

    stack = stack_of(pipe)
    _load_again(stack, used)
    with _put_back(stack):
        stack.activate(_add_up(used))
        stack.enable(on=True)
        yield


def _add_up(used: Sequence[LoraUse]) -> dict[str, Any]:
    """Weights by adapter; one that is named twice acts with the sum, as in A1111."""
    from sdopt.model.component import ComponentName
    from sdopt.pipeline.lora_scales import LayerScales

    totals: dict[str, tuple[float, float]] = {}
    for use in used:
        unet, text = totals.get(use.name, (0.0, 0.0))
        totals[use.name] = unet + use.unet, text + use.text
    return {
        name: {each: LayerScales(unet if each is ComponentName.UNET else text) for each in ComponentName}
        for name, (unet, text) in totals.items()
    }


@contextmanager
def _put_back(stack: LoraStack) -> Iterator[None]:
    before, enabled = stack.active, stack.enabled
    try:
        yield
    finally:
        stack.activate({name: weights for name, weights in before.items() if name in stack.adapters})
        stack.enable(on=enabled)
