"""`sdopt inspect`: what is this file or folder?"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import rich_click as click
from pydantic import TypeAdapter

from sdopt.bundle.records import ComponentRecord, QuantizationRecord
from sdopt.cli.text import neutralise
from sdopt.model.component import ComponentName
from sdopt.model.shape import ShapeProfile, describe_profiles

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@click.argument("source")
@click.option("--json", "as_json", is_flag=True, help="Print all that is known as JSON on stdout.")
def inspect(source: str, as_json: bool) -> None:
    """Say what SOURCE is: a bundle, an ONNX graph, a TensorRT plan or a checkpoint, and what is in it."""
    from sdopt.library.identify import inspect_source

    table = inspect_source(source)
    if as_json:
        print(json.dumps(table))
        return
    from rich.console import Console

    console = Console(stderr=True)
    console.print(f"{neutralise(source)} is a {table['kind']}", style="bold", highlight=False, markup=False)
    for key, value in (_summarise_bundle(table) if table["kind"] == "bundle" else table).items():
        console.print(f"  {key}: ", end="", style="cyan", markup=False)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        console.print(neutralise(text), markup=False)
    if table["kind"] == "bundle":
        _show_blocks(console, table)


def _show_blocks(console: Console, table: dict[str, Any]) -> None:
    """What was tried on each component, block by block, and why it stayed or did not."""
    from rich.table import Table

    records = TypeAdapter(dict[ComponentName, ComponentRecord]).validate_python(table["components"])
    for name, record in records.items():
        if (quantization := record.quantization) is None:
            continue
        rows = Table("block", "layers", "scheme", "kept", "error", "speed", "why not", title=f"{name}, block by block")
        for block in quantization.blocks:
            speed = "not timed" if block.speedup is None else f"{block.speedup.value:.2f}x"
            rows.add_row(
                block.name, str(block.layers), block.scheme, "yes" if block.quantized else "no", f"{block.error:.2%}",
                speed, block.reason,
            )  # fmt: skip
        console.print(rows)


def _summarise_bundle(table: dict[str, Any]) -> dict[str, Any]:
    """The manifest without what only a program wants to read."""
    summary = {key: table[key] for key in ("family", "prediction", "inpainting", "created_utc")}
    summary["source"] = table["source"]["location"]
    summary["licence"] = table["source"]["licence"] or "not stated"
    summary["size"] = describe_profiles(TypeAdapter(tuple[ShapeProfile, ...]).validate_python(table["profiles"]))
    for name, part in table["components"].items():
        audit, parity = part["audit"], part["parity"]
        error = f"{max(o['relative_l2'] for o in parity['outputs']):.1e}" if parity else "not checked"
        if parity and parity["points"] > 1:
            error += f", the worst of {parity['points']} sizes and prompt lengths"
        node = "Attention" if audit["opset"] >= 23 else "Softmax"
        attention = f"{node} in {audit['attention_nodes']} of {audit['attention_layers']} attention layers"
        summary[name] = (
            f"{part['precision']} on {part['backend']['kind']}; opset {audit['opset']}, {audit['nodes']} nodes, "
            f"{attention}; parity error {error}"
        )
        if part["quantization"]:
            summary[f"{name}, quantised"] = QuantizationRecord.model_validate(part["quantization"]).describe()
        for plan in {plan["file"]: plan for plan in part["plans"]}.values():
            summary[plan["file"]] = _summarise_plan(plan)
    summary["fidelity"] = f"{table['fidelity']['verdict']}. {table['fidelity']['reason']}"
    summary["bytes"] = f"{sum(record['size_bytes'] for record in table['files'].values()):,}"
    return summary


def _summarise_plan(plan: dict[str, Any]) -> str:
    audit = plan["audit"]
    layers, kernels = audit["attention_layers"], audit["fused_kernels"]
    if kernels is not None:
        fused = f"{min(kernels, layers)} of {layers} fused"
    else:
        fused = "all fused by the builder's word, no kernel seen" if audit["attention_fused"] else "not all fused"
    other = audit["other_precision"]
    precision = f"{len(other)} layers in another precision" if other else "all layers in the precision asked for"
    peak_bytes = plan["build_peak_device_bytes"]
    on_gpu = "" if peak_bytes is None else f", with at most {peak_bytes:,} bytes of a GPU"
    return (
        f"{plan['flavour']} {plan['version']} for {plan['generation']} on {plan['system']}; attention "
        f"{audit['attention_native']} of {layers} native, {fused}; {precision}; "
        f"{audit['plan_bytes']:,} bytes for {audit['weights_bytes']:,} of weights, {audit['zero_share']:.1%} zeros "
        f"(weights {audit['weights_zero_share']:.1%}), {audit['weights_found']} of {audit['weights_sampled']} sampled "
        f"weights found in it; built in {plan['build_s']} s ({plan['rung']}){on_gpu}"
    )
