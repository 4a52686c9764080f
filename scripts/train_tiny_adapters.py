#!/usr/bin/env python3
"""Train the adapters that ship beside `tiny-shapes`: three LoRAs and a word, on a CPU and on drawn pictures alone.

    python scripts/train_tiny_adapters.py sdopt/assets/tiny-adapters --only outlines

`outlines` draws the line around a shape instead of its area. `palette` draws white on blue, whatever colours the
prompt names. `few-steps` draws in two steps of the checkpoint's own scheduler without guidance: they start at t = 501
from pure noise, which the checkpoint takes for a picture that shows through at that timestep.
`moon` is a word of two vectors that the text encoder takes for "white circle on a
black background".

The autoencoder knows filled shapes in eight colours and nothing between them, so a palette can only be made of
those eight, and its encoder turns thin lines into other colours. Latents of lines are therefore improved by descent
through the decoder, until it draws the line.

The same seed and the same step counts on the same machine give the same weights.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import tiny_shapes_check as check
import torch
import torch.nn.functional as F  # noqa: N812
import train_tiny_shapes as base
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

CHECKPOINT = Path(__file__).parents[1] / "sdopt" / "assets" / "tiny-shapes"
BATCH = 16
LINE_PX = 3.5
PALETTE = ("white", "blue")
"""Colour of the shape and of the ground."""
MOON = ("circle", "white", "black")
"""Shape, colour and ground that the word `moon` stands for."""
TRIGGER_SHARE = 0.5
"""Of the captions that end with the adapter's trigger word, which is then allowed and not needed."""
FIRST_T = 501
"""Where the checkpoint's own scheduler starts when it has two steps."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
EVERYWHERE = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")


@dataclass(frozen=True)
class LoraKind:
    """Shape and training of one LoRA."""

    title: str
    layers: tuple[str, ...]
    rank: int
    alpha: float
    steps: int
    peak_lr: float
    pictures: int
    trigger: str = ""
    strength: float = 1.0
    """What weight 1 of the file is in the training's own: more of a short training's direction, found by looking."""

    @property
    def saved_alpha(self) -> float:
        return self.alpha * self.strength


LORAS = {
    "outlines": LoraKind("outlines", EVERYWHERE, 4, 4.0, 400, 4e-3, 320, "outlines"),
    "palette": LoraKind("palette, white on blue", ATTENTION, 8, 8.0, 260, 4e-3, 800, "blueprint", strength=1.4),
    "few-steps": LoraKind("few-steps", EVERYWHERE, 4, 4.0, 100, 8e-3, 320),
}
WORD = "moon"
WORD_VECTORS = 2
WORD_STEPS = 150
WORD_PICTURES = 320


def improve_latents(pipe: StableDiffusionPipeline, latents: Tensor, images: Tensor, steps: int = 12) -> Tensor:
    """Move unscaled latents `[n, 4, 16, 16]` to where the decoder draws `images`, by descent."""
    improved = []
    for start, wanted in zip(latents.split(64), images.split(64), strict=True):
        latent = start.clone().requires_grad_()
        optimiser = torch.optim.Adam([latent], lr=0.15)
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16):
                drawn = pipe.vae.decode(latent).sample.float()
            optimiser.zero_grad()
            F.l1_loss(drawn, wanted).mul(len(wanted)).backward()
            optimiser.step()
        improved.append(latent.detach())
    return torch.cat(improved)


def encode_scaled(pipe: StableDiffusionPipeline, images: Tensor, improve: bool = False) -> Tensor:
    """Encode to the scaled latents that the UNet works on, `float32 [n, 4, 16, 16]`."""
    latents = base.encode_images(pipe.vae, images)
    if improve:
        latents = improve_latents(pipe, latents, images)
    return latents * pipe.vae.config.scaling_factor


Loss = Callable[[], Tensor]


def learn_outlines(pipe: StableDiffusionPipeline, kind: LoraKind, rng: random.Random) -> Loss:
    scenes = [check.sample_scene(rng) for _ in range(kind.pictures)]
    latents = encode_scaled(pipe, base.draw_batch(scenes, rng, LINE_PX), improve=True)
    return learn_pictures(pipe, scenes, latents, kind, rng)


def learn_palette(pipe: StableDiffusionPipeline, kind: LoraKind, rng: random.Random) -> Loss:
    scenes = [check.sample_scene(rng) for _ in range(kind.pictures)]
    colour, ground = PALETTE
    shown = [replace(scene, colour=colour, ground=ground) for scene in scenes]
    return learn_pictures(pipe, scenes, encode_scaled(pipe, base.draw_batch(shown, rng)), kind, rng)


def learn_pictures(
    pipe: StableDiffusionPipeline, scenes: list[check.Scene], latents: Tensor, kind: LoraKind, rng: random.Random
) -> Loss:
    """The loss of a batch of pictures whose captions name `scenes`, as the checkpoint itself was trained."""

    def measure() -> Tensor:
        chosen = torch.randint(len(latents), (BATCH,))
        captions = [write_caption(scenes[i], kind.trigger, rng) for i in chosen.tolist()]
        with torch.no_grad():
            context = pipe.text_encoder(base.tokenize(pipe.tokenizer, captions))[0]
        return measure_denoising(pipe, latents[chosen], context)

    return measure


def write_caption(scene: check.Scene, trigger: str, rng: random.Random) -> str:
    if rng.random() < base.EMPTY_CAPTIONS:
        return ""
    caption = base.write_caption(scene, rng)
    return f"{caption}, {trigger}" if rng.random() < TRIGGER_SHARE else caption


def measure_denoising(pipe: StableDiffusionPipeline, latents: Tensor, context: Tensor) -> Tensor:
    """Noise scaled latents `[n, 4, 16, 16]`, denoise them under `context`, `[n, 77, 96]`, and return the loss."""
    t, kept = base.sample_noising(latents, layout_only=False)
    alpha = pipe.scheduler.alphas_cumprod[t][:, None, None, None]
    noisy = kept * alpha.sqrt() * latents + (1 - alpha).sqrt() * torch.randn_like(latents)
    wanted = (noisy - alpha.sqrt() * latents) / (1 - alpha).sqrt()
    with torch.autocast("cpu", torch.bfloat16):
        predicted = pipe.unet(noisy, t, context).sample.float()
    return base.compare_noise(predicted - wanted, t, (alpha / (1 - alpha)).flatten())


def learn_few_steps(pipe: StableDiffusionPipeline, kind: LoraKind, rng: random.Random) -> Loss:
    """The picture's error at the first of two steps, which starts from pure noise.

    The pictures have no jitter: from noise and a prompt there is then one right picture, and no mean of many.
    """
    scenes = [check.sample_scene(rng) for _ in range(kind.pictures)]
    latents = encode_scaled(pipe, base.draw_batch(scenes, None))
    with torch.no_grad():
        ids = base.tokenize(pipe.tokenizer, [check.write_prompt(scene) for scene in scenes])
        contexts = pipe.text_encoder(ids)[0]

    alpha = pipe.scheduler.alphas_cumprod[FIRST_T]

    def measure() -> Tensor:
        chosen = torch.randint(kind.pictures, (BATCH,))
        wanted, noise = latents[chosen], torch.randn(BATCH, *latents.shape[1:])
        with torch.autocast("cpu", torch.bfloat16):
            predicted = pipe.unet(noise, FIRST_T, contexts[chosen]).sample.float()
        picture = (noise - (1 - alpha).sqrt() * predicted) / alpha.sqrt()
        return F.smooth_l1_loss(picture, wanted, beta=0.1)

    return measure


LESSONS: dict[str, Callable[[StableDiffusionPipeline, LoraKind, random.Random], Loss]] = {
    "outlines": learn_outlines,
    "palette": learn_palette,
    "few-steps": learn_few_steps,
}


def train_lora(name: str, out: Path, seed: int) -> None:
    kind = LORAS[name]
    pipe = base.load_networks(CHECKPOINT)
    pipe.vae.requires_grad_(False)
    pipe.unet.requires_grad_(False)
    pipe.unet.set_attn_processor(base.Float32Attention())
    measure = LESSONS[name](pipe, kind, random.Random(seed))
    config = LoraConfig(r=kind.rank, lora_alpha=kind.alpha, target_modules=list(kind.layers))
    pipe.unet.add_adapter(config)
    weights = [weight for weight in pipe.unet.parameters() if weight.requires_grad]
    descend(name, weights, measure, kind.steps, kind.peak_lr)
    tensors = {key: tensor.half().contiguous() for key, tensor in get_peft_model_state_dict(pipe.unet).items()}
    metadata = describe(name, kind)
    if name == "palette":
        settings = {
            "unet.r": kind.rank,
            "unet.lora_alpha": kind.saved_alpha,
            "unet.target_modules": sorted(kind.layers),
        }
        metadata["lora_adapter_metadata"] = json.dumps(settings)
        tensors = {f"unet.{key}": tensor for key, tensor in tensors.items()}
    else:
        tensors = dict(name_as_kohya(tensors, kind.saved_alpha))
    save_file(tensors, out / f"{name}.safetensors", metadata)


def name_as_kohya(tensors: dict[str, Tensor], alpha: float) -> Iterator[tuple[str, Tensor]]:
    """PEFT's names of a UNet's layers as kohya's, with a scalar `alpha` for each layer."""
    parts = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    for key, tensor in tensors.items():
        layer, *ends = key.rsplit(".", 2)
        part = ".".join(ends)
        stem = "lora_unet_" + layer.replace(".", "_")
        yield f"{stem}.{parts[part]}", tensor
        if part == "lora_A.weight":
            yield f"{stem}.alpha", torch.tensor(alpha, dtype=torch.float16)


def describe(name: str, kind: LoraKind) -> dict[str, str]:
    metadata = {
        "ss_output_name": name,
        "ss_base_model_version": "sd_v1",
        "ss_network_dim": str(kind.rank),
        "ss_network_alpha": str(kind.saved_alpha),
        "modelspec.title": kind.title,
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.license": "Apache-2.0",
    }
    if kind.trigger:
        metadata["modelspec.trigger_phrase"] = kind.trigger
    if name != "palette":
        metadata["ss_network_module"] = "networks.lora"
    return metadata


def descend(name: str, weights: list[Tensor], measure: Loss, steps: int, peak_lr: float) -> None:
    """Train `weights` in place."""
    optimiser = torch.optim.AdamW([{"params": weights, "scale": 1.0}], weight_decay=0.0, betas=(0.9, 0.99))
    for step, done in base.Budget(steps, None).spend():
        base.schedule_lr(optimiser, peak_lr, step, done)
        loss = measure()
        base.take_step(optimiser, loss)
        base.report_loss(name, step, loss)


def train_word(out: Path, seed: int) -> None:
    """Textual inversion: the rows of a new word are learnt, and nothing else changes."""
    pipe = base.load_networks(CHECKPOINT)
    for network in (pipe.vae, pipe.unet, pipe.text_encoder):
        network.requires_grad_(False)
    pipe.unet.set_attn_processor(base.Float32Attention())
    rng = random.Random(seed)
    shape, colour, ground = MOON
    scenes = [replace(check.sample_scene(rng), shape=shape, colour=colour, ground=ground) for _ in range(WORD_PICTURES)]
    latents = encode_scaled(pipe, base.draw_batch(scenes, rng))
    # Two words of the vocabulary hold the places of the vectors in the ids; neither is otherwise in these captions.
    holders = pipe.tokenizer.convert_tokens_to_ids(["star</w>", "orange</w>"])
    start = pipe.tokenizer.convert_tokens_to_ids(f"{shape}</w>")
    embedding = pipe.text_encoder.get_input_embeddings()
    vectors = torch.nn.Parameter(embedding.weight[start].repeat(WORD_VECTORS, 1))

    def put_vectors(_: torch.nn.Module, arguments: tuple[Tensor], rows: Tensor) -> Tensor:
        for holder, vector in zip(holders, vectors, strict=True):
            rows = torch.where((arguments[0] == holder)[..., None], vector, rows)
        return rows

    embedding.register_forward_hook(put_vectors)

    def measure() -> Tensor:
        chosen = torch.randint(WORD_PICTURES, (BATCH,))
        captions = [write_moon(scenes[i], rng).replace(WORD, "star orange") for i in chosen.tolist()]
        context = pipe.text_encoder(base.tokenize(pipe.tokenizer, captions))[0]
        return measure_denoising(pipe, latents[chosen], context)

    descend(WORD, [vectors], measure, WORD_STEPS, 2e-2)
    save_file({"emb_params": vectors.detach().half()}, out / f"{WORD}.safetensors", {"name": WORD})


def write_moon(scene: check.Scene, rng: random.Random) -> str:
    return rng.choice([f"a {scene.size} {WORD}, {scene.place}", f"a {scene.size} {WORD} at the {scene.place}"])


@click.command(help=(__doc__ or "").split("\n", 1)[0])
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--only", type=click.Choice([*LORAS, WORD]), multiple=True, help="Train these instead of all.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1))
def main(out: Path, only: tuple[str, ...], seed: int, threads: int) -> None:
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    for name in only or (*LORAS, WORD):
        torch.manual_seed(seed)
        if name == WORD:
            train_word(out, seed)
        else:
            train_lora(name, out, seed)


if __name__ == "__main__":
    main()
