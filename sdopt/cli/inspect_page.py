"""What `sdopt inspect` found, as a page for people: what it is, what is in it, what fits it, what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from sdopt.bundle.manifest import BundleKind
from sdopt.bundle.records import ComponentRecord, QuantizationRecord
from sdopt.cli.text import neutralise
from sdopt.model.component import ComponentName
from sdopt.model.family import Family
from sdopt.model.shape import ShapeProfile, describe_profiles
from sdopt.model.task import Task

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PREDICTIONS = {
    "epsilon": "the noise (epsilon)",
    "v_prediction": "the velocity (v-prediction)",
    None: "not said: sdopt convert finds out, or give --prediction",
}
_FEW_STEPS = {
    "lcm": "LCM: 2 to 8, with the LCM sampler", "tcd": "TCD: 2 to 8, with the TCD sampler", "turbo": "Turbo: 1 to 4",
    "dmd2": "DMD2: 1 to 4", "lightning": "Lightning: as many as its name says",
    "hyper": "Hyper-SD: as many as its name says",
}  # fmt: skip
_SOURCES = {"diffusers": "a diffusers folder", "single-file": "a single file", "huggingface": "Hugging Face"}


def print_page(console: Console, source: str, table: Mapping[str, Any]) -> None:
    """`table` is what `inspect_source` gives for `source`."""
    show = {
        "checkpoint": _show_checkpoint, "bundle": _show_bundle, "onnx": _show_graph, "plan": _show_plan,
        "adapter": _show_adapter, "embedding": _show_word,
    }  # fmt: skip
    show[table["kind"]](console, source, table)


def _list_adapters(adapters: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """What is in the weights."""
    for each in adapters:
        weights = f"{each['unet']:g}" if each["unet"] == each["text"] else f"{each['unet']:g}, text {each['text']:g}"
        yield "with", f"the LoRA {each['name']} ({weights})"


def _describe_words(components: Mapping[str, Any]) -> str:
    encoders = [part for name, part in components.items() if ComponentName(name).is_text_encoder]
    if encoders and all(part.get("slots") and part["slots"]["words"] for part in encoders):
        return "yes (textual inversion)"
    return "no: it was built by an earlier sdopt" if encoders else ""


def _describe_slots(components: Mapping[str, Any]) -> str:
    slots = [part["slots"] for part in components.values() if part.get("slots") and part["slots"]["slots"]]
    if not slots:
        return "no: it was built without --lora-slots"
    layers = sum(len(each["slots"]) for each in slots)
    return f"up to rank {min(each['rank'] for each in slots)} together, in {layers} layers ({slots[0]['layers']})"


def _show_checkpoint(console: Console, source: str, table: Mapping[str, Any]) -> None:
    family = Family(table["family"])
    kind = "inpainting checkpoint" if Task.INPAINT in table["tasks"][:1] else "checkpoint"
    _print_title(console, source, f"{_article(family.label)} {family.label} {kind}")
    origin, facts = table["source"], []
    facts.append(("source", _SOURCES[origin["kind"]] + (f", revision {origin['revision']}" * bool(origin["revision"]))))
    facts.append(("licence", origin["licence"] or "not stated"))
    facts.append(("the UNet predicts", _PREDICTIONS[table["prediction"]]))
    facts.append(("scheduler", table["scheduler"] or "not stated"))
    if "width_px" in table:
        facts.append(("trained on", f"{table['width_px']}x{table['height_px']} px"))
        facts.append(("sizes", f"sides that are multiples of {table['multiple_px']} px"))
    parts = table["components"]
    lacking = "" if ComponentName.VAE_DECODER in parts else "it has no VAE: give one with --vae"
    if lacking:
        facts.append(("lacks", lacking))
    if table["ignored"]:
        facts.append(("ignored", "; ".join(f"{many} of {what}" for what, many in table["ignored"].items())))
    _print_facts(console, facts)
    rows = _table("network", "parameters", "stored as", "size", numbers=("parameters", "size"))
    for name, part in parts.items():
        rows.add_row(name, _millions(part["parameters"]), ", ".join(part["dtypes"]), _bytes(part["bytes"]))
    total = sum(part["parameters"] for part in parts.values())
    rows.add_section()
    rows.add_row("all", _millions(total), "", _bytes(sum(part["bytes"] for part in parts.values())))
    console.print(rows)
    fits = [("LoRAs, embeddings, ControlNets", f"those made for {family.label}")]
    if "latent_channels" in table:
        fits.append(("another VAE (--vae)", f"{table['latent_channels']} latent channels, "
                     f"{table['pixels_per_latent']} px for each latent element"))  # fmt: skip
    _print_facts(console, fits, title="What fits it")
    output = f"engines/{Path(source).name.removesuffix('.safetensors').removesuffix('.ckpt') or 'model'}"
    words = ["sdopt", "convert", source, *(["--vae", "VAE"] if lacking else []), "-o", output]
    _print_next(console, [(shlex.join(words), "build engines for it")])


def _show_bundle(console: Console, source: str, table: Mapping[str, Any]) -> None:
    family = Family(table["family"])
    engines = "inpainting engines" if Task.INPAINT in table["tasks"][:1] else "engines"
    _print_title(console, source, f"a bundle of {family.label} {engines}")
    kind, origin = BundleKind(table["bundle_kind"]), table["source"]
    _print_facts(console, [
        ("holds", kind.label),
        ("draws", ", ".join(Task(task).label for task in table["tasks"]) or "nothing by itself"),
        ("made from", f"{origin['location']}, {_SOURCES[origin['kind']]}"),
        *_list_adapters(origin["adapters"]),
        ("takes LoRAs", _describe_slots(table["components"])),
        ("takes embeddings", _describe_words(table["components"])),
        ("licence", origin["licence"] or "not stated"),
        ("made", table["created_utc"]),
        ("size", describe_profiles(TypeAdapter(tuple[ShapeProfile, ...]).validate_python(table["profiles"]))),
        ("the UNet predicts", _PREDICTIONS[table["prediction"]]),
        ("same picture?", f"{table['fidelity']['verdict']}. {table['fidelity']['reason']}"),
        ("on the disk", _bytes(sum(record["size_bytes"] for record in table["files"].values()))),
    ])  # fmt: skip
    rows = _table("network", "engine", "nodes", "attention", "error", numbers=("nodes", "error"))
    for name, part in table["components"].items():
        audit = part["audit"]
        node = "Attention" if audit["opset"] >= 23 else "Softmax"
        rows.add_row(
            name, f"{part['precision']} on {part['backend']['kind']}", str(audit["nodes"]),
            f"{node} in {audit['attention_nodes']} of {audit['attention_layers']} layers", _parity(part["parity"]),
        )  # fmt: skip
    console.print(rows)
    details = []
    for name, part in table["components"].items():
        parity = part["parity"]
        if parity and parity["points"] > 1:
            details.append((f"{name}, error", f"the worst of {parity['points']} sizes and prompt lengths"))
        if part["quantization"]:
            details.append(
                (f"{name}, quantised", QuantizationRecord.model_validate(part["quantization"]).describe())
            )  # fmt: skip
        details += [(f"{name}, plan", _describe_plan(plan)) for plan in {p["file"]: p for p in part["plans"]}.values()]
    if details:
        _print_facts(console, details)
    _show_blocks(console, table)
    folder = shlex.quote(source)
    commands = [(f"sdopt check {folder}", "see whether it is whole and runs here")]
    if kind is BundleKind.PIPELINE:
        commands.append((f'sdopt generate {folder} "a prompt" -o pictures', "draw with it"))
        commands.append((f"sdopt bench {folder} --report report", "compare it with PyTorch"))
    _print_next(console, commands)


def _show_blocks(console: Console, table: Mapping[str, Any]) -> None:
    """What was tried on each component, block by block, and why it stayed or did not."""
    records = TypeAdapter(dict[ComponentName, ComponentRecord]).validate_python(table["components"])
    for name, record in records.items():
        if (quantization := record.quantization) is None:
            continue
        rows = _table(
            "block", "layers", "scheme", "kept", "error", "speed", "why not", numbers=("layers", "error", "speed"),
            title=f"{name}, block by block",
        )  # fmt: skip
        for block in quantization.blocks:
            speed = "not timed" if block.speedup is None else f"{block.speedup.value:.2f}x"
            rows.add_row(
                block.name, str(block.layers), block.scheme, "yes" if block.quantized else "no", f"{block.error:.2%}",
                speed, block.reason,
            )  # fmt: skip
        console.print(rows)


def _show_graph(console: Console, source: str, table: Mapping[str, Any]) -> None:
    _print_title(console, source, "an ONNX graph")
    files = ", ".join(table["external_data"]) or "in the graph itself"
    opset = ", ".join(f"{domain} {version}" for domain, version in table["opset"].items())
    _print_facts(console, [("opset", opset), ("weights", files)])
    rows = _table("tensor", "name", "shape")
    for way in ("inputs", "outputs"):
        for name, shape in table[way].items():
            rows.add_row(way.removesuffix("s"), name, " x ".join(map(str, shape)) or "a number")
    console.print(rows)
    nodes = _table("node", "times", numbers=("times",))
    for name, times in table["nodes"].items():
        nodes.add_row(name, str(times))
    console.print(nodes)


def _show_plan(console: Console, source: str, table: Mapping[str, Any]) -> None:
    _print_title(console, source, "a TensorRT plan")
    facts = [(key, value if isinstance(value, str) else str(value)) for key, value in table.items() if key != "kind"]
    _print_facts(console, [("size", _bytes(table["bytes"])), *(fact for fact in facts if fact[0] != "bytes")])


def _show_adapter(console: Console, source: str, table: Mapping[str, Any]) -> None:
    family = Family(table["family"]).label if table["family"] else ""
    kind = f"{table['adapter_kind']} for {family}" if family else table["adapter_kind"]
    _print_title(console, source, f"{'an adapter that is ' * (kind == 'mixed')}a {kind}")
    least, most = table["rank_least"], table["rank_most"]
    named = [name for name in (table["title"], table["alias"]) if name]
    facts = [
        ("made for", family or table["base_model"] or "not stated, and its shapes do not say"),
        ("named", ", ".join(dict.fromkeys(named)) or "not stated"),
        ("trigger words", ", ".join(table["trigger_words"]) or "not stated"),
        ("frequent tags", ", ".join(f"{tag} ({many})" for tag, many in table["tags"].items())),
        ("few steps", _FEW_STEPS.get(table["few_step"], "")),
        ("embeddings", ", ".join(table["embeddings"])),
        ("written by", table["writer"]),
        ("rank", "" if not most else str(most) if least == most else f"{least} to {most}"),
        ("alpha", "" if table["network_alpha"] is None else f"{table['network_alpha']:g}"),
        ("size", _bytes(table["bytes"])),
        ("sha256", table["sha256"]),
    ]
    _print_facts(console, [(name, value) for name, value in facts if value])
    rows = _table("network", "layers", numbers=("layers",))
    for name, many in table["layers"].items():
        rows.add_row(name, str(many))
    console.print(rows)
    if (fit := table.get("fit")) is None:
        return
    if fit["taken"]:
        error = "" if fit["fit_error"] is None else f", with an error of {fit['fit_error']:.1%} at most in a layer"
        answer = [("takes it?", f"yes{error}")]
    else:
        answer = [("takes it?", f"no: {fit['reason']}"), ("what to do", fit["hint"])]
    _print_facts(console, answer, title=f"For {neutralise(fit['bundle'])}")


def _show_word(console: Console, source: str, table: Mapping[str, Any]) -> None:
    family = Family(table["family"]).label if table["family"] else ""
    _print_title(console, source, f"a textual inversion{' for ' * bool(family)}{family}")
    widths = " and ".join(f"{width} ({part})" if part else str(width) for part, width in table["widths"].items())
    _print_facts(console, [
        ("made for", family or "not known: no published family has vectors of that width"),
        ("word", table["token"] or f"not stated: prompts call it {table['word']}, by the file's name"),
        ("vectors", f"{table['vectors']} of {widths} numbers"),
        ("written by", table["writer"]),
        ("size", _bytes(table["bytes"])),
        ("sha256", table["sha256"]),
    ])  # fmt: skip
    command = ["sdopt", "generate", "BUNDLE", f"a photo of {table['word']}", "--embedding", source]
    _print_next(console, [(shlex.join(command), "draw with it")])


def _describe_plan(plan: Mapping[str, Any]) -> str:
    audit = plan["audit"]
    layers, kernels = audit["attention_layers"], audit["fused_kernels"]
    if kernels is not None:
        fused = f"{min(kernels, layers)} of {layers} fused"
    else:
        fused = "all fused by the builder's word, no kernel seen" if audit["attention_fused"] else "not all fused"
    other = audit["other_precision"]
    precision = f"{len(other)} layers in another precision" if other else "all layers in the precision asked for"
    peak_bytes = plan["build_peak_device_bytes"]
    on_gpu = "" if peak_bytes is None else f", with at most {_bytes(peak_bytes)} of a GPU"
    return (
        f"{plan['flavour']} {plan['version']} for {plan['generation']} on {plan['system']}; attention "
        f"{audit['attention_native']} of {layers} native, {fused}; {precision}; "
        f"{_bytes(audit['plan_bytes'])} for {_bytes(audit['weights_bytes'])} of weights, {audit['zero_share']:.1%} "
        f"zeros (weights {audit['weights_zero_share']:.1%}), {audit['weights_found']} of {audit['weights_sampled']} "
        f"sampled weights found in it; built in {plan['build_s']} s ({plan['rung']}){on_gpu}"
    )


def _parity(parity: Mapping[str, Any] | None) -> str:
    return f"{max(output['relative_l2'] for output in parity['outputs']):.1e}" if parity else "not checked"


def _article(words: str) -> str:
    return "an" if words.startswith("SD") else "a"


def _bytes(count: int) -> str:
    from rich.filesize import decimal

    return decimal(count)


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M"


def _table(*columns: str, numbers: Iterable[str] = (), title: str | None = None) -> Table:
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def _print_title(console: Console, source: str, what: str) -> None:
    console.print(f"{neutralise(source)} is {what}", style="bold", highlight=False, markup=False)


def _print_facts(console: Console, facts: Iterable[tuple[str, str]], title: str = "") -> None:
    """Keys in a column that never wraps, values in one that folds."""
    from rich.table import Table
    from rich.text import Text

    if title:
        console.print(title, style="bold")
    rows = Table.grid(padding=(0, 2))
    rows.add_column(no_wrap=True, style="cyan")
    rows.add_column(overflow="fold")
    for key, value in facts:
        rows.add_row(f"  {key}", Text(neutralise(value)))
    console.print(rows)


def _print_next(console: Console, commands: Iterable[tuple[str, str]]) -> None:
    """Each command is one line that can be copied, whatever the width of the terminal."""
    console.print("Next", style="bold")
    for command, purpose in commands:
        console.print(f"  {purpose}:", markup=False, style="cyan")
        console.print(f"    {neutralise(command)}", markup=False, highlight=False, soft_wrap=True)
