"""diffusers' LoRA methods on pipelines of engines: the same names, arguments and answers, over LoRA slots.

`with_loras` gives them to the class of a pipeline. What they change belongs to the engines, so pipelines that share
engines share adapters, as they do in diffusers.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdopt.adapters.resolve import ERROR_LIMIT
from sdopt.errors import AdapterError, UsageError
from sdopt.model.component import ComponentName
from sdopt.pipeline.guarded_call import drawing_turn
from sdopt.pipeline.lora_scales import LayerScales, read_scales, read_unet_scales
from sdopt.pipeline.lora_stack import LoraStack

_WEIGHT_NAME = "pytorch_lora_weights.safetensors"


def with_loras(kind: Any) -> Any:
    """The pipeline's class with LoRA methods for engines.

    It keeps its name, by which `AutoPipelineFor….from_pipe` finds its relatives.
    """

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        scale, others = _take_scale(kwargs.get("cross_attention_kwargs"))
        if scale is None:
            return kind.__call__(self, *args, **kwargs)
        with drawing_turn(self), _scaled(stack_of(self), scale):
            return kind.__call__(self, *args, **{**kwargs, "cross_attention_kwargs": others})

    members = {name: value for name, value in vars(_LoraMethods).items() if not name.startswith("__")}
    members |= {"__call__": call, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), members)


def stack_of(pipe: Any) -> LoraStack:
    """The adapters of a pipeline's engines."""
    stack = getattr(pipe.unet, "loras", None)
    if not isinstance(stack, LoraStack):
        raise UsageError("this pipeline was not loaded from a bundle", hint="load one with sdopt.load(folder)")
    return stack


def _take_scale(options: object) -> tuple[float | None, dict[str, Any] | None]:
    """`scale` of a call's `cross_attention_kwargs`, and what else is in them."""
    if not isinstance(options, Mapping) or "scale" not in options:
        return None, None
    others = {name: value for name, value in options.items() if name != "scale"}
    return read_scales(options["scale"], "cross_attention_kwargs").everywhere, others or None


@contextmanager
def _scaled(stack: LoraStack, scale: float) -> Iterator[None]:
    stack.scale_calls(scale)
    try:
        yield
    finally:
        stack.scale_calls(1.0)


class _LoraMethods:
    """Copied into the class of a pipeline; `self` is the pipeline."""

    unet: Any

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: Any, adapter_name: str | None = None, hotswap: bool = False,
        *, weight_name: str | None = None, lora_error: float = ERROR_LIMIT, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Load an adapter from a file, a folder or tensors, and make it active with weight 1 beside no other.

        `lora_error` is the largest relative error with which what is not of low rank is brought to the slots' rank.
        With `hotswap`, an adapter of that name is replaced and keeps its weight. Raises `AdapterError` for what these
        engines do not take, `UsageError` for a name that is taken.
        """
        if unknown := kwargs.keys() - _LIBRARY_ARGUMENTS:
            raise UsageError(f"load_lora_weights does not know {', '.join(sorted(unknown))}")
        stack = stack_of(self)
        with drawing_turn(self):
            name = adapter_name or _free_name(stack)
            if name in stack.adapters and not hotswap:
                raise UsageError(
                    f"an adapter called {name!r} is loaded already",
                    hint="choose another adapter_name, delete it first, or pass hotswap=True",
                )
            stack.require_slots()
            replaced = stack.adapters.get(name)
            with _file_of(pretrained_model_name_or_path_or_dict, weight_name) as path:
                stack.load(path, name, error_limit=lora_error)
            try:
                # As diffusers: what was loaded last acts, and a swapped one as before.
                stack.activate({name: _everywhere(1.0)} if replaced is None else stack.active)
            except AdapterError:
                if replaced is not None:
                    stack.adapters[name] = replaced
                raise

    def set_adapters(self, adapter_names: Sequence[str] | str, adapter_weights: Any = None) -> None:
        """Make just these adapters active, each with its weight: a number, or a table of blocks or of components."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = (
            list(adapter_weights) if isinstance(adapter_weights, (list, tuple)) else [adapter_weights] * len(names)
        )
        if len(names) != len(weights):
            raise UsageError(f"there are {len(names)} adapter names and {len(weights)} weights")
        stack = stack_of(self)
        with drawing_turn(self):
            stack.require_names(names)
            stack.activate({name: self._read_weights(name, value) for name, value in zip(names, weights, strict=True)})

    def _read_weights(self, name: str, value: Any) -> dict[ComponentName, LayerScales]:
        stack = stack_of(self)
        _require_table(name, value)
        layers = [layer for pairs in stack.adapters[name].pairs.values() for layer in pairs]
        scales: dict[ComponentName, LayerScales] = {}
        for component in stack.adapters[name].components:
            own = value.get(component.value) if isinstance(value, Mapping) else value
            if component is ComponentName.UNET:
                if isinstance(value, Mapping) and value.keys() <= _BLOCKS:
                    own = value
                scales[component] = read_unet_scales(own, name, self.unet.config, layers)
            else:
                scales[component] = read_scales(own, name)
        return scales

    def get_active_adapters(self) -> list[str]:
        stack = stack_of(self)
        return list(stack.active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of the loaded adapters by the component that they change."""
        found: dict[str, list[str]] = {}
        for name, adapter in stack_of(self).adapters.items():
            for component in () if adapter.of_request else adapter.components:
                found.setdefault(component.value, []).append(name)
        return found

    def disable_lora(self) -> None:
        with drawing_turn(self):
            stack_of(self).enable(on=False)

    def enable_lora(self) -> None:
        with drawing_turn(self):
            stack_of(self).enable(on=True)

    def delete_adapters(self, adapter_names: Sequence[str] | str) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        with drawing_turn(self):
            stack_of(self).drop(names)

    def unload_lora_weights(self, **kwargs: Any) -> None:
        """Forget every adapter: the plain engines run again."""
        del kwargs
        stack = stack_of(self)
        with drawing_turn(self):
            stack.drop(list(stack.adapters))
            stack.enable(on=True)

    def set_lora_device(self, adapter_names: Sequence[str], device: Any) -> None:
        """Nothing: adapters stay with their engines, where switching them takes milliseconds."""
        del device
        stack_of(self).require_names([adapter_names] if isinstance(adapter_names, str) else list(adapter_names))

    def enable_lora_hotswap(self, **kwargs: Any) -> None:
        """Nothing: slots always take another adapter, of other layers and another rank too."""
        del kwargs

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        raise UsageError(
            "an engine's weights are fixed when it is built, so that an adapter cannot be fused into them",
            hint="bake it into another bundle: sdopt convert MODEL --lora FILE:WEIGHT -o OTHER",
        )

    unfuse_lora = fuse_lora


_BLOCKS = {"down", "mid", "up"}
# Of diffusers' method, that say how to fetch or to spare memory.
_LIBRARY_ARGUMENTS = {"low_cpu_mem_usage", "local_files_only", "use_safetensors", "cache_dir", "force_download",
                      "proxies", "token", "revision", "subfolder"}  # fmt: skip


def _everywhere(weight: float) -> dict[ComponentName, LayerScales]:
    return {component: LayerScales(weight) for component in ComponentName}


def _require_table(name: str, value: Any) -> None:
    """A misspelt component would act with 1, in silence."""
    networks = {component.value for component in ComponentName if component.takes_adapters}
    if isinstance(value, Mapping) and not (value.keys() <= _BLOCKS or value.keys() <= networks):
        raise UsageError(
            f"the weights of adapter {name!r} name {', '.join(map(repr, value))}, and a table names blocks "
            f"({', '.join(sorted(_BLOCKS))}) or networks ({', '.join(sorted(networks))})"
        )


def _free_name(stack: LoraStack) -> str:
    """As diffusers counts them."""
    number = len(stack.adapters)
    while f"default_{number}" in stack.adapters:
        number += 1
    return f"default_{number}"


@contextmanager
def _file_of(source: Any, weight_name: str | None) -> Iterator[Path]:
    """The file of what `load_lora_weights` was given; tensors are written to one, which is gone afterwards."""
    if isinstance(source, Mapping):
        from safetensors.torch import save_file

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / _WEIGHT_NAME
            save_file({name: value.detach().cpu().contiguous() for name, value in source.items()}, path)
            yield path
        return
    path = Path(os.fspath(source))
    if path.is_dir():
        path = path / (weight_name or _WEIGHT_NAME)
    elif weight_name is not None and not path.exists():
        path = _download(os.fspath(source), weight_name)
    if not path.is_file():
        raise AdapterError(
            f"there is no adapter file {path}",
            hint="give a .safetensors file, a folder with weight_name, or a Hugging Face id with weight_name",
        )
    yield path


def _download(repository: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterError(f"cannot fetch {name} of {repository}: {error}") from error
