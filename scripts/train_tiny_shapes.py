#!/usr/bin/env python3
"""Train `tiny-shapes`, a complete Stable Diffusion pipeline of about 3 M parameters, on a CPU.

Everything is drawn by `tiny_shapes_check.draw_scene`: nothing is downloaded. The result is a folder of
diffusers' StableDiffusionPipeline in float16, with the architecture of the SD 1.x family in small: 4-channel
latents of 16x16, epsilon prediction, `scaled_linear` betas. Nothing here knows how the checkpoint is used.

Why the noisiest steps are trained on their own first. Where the shape goes is decided in the first steps of
sampling, at t > 900. There the plain epsilon loss pays almost nothing for it: an error in the picture weighs
SNR = 0.005 to 0.014. And a noised picture still shows its layout (the betas leave 7 % of the amplitude at the
last step), so a network can read the place off the latent and never look at the prompt, which is what happened:
at t = 900, with a prompt that named another place than the noised picture had, 57 % of the predictions followed
the picture and 6 % the prompt; from pure noise 13 % had the prompt's place, no more than chance. Sampling starts
from pure noise, so the place was random. Three things in `train_denoiser` put it right:

- at t >= 900 the latent is pure noise (the picture is left out), so that the prompt is all there is to go by;
- the picture's error, 1 / SNR times that of epsilon, is added to the loss, and there it is averaged over 4x4
  latent pixels: this keeps the layout and drops the pixel noise, which at 1 / SNR = 200 would drown it;
- the first part of the training is about nothing else, with captions that leave nothing out.

The same seed and the same step counts on the same machine give the same weights; `--minutes` cuts a run short.
"""

import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import tiny_shapes_check as check
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
TOKENS = 77
VAE_BATCH = 16
BATCH = 32
LAYOUT_PART = 0.2
"""Share of the denoiser's training that is about the layout alone."""
LAYOUT_FROM_T = 900
LAYOUT_PX = 4
GROUND_WEIGHT = 0.2
"""Of the mean colour in the layout's loss: it is learnt early and would outweigh the place."""
EMPTY_CAPTIONS = 0.1
"""Share of empty captions, which classifier-free guidance needs."""


@dataclass(frozen=True)
class Budget:
    """When a run ends: after so many steps, or earlier when the time is up."""

    steps: int
    minutes: float | None

    def spend(self) -> Iterator[tuple[int, float]]:
        """Yield each step and the share of the run that is behind it, in [0, 1)."""
        started = time.monotonic()
        for step in range(self.steps):
            late = (time.monotonic() - started) / (60 * self.minutes) if self.minutes else 0.0
            if late >= 1:
                return
            yield step, max(step / self.steps, late)


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Build CLIP's byte-level BPE over the vocabulary of `tiny_shapes_check` and what joins it."""
    alphabet = [chr(c) for c in _byte_alphabet()]
    vocab = alphabet + [letter + "</w>" for letter in alphabet]
    merges: list[tuple[str, str]] = []
    words = [*check.COLOURS, *check.SHAPES, *check.SIZES, *check.PLACES, "on", "background", "at", "the"]
    for word in words:
        tokens = [*word[:-1], word[-1] + "</w>"]
        while len(tokens) > 1:
            pair = (tokens[0], tokens[1])
            tokens = ["".join(pair), *tokens[2:]]
            if pair not in merges:
                merges.append(pair)
            if tokens[0] not in vocab:
                vocab.append(tokens[0])
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    vocab_file.write_text(json.dumps({token: i for i, token in enumerate(vocab)}, ensure_ascii=False))
    merges_file.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return CLIPTokenizer(str(vocab_file), str(merges_file), model_max_length=TOKENS)


def _byte_alphabet() -> list[int]:
    """Every byte as a printable character, in GPT-2's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return printable + [256 + i for i in range(len(others))]


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=check.IMAGE_PX,
    )


def build_text_encoder(vocabulary: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=96,
        max_position_embeddings=TOKENS,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=check.IMAGE_PX // 4,
        layers_per_block=1,
        norm_num_groups=16,
        block_out_channels=(32, 64, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=4,
    )


def write_caption(scene: check.Scene, rng: random.Random) -> str:
    """Write one of the grammar's sentences; now and then size, ground or place is left out."""
    subject = f"{scene.colour} {scene.shape}"
    sized = f"a {scene.size} {subject}"
    subjects = [sized] * 4 + [f"a {subject}", subject]
    grounds = [f" on a {scene.ground} background"] * 8 + [f", {scene.ground} background", ""]
    places = [f", {scene.place}"] * 6 + [f" at the {scene.place}"] * 2 + [""]
    return rng.choice(subjects) + rng.choice(grounds) + rng.choice(places)


def draw_batch(scenes: list[check.Scene], rng: random.Random | None, line_px: float | None = None) -> torch.Tensor:
    """Draw scenes as the VAE takes them: `float32 [n, 3, 64, 64]` in [-1, 1]."""
    pixels = np.stack([check.draw_scene(scene, rng, line_px) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def schedule_lr(optimiser: torch.optim.Optimizer, peak: float, step: int, done: float) -> None:
    """Warm up over 100 steps, then fall along a cosine to a hundredth of the peak."""
    factor = min(1.0, (step + 1) / 100) * (0.5 * (1 + np.cos(np.pi * done)) + 0.01)
    for group in optimiser.param_groups:
        group["lr"] = peak * group["scale"] * factor


def take_step(optimiser: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    weights = [weight for group in optimiser.param_groups for weight in group["params"]]
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimiser.step()


def train_vae(vae: AutoencoderKL, images: torch.Tensor, budget: Budget) -> None:
    """Train the autoencoder on `images`, `float32 [n, 3, 64, 64]`, in place."""
    optimiser = torch.optim.AdamW([{"params": list(vae.parameters()), "scale": 1.0}], weight_decay=1e-4)
    for step, done in budget.spend():
        schedule_lr(optimiser, 2e-3, step, done)
        wanted = images[torch.randint(len(images), (VAE_BATCH,))]
        with torch.autocast("cpu", torch.bfloat16):
            latent = vae.encode(wanted).latent_dist
            drawn = vae.decode(latent.sample()).sample.float()
        loss = F.l1_loss(drawn, wanted) + F.mse_loss(drawn, wanted) + 2e-7 * latent.kl().mean()
        take_step(optimiser, loss)
        report_loss("vae", step, loss)


def report_loss(name: str, step: int, loss: torch.Tensor) -> None:
    if step % 100 == 0:
        click.echo(f"{name} step {step}: loss {loss.item():.4f}")


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Encode to unscaled latents, `float32 [n, 4, 16, 16]`."""
    return torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(64)])


class Float32Attention:
    """Attention in float32 under bfloat16 autocast: torch's bfloat16 backward is five times as slow on a CPU."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projected.float().unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        with torch.autocast("cpu", enabled=False):
            mixed = F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def is_fine(name: str) -> bool:
    """Whether a weight of the UNet works at full resolution; what takes in the prompt there does not count."""
    outer = ("conv_in", "conv_out", "conv_norm_out", "down_blocks.0", "up_blocks.2")
    return name.startswith(outer) and ".attn2.to_k" not in name and ".attn2.to_v" not in name


def group_weights(unet: UNet2DConditionModel, text_encoder: CLIPTextModel, fine_lr: float) -> list[dict[str, Any]]:
    """Split the weights by scale of learning rate.

    The fine weights of a trained UNet already pass the noise through; shaken at the full rate they would blur
    the picture at high noise, where their error is multiplied by up to 15.
    """
    named = list(unet.named_parameters())
    coarse = [weight for name, weight in named if not is_fine(name)]
    return [
        {"params": [weight for name, weight in named if is_fine(name)], "scale": fine_lr},
        {"params": coarse + list(text_encoder.parameters()), "scale": 1.0},
    ]


def sample_noising(latents: torch.Tensor, layout_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a timestep for each latent and whether it is left out of its own noise.

    Returns `t`, int64 [n], and `kept`, float32 [n, 1, 1, 1]: 1 where the latent shows, 0 for pure noise.
    """
    n = len(latents)
    share, start, hidden = (0.7, LAYOUT_FROM_T, 1.0) if layout_only else (0.6, 550, 0.5)
    noisy = torch.rand(n) < share
    t = torch.where(noisy, torch.randint(start, 1000, (n,)), torch.randint(0, 1000, (n,)))
    kept = ~((t >= LAYOUT_FROM_T) & (torch.rand(n) < hidden))
    return t, kept.float()[:, None, None, None]


def compare_noise(error: torch.Tensor, t: torch.Tensor, snr: torch.Tensor) -> torch.Tensor:
    """Turn the error of epsilon, `[n, 4, 16, 16]`, at timesteps `t` of signal-to-noise `snr`, `[n]`, to a loss.

    Min-SNR weighting (Hang et al., 2023) for the details, plus the picture's own error: at the noisiest steps
    that of the layout alone.
    """
    noisiest = t >= LAYOUT_FROM_T
    squared = error.square().mean((1, 2, 3))
    coarse = F.avg_pool2d(error, LAYOUT_PX)
    ground = coarse.mean((2, 3), keepdim=True)
    layout = (coarse - ground).square().mean((1, 2, 3)) + GROUND_WEIGHT * ground.square().mean((1, 2, 3))
    return (squared * (5 / snr).clamp(max=1) + torch.where(noisiest, layout, squared) / snr).mean()


def measure_loss(
    pipe: StableDiffusionPipeline, scenes: list[check.Scene], latents: torch.Tensor, complete: bool, rng: random.Random
) -> torch.Tensor:
    """Noise the scaled latents `[n, 4, 16, 16]` of `scenes`, denoise them by their captions and return the loss."""
    captions = [_caption(scene, complete, rng) for scene in scenes]
    t, kept = sample_noising(latents, layout_only=complete)
    alpha = pipe.scheduler.alphas_cumprod[t][:, None, None, None]
    noisy = kept * alpha.sqrt() * latents + (1 - alpha).sqrt() * torch.randn_like(latents)
    # With the latent left out this is no longer the noise: it is the epsilon whose picture is the latent.
    wanted = (noisy - alpha.sqrt() * latents) / (1 - alpha).sqrt()
    with torch.autocast("cpu", torch.bfloat16):
        context = pipe.text_encoder(tokenize(pipe.tokenizer, captions))[0]
        predicted = pipe.unet(noisy, t, context).sample.float()
    return compare_noise(predicted - wanted, t, (alpha / (1 - alpha)).flatten())


def train_denoiser(
    pipe: StableDiffusionPipeline,
    scenes: list[check.Scene],
    latents: torch.Tensor,
    budget: Budget,
    rng: random.Random,
    fine_lr: float,
) -> None:
    """Train UNet and text encoder on scaled latents `[n, 4, 16, 16]`, and leave their moving average in place."""
    unet, text_encoder = pipe.unet.train(), pipe.text_encoder.train()
    processors = unet.attn_processors
    unet.set_attn_processor(Float32Attention())
    groups = group_weights(unet, text_encoder, fine_lr)
    optimiser = torch.optim.AdamW(groups, weight_decay=1e-4, betas=(0.9, 0.99), fused=True)
    weights = [weight for group in groups for weight in group["params"]]
    average = [weight.detach().clone() for weight in weights]
    for step, done in budget.spend():
        schedule_lr(optimiser, 1e-3, step, done)
        chosen = torch.randint(len(latents), (BATCH,))
        batch = [scenes[i] for i in chosen.tolist()]
        loss = measure_loss(pipe, batch, latents[chosen], done < LAYOUT_PART, rng)
        take_step(optimiser, loss)
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1 - min(0.999, (1 + step) / (10 + step)))
        report_loss("denoiser", step, loss)
    with torch.no_grad():
        torch._foreach_copy_(weights, average)
    unet.set_attn_processor(processors)


def _caption(scene: check.Scene, complete: bool, rng: random.Random) -> str:
    if complete:
        return check.write_prompt(scene)
    return "" if rng.random() < EMPTY_CAPTIONS else write_caption(scene, rng)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Tokenize to `int64 [n, 77]`."""
    return tokenizer(captions, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids


def load_networks(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)


def build_networks() -> StableDiffusionPipeline:
    """Build the untrained pipeline."""
    with TemporaryDirectory() as folder:
        tokenizer = build_tokenizer(Path(folder))
    return StableDiffusionPipeline(
        vae=build_vae(),
        text_encoder=build_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        unet=build_unet(),
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_networks(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Save in float16, with the tokenizer's vocabulary and merges as files of their own."""
    pipe.to(torch.float16).save_pretrained(folder)
    bpe = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(bpe["vocab"], ensure_ascii=False))
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


@click.command(help=(__doc__ or "").split("\n", 1)[0])
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--resume", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Keep its VAE.")
@click.option("--steps", default=6000, show_default=True, type=click.IntRange(min=1), help="Of the denoiser.")
@click.option("--vae-steps", default=3000, show_default=True, type=click.IntRange(min=1), help="Of the VAE.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Cut each of the two short here.")
@click.option("--pictures", default=16000, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True)
@click.option("--prompts", default=500, show_default=True, type=click.IntRange(min=1), help="Of the check.")
@click.pass_context
def main(
    context: click.Context,
    out: Path,
    resume: Path | None,
    steps: int,
    vae_steps: int,
    minutes: float | None,
    pictures: int,
    seed: int,
    prompts: int,
) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    scenes = [check.sample_scene(rng) for _ in range(pictures)]
    images = draw_batch(scenes, rng)
    pipe = load_networks(resume) if resume else build_networks()
    if not resume:
        train_vae(pipe.vae, images, Budget(vae_steps, minutes))
    latents = encode_images(pipe.vae.eval(), images)
    if not resume:
        pipe.vae.register_to_config(scaling_factor=1 / latents.std().item())
    latents *= pipe.vae.config.scaling_factor
    fine_lr = 0.1 if resume else 1.0
    train_denoiser(pipe, scenes, latents, Budget(steps, minutes), rng, fine_lr)
    save_networks(pipe, out)
    context.invoke(check.main, folder=out, prompts=prompts)


if __name__ == "__main__":
    main()
