"""`sdopt convert`: flags and a recipe file -> a build, its plan, or the reason why not."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from sdopt import progress
from sdopt.cli.text import format_duration, format_megabytes, neutralise
from sdopt.disk.files import hash_file, write_file
from sdopt.errors import CheckpointError, RecipeError
from sdopt.model.file_names import MANIFEST_NAME
from sdopt.model.lora import parse_lora
from sdopt.model.recipe import BuildRecipe, parse_recipe

if TYPE_CHECKING:
    from sdopt.bundle.manifest import BundleManifest
    from sdopt.convert.build import Step


@click.command()
@click.argument("source", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the bundle.  [default: engines/NAME]")
@click.option(
    "--again", type=click.Path(path_type=Path), metavar="FOLDER",
    help="Build the bundle at FOLDER again, by the recipe that it holds; other flags change it.",
)  # fmt: skip
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="TOML file with any of the settings.")
@click.option("--target", metavar="NAME", help="cpu, openvino, onnxruntime, cuda, tensorrt, rtx, rtx:sm86,sm89.")
@click.option("--precision", metavar="NAME", help="auto, fp32, bf16, fp16; int8 or fp8 where they pay.")
@click.option(
    "--size", metavar="SIZES", help="WxH pixels, several as WxH,WxH, a range as WxH..WxH.  [default: the model's own]"
)
@click.option("--batch", type=int, help="Pictures a run.  [default: 1]")
@click.option("--tokens", type=int, help="Longest prompt: 77 tokens or a multiple, up to 616.  [default: 77]")
@click.option("--vae", metavar="SOURCE", help="Another VAE: a diffusers VAE folder, a single file or a Hub id.")
@click.option(
    "--prediction",
    metavar="NAME",
    help="What the UNet predicts: epsilon or v_prediction.  [default: what the model says]",
)
@click.option("--ema", is_flag=True, default=None, help="Take the checkpoint's EMA copy of the UNet.")
@click.option(
    "--lora", multiple=True, metavar="FILE[:WEIGHT[:TEXT]]",
    help="Add a LoRA to the weights that are built; a second weight is that of the text encoders.",
)  # fmt: skip
@click.option(
    "--lora-slots",
    metavar="SLOTS",
    help="Slots for LoRAs of this rank that change without a rebuild: 64, or attention:64, or all:64.",
)
@click.option(
    "--require-fused", is_flag=True, default=None,
    help="Refuse a UNet or text encoder with attention that has no dedicated kernel.",
)  # fmt: skip
@click.option("--max-memory", metavar="SIZE", help="Most memory that building engines may take, as in 12GiB.")
@click.option(
    "--max-psnr-loss", metavar="DB", type=float, help="What quantised pictures may lose against 16 bits.  [default: 20]"
)
@click.option("--min-ssim", metavar="SSIM", type=float, help="Least likeness of quantised pictures.  [default: 0.9]")
@click.option(
    "--require", "require_quantized", is_flag=True, default=None, help="Refuse a bundle in which no block is quantised."
)
@click.option("--no-verify", is_flag=True, help="Publish without parity and fidelity; the manifest says so.")
@click.option("--save-recipe", type=click.Path(path_type=Path), help="Write what ran as a TOML recipe.")
@click.option("--dry-run", is_flag=True, help="Show the steps, and do none.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest (or the steps) as JSON on stdout.")
def convert(
    source: str | None, output: Path | None, again: Path | None, recipe_file: Path | None, no_verify: bool,
    save_recipe: Path | None, dry_run: bool, as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """Turn SOURCE into a bundle of engines that is proven to draw the same pictures.

    SOURCE is a diffusers folder, a .safetensors or .ckpt file, or a Hugging Face id. Killed at any point, the same
    command goes on where it was. Exit code 3: the engines do not draw what torch draws, and nothing was published.
    """
    recipe = merge_recipe(recipe_file, {**flags, "source": source}, no_verify=no_verify, again=again)
    from sdopt.convert.convert import convert as build
    from sdopt.convert.convert import list_steps
    from sdopt.convert.decide import open_plan
    from sdopt.disk.staging import require_ours

    output = output or again or Path("engines") / _default_name(recipe.source)
    require_ours(output)  # before a download
    with progress.shown_on_stderr():
        plan = open_plan(recipe)
        if save_recipe is not None:
            write_file(save_recipe, dump_recipe(plan.recipe))
        steps = list_steps(plan, output, read_all=again is not None) if dry_run else []
        manifest = None if dry_run else build(plan, output, read_all=again is not None)
    if manifest is None:
        _show_steps(steps, as_json)
    elif as_json:
        print(json.dumps({"folder": str(output), "manifest": manifest.model_dump(mode="json")}))
    else:
        _show_bundle(output, manifest)


_VERIFY_FLAGS = ("max_psnr_loss", "min_ssim")


def merge_recipe(
    file: Path | None, flags: dict[str, Any], *, no_verify: bool, again: Path | None = None
) -> BuildRecipe:
    """Flag over file over default; `again` is a bundle whose recipe takes the file's place.

    Raises `RecipeError` naming the file or the command line, `ArtifactError` for what is not a bundle, and
    `CheckpointError` where what the bundle was made from is gone.
    """
    values: dict[str, Any] = {}
    if again is not None:
        if file is not None:
            raise RecipeError("--again and --recipe each name a recipe", hint="leave one of them out")
        values = _read_again(again, flags)
    if file is not None:
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"cannot read the recipe {file}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"the recipe {file} is not TOML: {error}") from error
        parse_recipe(values, where=str(file))
    if flags.get("precision") is not None:
        # The flag wins over all that the file says of precision, also over what it says of one component.
        values.pop("component_precision", None)
        if again is not None:
            # A precision that was asked for by name is not quantised by the way.
            values.pop("quantization", None)
            values.pop("require_quantized", None)
    values |= {key: value for key, value in flags.items() if value not in (None, ()) and key not in _VERIFY_FLAGS}
    verify = {key: flags[key] for key in _VERIFY_FLAGS if flags.get(key) is not None}
    if verify:
        values["verify"] = {**values.get("verify", {}), **verify}
    if no_verify:
        values["verify"] = {**values.get("verify", {}), "enabled": False}
    typed = [*flags, *(f"verify.{key}" for key in _VERIFY_FLAGS)]
    names = {key: f"--{key.removeprefix('verify.').replace('_', '-')}" for key in typed}
    recipe = parse_recipe(values, where="the command line", names=names)
    if not recipe.source:
        raise RecipeError("no SOURCE was given", hint="sdopt convert MODEL -o FOLDER; try sdopt/assets/tiny-shapes")
    return recipe


def _read_again(folder: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a bundle as a table, checked for local files that are gone and that no flag replaces."""
    from sdopt.bundle.manifest import read_manifest

    recipe = read_manifest(folder).recipe
    for text in recipe.lora if not flags.get("lora") else ():
        path = Path(parse_lora(text).source)
        if path.is_absolute() and not path.exists():
            raise CheckpointError(
                f"{path}, which is in the weights of {folder}, is no longer there",
                hint=f"say where it is now: sdopt convert --again {shlex.quote(str(folder))} --lora FILE:WEIGHT",
            )
    for key, example in (("source", "MODEL "), ("vae", "--vae VAE ")):
        path = Path(getattr(recipe, key))
        if path.is_absolute() and not path.exists() and flags.get(key) is None:
            raise CheckpointError(
                f"{path}, which {folder} was made from, is no longer there",
                hint=f"say where it is now: sdopt convert {example}--again {shlex.quote(str(folder))}",
            )
    return recipe.model_dump(mode="json", exclude_none=True)


def dump_recipe(recipe: BuildRecipe) -> bytes:
    """A recipe as TOML that `--recipe` reads again."""
    import tomli_w

    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True)).encode()


def _default_name(source: str) -> str:
    name = Path(source.rstrip("/")).name
    return name.removesuffix(".safetensors").removesuffix(".ckpt") or "bundle"


def _show_steps(steps: list[Step], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"steps": [dataclasses.asdict(step) for step in steps]}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("step", "of", "", title="what convert will do")
    for figure in ("disk MB", "memory MB,\nabout", "time, about"):
        table.add_column(figure, justify="right", no_wrap=True)
    for step in steps:
        todo = "" if step.found else format_duration(step.expected_s)
        table.add_row(
            step.stage, step.component, "found" if step.found else "to do", format_megabytes(step.disk_bytes),
            format_megabytes(step.memory_bytes), todo,
        )  # fmt: skip
    Console(stderr=True).print(table)
    for step in steps:
        if step.note:
            print(f"{step.component}: {step.note}", file=sys.stderr)


def _show_bundle(output: Path, manifest: BundleManifest) -> None:
    for name, record in manifest.components.items():
        parity = (
            f"parity {max(o.relative_l2 for o in record.parity.outputs):.0e}" if record.parity else "parity not checked"
        )
        reason = f" ({record.precision_reason})" if record.precision_reason else ""
        quantized = f", {record.quantization.describe()}" if record.quantization else ""
        print(f"{name}: {record.precision} on {record.backend.kind}{reason}, {parity}{quantized}", file=sys.stderr)
    print(neutralise(f"fidelity: {manifest.fidelity.verdict}. {manifest.fidelity.reason}"), file=sys.stderr)
    print(neutralise("\n".join(_next_steps(output, manifest))), file=sys.stderr)


def _next_steps(output: Path, manifest: BundleManifest) -> list[str]:
    from sdopt.machine.gpus import find_gpus
    from sdopt.model.backend_settings import needs_gpu

    folder = shlex.quote(str(output))
    if find_gpus() or not any(needs_gpu(record.backend) for record in manifest.components.values()):
        return [f"\n{output} is ready. Next:", f'  sdopt generate {folder} "a prompt"', f"  sdopt bench {folder}"]
    lines = [f"\n{output} is ready for a machine with the GPU. Copy it there; then, there:"]
    if any(record.plans for record in manifest.components.values()):
        # The digest of the manifest, which names those of all plans: it is told here, and asked for there.
        lines.append(f"  sdopt check FOLDER --trust-engine {hash_file(output / MANIFEST_NAME)}")
    return [*lines, "  sdopt bench FOLDER"]
