from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdopt.bundle.manifest import write_manifest
from sdopt.cli.generate import generate
from sdopt.errors import ArtifactError, DrawingError, SdoptError, UsageError
from sdopt.model.lora import LoraUse
from sdopt.model.request import TextToImage
from sdopt.model.samplers import SAMPLERS, SCHEDULERS, SchedulerName, Spacing
from sdopt.pictures.infotext import format_infotext, parse_infotext
from sdopt.pictures.png import PictureRecipe, read_recipe, write_picture
from sdopt.tasks.loras import list_loras
from tests.reference_session import TINY_SHAPES, make_bundle

# Schedulers of diffusers 0.42 call numpy on tensors, whose torch 2.13 speaks numpy 1's protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

BLANK = Image.new("RGB", (8, 8))
# Written by stable-diffusion-webui 1.10.1.
FOREIGN = (
    "a castle, (oil painting:1.2)\nby the sea\nNegative prompt: fog, rain,\nblur\n"
    "Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 1234567890, Size: 512x768, "
    'Model hash: 6ce0161689, Model: v1-5-pruned, Clip skip: 2, Lora hashes: "a: 0c, b: 1d", Version: v1.10.1'
)


def recipe_of(**values: Any) -> PictureRecipe:
    request = TextToImage(**{"prompt": "a red circle"} | values)
    return PictureRecipe(sdopt="0.1.0", bundle="tiny", bundle_sha256="ab" * 32, request=request)


def write(folder: Path, **values: Any) -> Path:
    return write_picture(folder, BLANK, recipe_of(**values), sampler="Euler a", model_hash="0123456789")


def save_with(path: Path, **texts: str) -> Path:
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    BLANK.save(path, pnginfo=info)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(path: Path, *chunks: bytes) -> Path:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b""))
    return path


def test_other_programs_can_read_it(tmp_path: Path) -> None:
    path = write(tmp_path, negative_prompt="fog", steps=30, guidance_scale=7, seed=5, clip_skip=1)
    with Image.open(path) as image:
        assert image.text["parameters"] == (
            "a red circle\nNegative prompt: fog\nSteps: 30, Sampler: Euler a, CFG scale: 7, Seed: 5, "
            "Size: 8x8, Model hash: 0123456789, Model: tiny, Clip skip: 2, Version: sdopt 0.1.0"
        )
        assert json.loads(image.text["sdopt"])["request"]["seed"] == 5


def test_other_programs_learn_of_the_loras(tmp_path: Path) -> None:
    """By the prompt, where A1111 looks for them with the text encoders' weight first, and by AutoV3."""
    listed = LoraUse(source="/loras/ink.safetensors", unet=0.8, text=0.5)
    tagged = LoraUse(source="glow", unet=-0.3, text=-0.3, autov3="cd" * 32)
    used = (listed.model_copy(update={"autov3": "ab" * 32}), tagged)
    request = TextToImage(prompt="a castle <lora:glow:-0.3>", seed=5, steps=4, loras=(listed,))
    recipe = PictureRecipe(bundle="tiny", request=request, loras=used)
    path = write_picture(tmp_path, Image.new("RGB", (8, 8)), recipe, sampler="Euler a", model_hash="0123456789")
    with Image.open(path) as image:
        text = image.text["parameters"]
    assert text.startswith("a castle <lora:glow:-0.3> <lora:ink:0.5:0.8>\n")
    assert 'Lora hashes: "ink: abababababab, glow: cdcdcdcdcdcd"' in text
    # And back: what A1111 would draw of it is what was drawn.
    read = list_loras(parse_infotext(text))
    assert [(use.source, use.unet, use.text) for use in read] == [("glow", -0.3, -0.3), ("ink", 0.8, 0.5)]


@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle",
        "Größe, «é»",
        "海辺の城 🏰",
        "a\nb",
        "Steps: 1, Seed: 2, Size: 3x3",
        ' "quoted\\" ',
        "",
        "\x00",
    ],
)
def test_recipe_comes_back_whole(tmp_path: Path, prompt: str) -> None:
    expected = recipe_of(
        prompt=prompt, negative_prompt=prompt, scheduler="DPM++ 2M", guidance_scale=7.25, seed=2**63 - 1
    )
    assert read_recipe(write_picture(tmp_path, BLANK, expected, sampler="DPM++ 2M")) == expected


def test_names_are_numbered_readable_and_never_reused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "00041-7-from-before.png").write_bytes(b"kept")
    names = [
        write(tmp_path, prompt=prompt, seed=7).name
        for prompt in ("A large / red\\circle: 50%", "../../etc/passwd", "🏰海", "x" * 900, "Größe")
    ]
    assert names == [
        "00042-7-a-large-red-circle-50.png",
        "00043-7-etc-passwd.png",
        "00044-7-picture.png",
        f"00045-7-{'x' * 60}.png",
        "00046-7-groe.png",
    ]
    assert (tmp_path / "00041-7-from-before.png").read_bytes() == b"kept"
    assert len(list(tmp_path.iterdir())) == 7


@pytest.mark.parametrize("links", [True, False])
def test_name_taken_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    taken = tmp_path / "00001-7-a-red-circle.png"
    listing = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()) if self == tmp_path else listing(self))
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", _no_links)
    taken.write_bytes(b"kept")
    assert write(tmp_path, seed=7).name == "00002-7-a-red-circle.png"
    assert taken.read_bytes() == b"kept"
    assert sorted(path.name for path in listing(tmp_path)) == [taken.name, "00002-7-a-red-circle.png"]


def _no_links(self: Path, target: Path) -> None:
    del self, target
    raise PermissionError(1, "Operation not permitted")


def test_foreign_infotext_is_understood(tmp_path: Path) -> None:
    recipe = read_recipe(save_with(tmp_path / "a.png", parameters=FOREIGN))
    assert recipe.bundle_sha256 == ""
    assert recipe.request == TextToImage(
        prompt="a castle, (oil painting:1.2)\nby the sea",
        negative_prompt="fog, rain,\nblur",
        steps=25,
        scheduler=SchedulerName.DPMPP_2M_KARRAS,
        guidance_scale=6.5,
        seed=1234567890,
        width_px=512,
        height_px=768,
        clip_skip=1,
    )


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("just a prompt", ArtifactError, "not in A1111's format"),
        ("x\nSteps: 20, Sampler: Restart, CFG scale: 7, Seed: 1", UsageError, "no scheduler 'Restart'"),
        ("x\nSteps: many, Sampler: Euler, CFG scale: 7, Seed: 1", UsageError, "steps"),
        ("x\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: -1", UsageError, "seed"),
        ("(x)\nSteps: 20, Sampler: Euler, Seed: 1, Emphasis: No norm", UsageError, "emphasis 'No norm'"),
        ("[x:2]\nSteps: 20, Seed: 1, Old prompt editing timelines: True", UsageError, "old timelines"),
    ],
)
def test_foreign_infotext_that_cannot_be_followed(text: str, kind: type[SdoptError], message: str) -> None:
    with pytest.raises(kind, match=message):
        parse_infotext(text)


_LINE = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=40).map(str.strip)


@given(
    prompt=_LINE.filter(lambda line: line and not line.startswith("Negative prompt:")),
    negative=_LINE,
    scheduler=st.sampled_from(SchedulerName),
    scale=st.integers(0, 200).map(lambda n: n / 4),
    seed=st.integers(0, 2**63 - 1),
    skip=st.none() | st.integers(1, 12),
)
def test_infotext_round_trip(
    prompt: str, negative: str, scheduler: SchedulerName, scale: float, seed: int, skip: int | None
) -> None:
    request = TextToImage(
        prompt=prompt,
        negative_prompt=negative or None,
        scheduler=scheduler,
        guidance_scale=scale,
        seed=seed,
        clip_skip=skip,
    )
    label = SCHEDULERS[scheduler].label
    text = format_infotext(
        request, size_px=(64, 32), sampler=label, model='a, "b": c', model_hash="", version="sdopt 1"
    )
    assert parse_infotext(text) == request.model_copy(update={"width_px": 64, "height_px": 32})


@given(st.text(max_size=200))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        request = parse_infotext(text)
    except SdoptError:
        return
    assert isinstance(request, TextToImage)


def test_files_that_say_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not say how"):
        read_recipe(save_with(tmp_path / "a.png", Title="x"))
    (tmp_path / "b.png").write_bytes(b"\xff\xd8\xff\xe0 a JPEG")
    with pytest.raises(UsageError, match="not a PNG"):
        read_recipe(tmp_path / "b.png")
    for missing in (tmp_path / "none.png", tmp_path):
        with pytest.raises(UsageError, match="cannot read"):
            read_recipe(missing)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("{", "damaged or of a newer"),
        ("[]", "damaged or of a newer"),
        ('{"schema_version": 2, "request": {"prompt": "x"}}', "schema_version"),
        ('{"request": {"prompt": "x", "colour": 3}}', "request.colour"),
        ('{"request": {"prompt": "x"}, "bundle_sha256": "../.."}', "bundle_sha256"),
        ('{"request": {"prompt": "x", "scheduler": "newest"}}', "no scheduler 'newest'"),
    ],
)
def test_recipes_are_read_strictly(tmp_path: Path, recipe: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_recipe(save_with(tmp_path / "a.png", sdopt=recipe))


def test_damaged_and_hostile_files(tmp_path: Path) -> None:
    whole = write(tmp_path).read_bytes()
    path = tmp_path / "x.png"
    path.write_bytes(whole[:60])
    with pytest.raises(ArtifactError, match=r"truncated|checksum"):
        read_recipe(path)
    path.write_bytes(whole.replace(b"a red circle", b"a red square", 1))
    with pytest.raises(ArtifactError, match="checksum"):
        read_recipe(path)
    with pytest.raises(ArtifactError, match="has a text of 4294967295 bytes"):
        read_recipe(raw_png(path, struct.pack(">I4s", 2**32 - 1, b"tEXt")))
    bomb = zlib.compress(b"x" * (8 << 20))
    with pytest.raises(ArtifactError, match="compressed text of more than"):
        read_recipe(raw_png(path, chunk(b"iTXt", b"sdopt\0\1\0\0\0" + bomb)))
    for broken in (b"sdopt\0\1\0\0\0not zlib", b"sdopt\0\0", b"sdopt", b"sdopt\0\0\0\0\0\xff"):
        with pytest.raises((ArtifactError, UsageError)):
            read_recipe(raw_png(path, chunk(b"iTXt", broken)))


def test_compressed_text_is_read(tmp_path: Path) -> None:
    text = zlib.compress(recipe_of(prompt="海").model_dump_json().encode())
    path = raw_png(tmp_path / "a.png", chunk(b"iTXt", b"sdopt\0\1\0\0\0" + text))
    assert read_recipe(path).request.prompt == "海"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle that reference sessions compute."""
    bundle = make_bundle(tmp_path / "b")
    write_manifest(bundle.folder, bundle.manifest)

    def reopen(files: Any, settings: object) -> Any:
        del settings
        session = bundle.sessions[files.name]
        session.closed = False
        return session

    # Reference sessions have no graphs, which is what the checks before opening are about.
    monkeypatch.setattr("sdopt.pipeline.load.require_sound", lambda folder, manifest: None)
    monkeypatch.setattr("sdopt.pipeline.load.open_session", reopen)
    return bundle.folder


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(generate, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_command_draws_and_draws_again(folder: Path, tmp_path: Path) -> None:
    options = (
        "-o",
        tmp_path / "out",
        "--steps",
        4,
        "--seed",
        11,
        "--scheduler",
        "DPM++ 2M SDE",
        "--negative",
        "green",
    )
    drawn = json.loads(run(folder, "a red circle", "a blue/star ⭐", *options, "--json").stdout)
    assert drawn["schema_version"] == 1
    first, second = drawn["pictures"]
    assert Path(first["path"]).name == "00001-11-a-red-circle.png"
    assert Path(second["path"]).name == "00002-12-a-blue-star.png"
    assert (second["seed"], second["sampler"], second["width_px"]) == (12, "DPM++ 2M SDE", 64)
    result = run(folder, "--from-image", second["path"], "-o", tmp_path / "again")
    assert result.stdout == ""
    again = tmp_path / "again" / "00001-12-a-blue-star.png"
    np.testing.assert_array_equal(pixels(again), pixels(second["path"]))
    assert read_recipe(again) == read_recipe(Path(second["path"]))
    run(folder, "--from-image", first["path"], "-o", tmp_path / "again", "--steps", 3, "a red star")
    changed = read_recipe(tmp_path / "again" / "00002-11-a-red-star.png").request
    assert (changed.steps, changed.scheduler, changed.negative_prompt) == (
        3,
        SchedulerName.DPMPP_2M_SDE,
        "green",
    )


def test_a_recipe_keeps_the_prompt_as_typed_and_draws_it_again(folder: Path, tmp_path: Path) -> None:
    prompt = r"a (red:1.3) [circle:star:0.5] \(2019\) [blue|green]"
    options = ("--steps", 4, "--seed", 3, "--negative", "(yellow)")
    drawn = json.loads(run(folder, prompt, *options, "-o", tmp_path / "out", "--json").stdout)["pictures"]
    recipe = read_recipe(Path(drawn[0]["path"]))
    assert (recipe.request.prompt, recipe.request.negative_prompt) == (prompt, "(yellow)")
    assert parse_infotext(_parameters(Path(drawn[0]["path"]))).prompt == prompt
    run(folder, "--from-image", drawn[0]["path"], "-o", tmp_path / "again.png")
    np.testing.assert_array_equal(pixels(tmp_path / "again.png"), pixels(drawn[0]["path"]))


def _parameters(path: Path) -> str:
    with Image.open(path) as image:
        return str(image.info["parameters"])


def test_command_says_where_another_picture_comes_from(folder: Path, tmp_path: Path) -> None:
    foreign = save_with(
        tmp_path / "a.png",
        parameters="a star\nSteps: 2, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64",
    )
    assert "not drawn by sdopt" in run(folder, "--from-image", foreign, "-o", tmp_path / "out").stderr
    other = write(tmp_path, steps=1)
    assert "another bundle, 'tiny'" in run(folder, "--from-image", other, "-o", tmp_path / "out").stderr


def test_command_seeds_itself(folder: Path, tmp_path: Path) -> None:
    run(folder, "a star", "--steps", 1, "-o", tmp_path / "out")
    run(folder, "a star", "--steps", 1, "-o", tmp_path / "out")
    seeds = {read_recipe(path).request.seed for path in (tmp_path / "out").iterdir()}
    assert len(seeds) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to draw"),
        (("x", "--scheduler", "eulr"), "no scheduler 'eulr'"),
        (("x", "--steps", "0"), "steps"),
        (("x", "--seed", 2**63 - 1, "y"), "seed"),
        (("x", "y", "-o", "out.png"), "out.png is one file, and 2 pictures are asked for"),
        (("x", "-o", "{picture}"), "exists, and pictures are never overwritten"),
        (("a __big__ cat",), "has '__big__', which other programs read as a wildcard"),
        (("a (big:1.3.1) cat",), "the weight '1.3.1', which is not a number"),
        (("x", "--negative", "<lora:x:1>"), "the negative prompt names a LoRA, which would act on the whole picture"),
        (("x", "--steps", "1001"), "--steps is 1001, and has to be a whole number from 1 to 1000"),
        (("x", "--scale", "nan"), "--scale is nan, and has to be a number from 0 to 100"),
        (("x", "-o", "{file}"), "a file is in its place"),
        (("x", "-o", "{file}/out"), "a file is in its place"),
    ],
)
def test_command_refuses_before_it_loads(tmp_path: Path, arguments: tuple[object, ...], message: str) -> None:
    file, picture = tmp_path / "file", tmp_path / "old.png"
    file.touch()
    picture.touch()
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "no-bundle", *(str(argument).format(file=file, picture=picture) for argument in arguments))


@pytest.mark.parametrize("output", ["/proc/x", "/proc/x/y.png", "/dev/null/x"])
def test_an_output_that_cannot_be_is_a_sentence(tmp_path: Path, output: str) -> None:
    with pytest.raises(SdoptError, match=r"cannot write|cannot be a folder|no permission"):
        run(tmp_path / "no-bundle", "x", "-o", output)


def test_one_picture_may_have_a_name_of_its_own(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "circle.png"
    drawn = json.loads(run(folder, "a red circle", "--steps", 2, "--seed", 3, "-o", path, "--json").stdout)
    assert [picture["path"] for picture in drawn["pictures"]] == [str(path)]
    assert read_recipe(path).request.seed == 3
    before = path.read_bytes()
    with pytest.raises(UsageError, match="never overwritten"):
        run(folder, "a red circle", "--steps", 2, "-o", path)
    with pytest.raises(UsageError, match="never overwritten"):
        write_picture(path, BLANK, recipe_of(), sampler="Euler a")
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["circle.png"]


@pytest.mark.parametrize(
    ("scheduler", "steps", "most"),
    [("unipc", 999, 998), ("unipc", 1000, 998), ("deis", 999, 998), ("ddim", 1000, 999), ("lcm", 51, 50)],
)
def test_steps_that_a_scheduler_cannot_do_are_refused_before_the_engines_open(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str, steps: int, most: int
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("an engine was opened")

    monkeypatch.setattr("sdopt.pipeline.load.open_session", fail)
    with pytest.raises(UsageError, match=f"--steps is {steps}, and .* can do {most} at most"):
        run(folder, "x", "--scheduler", scheduler, "--steps", steps, "-o", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_picture_with_nan_is_an_error_and_nothing_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    decode = torch.nn.Module.__call__

    def spoil(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = decode(self, *args, **kwargs)
        if type(self).__name__ == "VaeDecoderNetwork":
            result[..., 0] = float("inf")
        return result

    monkeypatch.setattr(torch.nn.Module, "__call__", spoil)
    with pytest.raises(DrawingError, match="the vae decoder gave NaN or infinity"):
        run(folder, "x", "--steps", 1, "-o", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_help_lists_every_scheduler() -> None:
    # The terminal's width may break a line at any space.
    text = " ".join(run("--help").stdout.replace("│", " ").split())
    assert all(name in text for name in (*SAMPLERS, *Spacing))


def test_a_checkpoint_is_told_from_a_bundle_and_the_hint_writes_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is a checkpoint, and not a bundle of engines") as caught:
        run(TINY_SHAPES, "x", "-o", tmp_path / "out")
    assert caught.value.hint == f"make the bundle with: sdopt convert {TINY_SHAPES} -o engines/tiny-shapes"
