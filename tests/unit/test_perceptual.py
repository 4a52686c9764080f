"""LPIPS, CLIP and FID on random weights: laws that hold for any weights, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sdopt.errors import CheckpointError, UnsafeInputError, UsageError
from sdopt.fidelity.metrics import Picture
from sdopt.fidelity.perceptual.clip import Clip, Preparation, prepare_picture
from sdopt.fidelity.perceptual.frechet import compute_frechet_distance
from sdopt.fidelity.perceptual.local_weights import PerceptualWeights, describe_weights, parse_weights, read_tensors
from sdopt.fidelity.perceptual.lpips import Lpips, _choose_network, list_tensors
from sdopt.fidelity.scene import paint_image
from tests.planted_weights import write_clip, write_lpips


def _add_noise(picture: Picture, spread: float) -> Picture:
    noise = np.random.default_rng(1).normal(0, spread, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def test_lpips_is_0_for_equal_pictures_and_grows_with_noise(tmp_path: Path) -> None:
    lpips = Lpips(read_tensors([write_lpips(tmp_path / "alex.safetensors")]))
    picture = paint_image(64, 96, 3)
    figures = [lpips.compare(picture, _add_noise(picture, spread)) for spread in (2, 10, 40)]
    assert lpips.compare(picture, picture) == 0
    assert 0 < figures[0] < figures[1] < figures[2]
    assert lpips.compare(_add_noise(picture, 10), picture) == pytest.approx(figures[1], rel=1e-5)


def test_lpips_by_its_definition(tmp_path: Path) -> None:
    """The first two layers, written out again with torch's own modules."""
    tensors = read_tensors([write_lpips(tmp_path / "alex.safetensors")])
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "alex.safetensors")
    weights |= {name: torch.zeros_like(weights[name]) for name in weights if name[:4] in ("lin2", "lin3", "lin4")}
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "two.safetensors")
    first, second = torch.nn.Conv2d(3, 64, 11, 4, 2), torch.nn.Conv2d(64, 192, 5, 1, 2)
    first.load_state_dict({part: weights[f"features.0.{part}"] for part in ("weight", "bias")})
    second.load_state_dict({part: weights[f"features.3.{part}"] for part in ("weight", "bias")})

    def taps(picture: Picture) -> list[torch.Tensor]:
        values = torch.tensor(picture / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        one = torch.relu(first((values - shift) / scale))
        return [one, torch.relu(second(torch.nn.MaxPool2d(3, 2)(one)))]

    a, b = paint_image(64, 64, 1), paint_image(64, 64, 2)
    expected = 0.0
    with torch.no_grad():
        for place, (left, right) in enumerate(zip(taps(a), taps(b), strict=True)):
            unit = [torch.nn.functional.normalize(values, dim=1, eps=1e-10) for values in (left, right)]
            weight = weights[f"lin{place}.model.1.weight"].reshape(1, -1, 1, 1)
            expected += ((unit[0] - unit[1]) ** 2 * weight).sum(dim=1).mean().item()
    assert Lpips(read_tensors([tmp_path / "two.safetensors"])).compare(a, b) == pytest.approx(expected, rel=1e-4)
    assert Lpips(tensors).compare(a, b) > expected


def test_lpips_names_the_tensor_that_is_not_there(tmp_path: Path) -> None:
    path = write_lpips(tmp_path / "a.safetensors", rename=("features.6.weight", "net.slice3.6.weight"))
    with pytest.raises(CheckpointError, match=r"features\.6\.weight"):
        Lpips(read_tensors([path]))


def test_lpips_knows_vgg_by_its_first_convolution(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg.safetensors")
    name, layers = _choose_network(read_tensors([tmp_path / "vgg.safetensors"]))
    shapes = list_tensors(layers)
    # torchvision's vgg16 has 14,714,688 weights in `features`; lpips adds one for each of 1,472 channels.
    assert name == "VGG-16"
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 14_714_688 + 1_472


def test_alexnet_has_as_many_weights_as_torchvisions() -> None:
    shapes = list_tensors()
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 2_469_696 + 1_152


def test_lpips_weights_in_two_files_one_of_them_a_pickle(tmp_path: Path) -> None:
    """As they are published: the backbone and the lin layers, in torch's own format."""
    from safetensors.torch import load_file

    whole = write_lpips(tmp_path / "both.safetensors")
    tensors = load_file(whole)
    lin = {name: value for name, value in tensors.items() if name.startswith("lin")}
    torch.save(lin, tmp_path / "alex.pth")
    from safetensors.torch import save_file

    save_file({n: v for n, v in tensors.items() if n not in lin}, tmp_path / "alexnet.safetensors")
    a, b = paint_image(64, 64, 1), paint_image(64, 64, 2)
    apart = Lpips(read_tensors([tmp_path / "alexnet.safetensors", tmp_path / "alex.pth"]))
    assert apart.compare(a, b) == Lpips(read_tensors([whole])).compare(a, b)
    with pytest.raises(UsageError, match="of another file once more"):
        read_tensors([whole, tmp_path / "alex.pth"])


class _Mischief:
    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self._target,))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"features.0.weight": _Mischief(tmp_path / "done")}, tmp_path / "bad.pth")
    with pytest.raises(UnsafeInputError):
        read_tensors([tmp_path / "bad.pth"])
    assert not (tmp_path / "done").exists()


def test_clip_gives_the_cosine_of_picture_and_prompt(tmp_path: Path) -> None:
    """Against transformers' own model, which returns 'logits': the cosine times e to the logit scale."""
    from transformers import CLIPModel

    folder = write_clip(tmp_path)
    clip = Clip(folder)
    picture, prompt = paint_image(48, 32, 4), "a star"
    cosine = float(clip.find_features([picture])[0] @ clip.find_text_features([prompt])[0])
    model = CLIPModel.from_pretrained(folder)
    preparation = Preparation(32, 32, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    words = clip._tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        logits = model(**words, pixel_values=torch.from_numpy(prepare_picture(picture, preparation))).logits_per_image
        scale = model.logit_scale.exp()
    assert cosine == pytest.approx(float(logits / scale), abs=1e-5)
    assert cosine != 0


def test_clip_reads_as_much_of_a_prompt_as_it_can(tmp_path: Path) -> None:
    clip = Clip(write_clip(tmp_path))
    features = clip.find_text_features(["x" * 10_000, "<script>alert(1)</script>", "אבג", ""])
    assert np.isfinite(features).all()
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0)


@pytest.mark.parametrize(("height_px", "width_px"), [(64, 64), (300, 200), (224, 225), (97, 311)])
def test_pictures_are_prepared_as_transformers_does(height_px: int, width_px: int) -> None:
    pil = pytest.importorskip("transformers.models.clip.image_processing_pil_clip", reason="transformers 5.20 or later")
    picture = paint_image(height_px, width_px, 9)
    expected = pil.CLIPImageProcessorPil()(images=picture, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(prepare_picture(picture, Preparation()), expected, atol=2e-5)


def test_a_folder_that_is_no_clip(tmp_path: Path) -> None:
    folder = write_clip(tmp_path)
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match="not a CLIP model"):
        Clip(folder)


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    """Diagonal covariances: |m_a - m_b|² + sum of (s_a - s_b)². The samples have exactly these moments."""
    rng = np.random.default_rng(0)
    width, count = 4, 50
    basis = np.linalg.qr(rng.normal(size=(count, width)) - rng.normal(size=(count, width)).mean(axis=0))[0]
    basis -= basis.mean(axis=0)
    basis = np.linalg.qr(basis)[0] * np.sqrt(count - 1)  # covariance 1, mean 0
    mean_a, mean_b = rng.normal(size=(2, width))
    spread_a, spread_b = rng.uniform(0.5, 2, size=(2, width))
    a, b = basis * spread_a + mean_a, -basis * spread_b + mean_b
    expected = ((mean_a - mean_b) ** 2).sum() + ((spread_a - spread_b) ** 2).sum()
    assert compute_frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert compute_frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert compute_frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_correlated_gaussians() -> None:
    """The square root of the product of covariances, by scipy."""
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(30, 5)) @ rng.normal(size=(5, 5)) + 1
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(np.trace(sqrtm(covariances[0] @ covariances[1])))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root
    assert compute_frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)


def test_weights_by_name(tmp_path: Path) -> None:
    file, folder = write_lpips(tmp_path / "alex.safetensors"), write_clip(tmp_path / "clip")
    assert parse_weights(()) == PerceptualWeights()
    assert parse_weights((f"lpips={file}", f"clip={folder}")) == PerceptualWeights((file,), folder)
    assert describe_weights([file]).startswith("alex.safetensors, SHA-256 ")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("lpisp=x", "no weights named 'lpisp'"),
        ("alex.pth", "no weights named"),
        ("lpips", "has no path"),
        ("lpips=", "has no path"),
        ("lpips=/nowhere/alex.pth", "no such file"),
        ("clip=/nowhere", "no config.json"),
    ],
)
def test_weights_that_cannot_be(value: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_weights((value,))


def test_a_clip_folder_with_a_pickle_alone_is_refused(tmp_path: Path) -> None:
    folder = write_clip(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="no weights in safetensors"):
        parse_weights((f"clip={folder}",))
