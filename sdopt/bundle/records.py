"""What a bundle's manifest says of each of its parts."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from sdopt.disk.digest import Record
from sdopt.machine.machine_record import PlanFlavour
from sdopt.model.backend_settings import BackendSettings
from sdopt.model.component import ComponentSpec
from sdopt.model.precision import Precision
from sdopt.model.quantization import CalibrationSettings, ComponentQuantization, Scheme
from sdopt.model.slots import Slot, SlotSet, WordSlot


class BakedAdapter(Record):
    """An adapter that was added to the weights before anything was traced, and how strongly."""

    name: str
    sha256: str
    unet: float
    text: float


class SourceRecord(Record):
    """Where the weights came from. `digest` is over the weight files of the bundle, whatever files they came from."""

    kind: Literal["huggingface", "diffusers", "single-file"]
    location: str
    revision: str = ""
    digest: str = ""
    licence: str = ""
    adapters: tuple[BakedAdapter, ...] = ()
    """What was added to the weights, in this order."""


class OutputParity(Record):
    """One output against torch fp32: largest absolute difference, |a-b|/|b|, and 1 - cosine."""

    name: str
    max_abs: float
    relative_l2: float
    cosine_distance: float


class ParityRecord(Record):
    passed: bool
    runtime: str
    points: int = 1
    """How many sizes and prompt lengths were compared; the figures are those of the worst."""
    outputs: tuple[OutputParity, ...]
    relative_l2_limit: float
    cosine_distance_limit: float


class GraphAudit(Record):
    """What the graph says of itself: counts of ONNX nodes, and the attention layers that torch has."""

    opset: int
    nodes: int
    attention_nodes: int
    attention_layers: int


class PlanAudit(Record):
    """What was found in a plan, beside what was asked for. Layers are named by the nodes of the graph."""

    attention_layers: int
    """Of torch."""
    attention_native: int
    """TensorRT's own attention layers in the network that the parser made."""
    attention_fused: bool
    """The plan's own text lists an attention kernel for each layer of torch. Where it has no such text, this is the
    builder's promise alone: it was not allowed to decompose any, and the build did not fail."""
    fused_kernels: int | None = None
    """Attention kernels that were seen: in the plan's own text, which is of its first optimisation profile, or else by
    the inspector on a GPU; null where neither could be read."""
    compute_layers: dict[str, int]
    """Convolutions, matrix products, attention and normalisations, counted by kind and precision."""
    other_precision: tuple[str, ...]
    """Those of them that do not compute in the precision that was asked for."""
    plan_bytes: int
    weights_bytes: int
    """Of the tensors that the graph uses; quantised ones as they are stored."""
    zero_share: float
    """Share of the plan's bytes that are zero; a plan that lost weights is full of them."""
    weights_zero_share: float
    """From the beginning of each weight."""
    weights_sampled: int
    weights_found: int
    """Of the sampled weights, those that lie in the plan byte for byte; some are folded with what follows them."""
    quantized_layers: int = 0
    """Of the network, in the schemes that were asked for; a plan in which one of them is otherwise is refused."""
    quantized_sampled: int = 0
    """Of the sampled weights, those that are quantised."""
    quantized_found: int = 0
    kernels: dict[str, int] = Field(default_factory=dict)
    """Of the plan, by kind and operands, as in `matmul int8` or `matmul fp16 x int8`; empty where no plan says it."""
    widened_layers: tuple[str, ...] = ()
    """Quantised layers that the plan widens to 16 bits before it computes, so that they take no less time."""


class PlanRecord(Record):
    """One engine file, and what a machine must have to run it."""

    file: str
    flavour: PlanFlavour
    version: str
    """Of the library that built it: TensorRT takes plans of no other."""
    generation: str
    """`sm89`, or `ampere+` for a portable plan."""
    system: str
    """Operating system and architecture, as in `Linux x86_64`."""
    profile: int
    """Index into the bundle's `profiles`."""
    prompt_chunks: tuple[int, ...] = (1,)
    """Prompt lengths in chunks of 77 tokens, in the order of the plan's optimisation profiles."""
    weight_streaming: bool = False
    rung: str
    """How the build fitted into memory: see `sdopt.convert.plans.RUNGS`."""
    build_s: float
    build_peak_bytes: int
    """Peak resident memory of the process that built it."""
    build_peak_device_bytes: int | None = None
    """The most that this process held of a GPU; null where it used none, or where NVML is not there to say it."""
    audit: PlanAudit


class SpeedupRecord(Record):
    """How many times as fast, with an interval of 95 %, from runs that took turns."""

    value: float
    low: float
    high: float


class BlockRecord(Record):
    """A group of layers that was tried in a quantised scheme, alone."""

    name: str
    layers: int
    scheme: Scheme
    quantized: bool
    reason: str
    """Why it stays in 16 bits; empty where it is quantised."""
    error: float
    """|a-b|/|b| of the component's outputs on held-out inputs, against torch fp32."""
    speedup: SpeedupRecord | None
    """Of the component with this group alone; null where it was not timed: its engine does not run on the machine that
    built it, or was not asked to."""


class QuantizationRecord(Record):
    """What was tried on a component, and what of it stayed. `error` and `speedup` are of all that stayed, together."""

    settings: ComponentQuantization
    calibration: CalibrationSettings
    trajectories: str
    """Digest of the recorded drawings that scales were made of, and errors measured on."""
    runtime: str
    """What the blocks were measured on."""
    blocks: tuple[BlockRecord, ...]
    error_limit: float
    base_error: float
    """Of the 16-bit engine on the same inputs."""
    error: float | None
    speedup: SpeedupRecord | None
    integer_layers: int | None = None
    """Layers whose matrix product the runtime's execution graph shows in 8 bits; null where it shows none."""
    weights_bytes: int
    """Of the weight file, and before."""
    weights_bytes_16bit: int

    @property
    def quantized_layers(self) -> int:
        return sum(block.layers for block in self.blocks if block.quantized)

    def describe(self) -> str:
        """One line: how much is quantised, and what it brings."""
        from rich.filesize import decimal

        kept = sum(block.quantized for block in self.blocks)
        if self.error is None:
            return f"no block of {len(self.blocks)} pays in {self.settings.scheme}"
        speed = "not timed here"
        if self.speedup is not None:
            speed = f"{self.speedup.value:.2f} times as fast ({self.speedup.low:.2f} to {self.speedup.high:.2f})"
        return (
            f"{kept} of {len(self.blocks)} blocks ({self.quantized_layers} layers) in {self.settings.scheme}: {speed}, "
            f"error {self.error:.1%} (in 16 bits {self.base_error:.1%}), weights {decimal(self.weights_bytes)} instead "
            f"of {decimal(self.weights_bytes_16bit)}"
        )


class SlotsRecord(Record):
    """A second graph of a component, over the same weight file: with LoRA slots, or a place for words, or both."""

    layers: SlotSet | None = None
    """Null where it has no LoRA slots."""
    rank: int = 0
    """The most that all adapters that are active together may have."""
    slots: tuple[Slot, ...] = ()
    words: WordSlot | None = None
    """Of a text encoder: where the vectors of textual inversion go."""
    audit: GraphAudit
    parity: ParityRecord | None = None
    """Of the 16-bit graph with a seeded adapter in every slot, and seeded words, against torch with the same."""
    plans: tuple[PlanRecord, ...] = ()


class ComponentRecord(Record):
    spec: ComponentSpec
    precision: Precision
    precision_reason: str = ""
    """Why this precision was chosen, where sdopt chose it."""
    backend: BackendSettings
    architecture: str
    """Digest of config, shapes, graph type and dialect: the graph is the same where this is the same."""
    weights_key: str
    """Digest of the source files' names, sizes and times, and of the storage types: tells whether to copy again."""
    audit: GraphAudit
    parity: ParityRecord | None = None
    """Of the graph in `precision`, before layers were quantised."""
    quantization: QuantizationRecord | None = None
    plans: tuple[PlanRecord, ...] = ()
    slots: SlotsRecord | None = None
    """Null where the component takes neither LoRAs nor words."""

    @property
    def every_plan(self) -> tuple[PlanRecord, ...]:
        """Those of the second graph, too."""
        return (*self.plans, *(self.slots.plans if self.slots is not None else ()))

    @property
    def lora_slots(self) -> SlotsRecord | None:
        """The second graph, where it has slots for LoRAs and not for words alone."""
        return self.slots if self.slots is not None and self.slots.slots else None

    @property
    def is_quantized(self) -> bool:
        """Whether any layer is: then the weight file is not the checkpoint's."""
        return self.quantization is not None and self.quantization.quantized_layers > 0


class Verdict(StrEnum):
    PASS = "pass"  # noqa: S105 - a verdict, no password
    GRAPHS_PASS = "graphs pass"  # noqa: S105
    """The graphs draw the picture, on another runtime: the plans made of them have not run on a GPU yet."""
    FAIL = "fail"
    NOT_VERIFIED = "not verified"


class ImageFidelity(Record):
    """One picture of the engines against torch fp32 from the same initial latents.

    PSNR in dB (null for equal pictures), SSIM and MS-SSIM in [0, 1], the least cosine of the latents over the steps.
    """

    prompt: str
    seed: int
    psnr_db: float | None
    ssim: float
    ms_ssim: float
    latent_cosine_min: float
    noise_floor_psnr_db: float | None
    noise_floor_ssim: float


class FidelityRecord(Record):
    verdict: Verdict
    reason: str
    scheduler: str = ""
    steps: int = 0
    guidance_scale: float = 0.0
    images: tuple[ImageFidelity, ...] = ()


class BuildRecord(Record):
    """How long the build took. Where steps were found in the store or left by a killed run, that is no build's time."""

    wall_ns: int
    """From the decided plan to the manifest; opening the checkpoint and publishing are not in it."""
    reused: tuple[str, ...]
    """Names of the stages of which something was found: `graph`, `parity`, `plan`, `weights` and the like."""
