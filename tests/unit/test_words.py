"""Textual inversion on engines does what it does on diffusers' own pipeline, and leaves every other prompt alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import sdopt
from sdopt.backends.slotted_session import find_slotted
from sdopt.bundle.manifest import read_manifest, write_manifest
from sdopt.errors import AdapterError, BackendError, SdoptError, UnsafeInputError, UsageError
from sdopt.library.identify import inspect_source
from sdopt.model.file_names import GRAPH_NAME, SLOTS_GRAPH_NAME
from sdopt.pipeline.load import close_engines
from tests.conftest import TINY_SHAPES, build_once
from tests.opened_pipeline import opened_pipeline
from tests.slotted_bundle import add_slots_to, write_lora
from tests.word_files import make_vectors, write_a1111, write_a1111_pickle, write_diffusers, write_sdxl

torch.set_num_threads(1)
LIMIT = 2e-6
ONE, THREE = make_vectors(1, 1), make_vectors(3, 3)


@pytest.fixture(scope="module")
def pipe(pristine_bundle: Path) -> Iterator[Any]:
    with opened_pipeline(pristine_bundle) as opened:
        yield opened


@pytest.fixture
def engines(pipe: Any) -> Iterator[Any]:
    yield pipe
    pipe.unload_textual_inversion()


@pytest.fixture
def torch_pipe() -> Any:
    return diffusers.StableDiffusionPipeline.from_pretrained(TINY_SHAPES, safety_checker=None, dtype=torch.float32)


def encode(pipe: Any, prompt: str) -> Tensor:
    states: Tensor = pipe.encode_prompt(prompt, "cpu", 1, False)[0].detach()
    return states


def error_of(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_hidden_states_are_those_of_diffusers(engines: Any, torch_pipe: Any, tmp_path: Path) -> None:
    path = write_diffusers(tmp_path / "learned.safetensors", THREE, "<ink-toy>")
    plain = encode(engines, "a red circle, blue")
    for pipe in (engines, torch_pipe):
        pipe.load_textual_inversion(str(path))
        pipe.load_textual_inversion({"glow": ONE[0]})
    for prompt in ("a <ink-toy> circle", "glow", "red glow, a <ink-toy>, <ink-toy> and glow on a blue background"):
        assert error_of(encode(engines, prompt), encode(torch_pipe, prompt)) <= LIMIT
    assert torch.equal(encode(engines, "a red circle, blue"), plain)
    engines.unload_textual_inversion("<ink-toy>")
    torch_pipe.unload_textual_inversion("<ink-toy>")
    assert error_of(encode(engines, "a glow circle"), encode(torch_pipe, "a glow circle")) <= LIMIT
    with pytest.raises(UsageError, match=r"no word '<ink-toy>' is loaded \(loaded: glow\)"):
        engines.unload_textual_inversion("<ink-toy>")


def test_a_word_is_what_is_drawn_and_goes_without_a_trace(engines: Any) -> None:
    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(3)
        drawn = engines("a glow circle", num_inference_steps=2, output_type="latent", generator=generator)
        latents: Tensor = drawn.images
        return latents

    before = draw()
    engines.load_textual_inversion({"glow": THREE})
    assert not torch.equal(draw(), before)
    engines.unload_textual_inversion()
    assert torch.equal(draw(), before)


def test_weights_act_on_every_vector_of_a_word(engines: Any, torch_pipe: Any) -> None:
    for pipe in (engines, torch_pipe):
        pipe.load_textual_inversion({"glow": THREE})
    weighed, plain = encode(engines, "a (glow:1.3) circle")[0], encode(torch_pipe, "a glow circle")[0]
    factors = torch.ones(77, 1)
    factors[2:5] = 1.3  # behind the start and `a`
    expected = plain * factors
    assert error_of(weighed, expected * (plain.mean() / expected.mean())) <= LIMIT


def test_a_word_is_read_whatever_its_case_and_what_stands_beside_it(engines: Any) -> None:
    engines.load_textual_inversion([{"<Ink>": ONE}, {"Glow": THREE}])
    expected = encode(engines, "a <Ink> , Glow")
    assert torch.equal(encode(engines, "a <ink>, gLOW"), expected)
    assert not torch.equal(encode(engines, "a <ink>, glowing"), expected)


def test_one_word_may_be_the_start_of_another(engines: Any) -> None:
    engines.load_textual_inversion([{"glow": ONE}, {"glow-ink": THREE}])
    longer = encode(engines, "glow-ink")
    engines.unload_textual_inversion("glow")
    assert torch.equal(encode(engines, "glow-ink"), longer)


def test_a_chunk_ends_before_a_word_and_not_inside(pristine_bundle: Path, shared_folder: Path) -> None:
    long = build_once(shared_folder / "tiny-154", shared_folder / "cache", "--precision", "fp32", "--tokens", "154")
    pipe = sdopt.load(long)
    try:
        pipe.load_textual_inversion({"glow": THREE})
        a = encode(pipe, "a")
        filler = " ".join(["a"] * 74)
        states = encode(pipe, f"{filler} glow")
        assert states.shape[1] == 154
        assert a.shape[1] == 77
        assert error_of(states[:, 77:], encode(pipe, "glow")) <= LIMIT
        assert error_of(states[:, :77], encode(pipe, filler)) <= LIMIT
    finally:
        close_engines(pipe)


WRITERS: dict[str, Callable[[Path], tuple[Path, str]]] = {
    "A1111": lambda folder: (write_a1111(folder / "Bad-Hands.safetensors", THREE), "Bad-Hands"),
    "A1111 pickle": lambda folder: (write_a1111_pickle(folder / "old.pt", THREE, "older"), "older"),
    "diffusers": lambda folder: (write_diffusers(folder / "x.safetensors", THREE, "<ink>"), "<ink>"),
    "diffusers pickle": lambda folder: (write_diffusers(folder / "x.bin", THREE, "<ink>"), "<ink>"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_program_s_files_are_read_and_named(writer: str, engines: Any, tmp_path: Path) -> None:
    path, name = WRITERS[writer](tmp_path)
    engines.load_textual_inversion(path)
    found = encode(engines, f"a {name}")
    engines.unload_textual_inversion(name)
    engines.load_textual_inversion({name: THREE})
    assert torch.equal(encode(engines, f"a {name}"), found)
    table = inspect_source(str(path))
    assert (table["kind"], table["word"], table["vectors"], table["widths"]) == ("embedding", name, 3, {"": 96})


def test_the_first_trainers_files_are_read(engines: Any, tmp_path: Path) -> None:
    class Kept(torch.nn.ParameterDict):
        """As torch 1 pickled it: its attributes, and no items."""

        def __reduce_ex__(self, protocol: Any) -> Any:
            return torch.nn.ParameterDict, (), {"training": True, "_parameters": self.kept}

    table = Kept()
    object.__setattr__(table, "kept", {"*": torch.nn.Parameter(THREE.clone())})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": table}, tmp_path / "first.pt")
    engines.load_textual_inversion(tmp_path / "first.pt")
    found = encode(engines, "a first")
    engines.unload_textual_inversion("first")
    engines.load_textual_inversion({"first": THREE})
    assert torch.equal(encode(engines, "a first"), found)


def test_inspect_names_the_family(tmp_path: Path) -> None:
    path = write_sdxl(tmp_path / "xl.safetensors", make_vectors(2, 1, 768), make_vectors(2, 2, 1280))
    table = inspect_source(str(path))
    assert (table["family"], table["vectors"]) == ("sdxl", 2)
    assert inspect_source(str(write_a1111(tmp_path / "1.safetensors", make_vectors(1, 1, 768))))["family"] == "sd1"


DEFECTS: dict[str, tuple[Any, type[SdoptError], str]] = {
    "another family": ({"z": torch.zeros(2, 768)}, AdapterError, "vectors of 768 numbers, and text_encoder has 96"),
    "SDXL": ({"clip_l": torch.zeros(1, 96), "clip_g": torch.zeros(1, 1280)}, UsageError, "give it: token="),
    "NaN": ({"z": torch.full((1, 96), float("nan"))}, AdapterError, "has NaN or infinity"),
    "no vectors": ({"z": torch.zeros(0, 96)}, AdapterError, "has no vectors"),
    "too many": ({"z": torch.zeros(76, 96)}, AdapterError, "has 76 vectors, and .* has 75 places"),
    "no width": ({"z": torch.zeros(1, 0)}, AdapterError, "is not a list of vectors"),
    "a number": ({"z": torch.tensor(1.0)}, AdapterError, "is not a list of vectors"),
    "whole numbers": ({"z": torch.zeros(1, 96, dtype=torch.int8)}, AdapterError, "is not a list of vectors"),
    "a picture": ({"z": torch.zeros(1, 2, 3, 4)}, AdapterError, "is not a textual inversion"),
    "two tensors": ({"y": torch.zeros(96), "z": torch.zeros(96)}, AdapterError, "is not a textual inversion"),
    "a word of nothing": ({" ": torch.zeros(1, 96)}, UsageError, "cannot be a word of prompts"),
    "the same word": ({"GLOW": torch.zeros(1, 96)}, UsageError, "'glow' is loaded already.* tell from it: 'GLOW'"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_what_does_not_fit_is_named_and_changes_nothing(defect: str, engines: Any) -> None:
    table, kind, message = DEFECTS[defect]
    engines.load_textual_inversion({"glow": ONE})
    before = encode(engines, "a glow")
    with pytest.raises(kind, match=message):
        engines.load_textual_inversion([{"other": THREE}, table])
    assert list(engines.unet.words.words) == ["glow"]
    assert torch.equal(encode(engines, "a glow"), before)


def test_all_words_together_have_a_limit(engines: Any) -> None:
    with pytest.raises(AdapterError, match="have 1050 vectors, and the engines take 1024"):
        engines.load_textual_inversion([{f"w{number}": torch.zeros(75, 96)} for number in range(14)])
    engines.load_textual_inversion([{f"w{number}": make_vectors(75, number)} for number in range(13)])
    assert torch.isfinite(encode(engines, "w12")).all()


def test_files_that_are_something_else_are_refused(engines: Any, tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(3)}, tmp_path / "vae.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 no archive")
    (tmp_path / "picture.png").write_bytes(b"")
    for name in ("vae.safetensors", "torn.safetensors", "torn.pt", "picture.png", "none.pt"):
        with pytest.raises(SdoptError):
            engines.load_textual_inversion(tmp_path / name)


def test_a_pickle_that_runs_code_runs_none(engines: Any, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"string_to_param": {"*": Evil()}, "name": "x"}, tmp_path / "evil.pt")
    with pytest.raises(UnsafeInputError, match="wants more than tensors"):
        engines.load_textual_inversion(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_an_id_that_stands_for_nothing_never_reaches_the_runtime(engines: Any) -> None:
    engines.load_textual_inversion({"glow": ONE})
    session = find_slotted(engines.text_encoder.session)
    assert session is not None
    assert session.slots.words is not None
    ids = torch.full((1, 77), session.slots.words.vocabulary + 1)
    with pytest.raises(BackendError, match="stands for no word"):
        session.run({"input_ids": ids})


def test_an_older_bundle_says_how_to_build_it_again(pristine_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(pristine_bundle, folder)
    manifest = read_manifest(folder)
    components = {name: part.model_copy(update={"slots": None}) for name, part in manifest.components.items()}
    write_manifest(folder, manifest.model_copy(update={"components": components}))
    pipe = sdopt.load(folder)
    try:
        with pytest.raises(UsageError, match="was built before its text encoders took words") as caught:
            pipe.load_textual_inversion({"glow": ONE})
        assert caught.value.hint == f"build it again: sdopt convert --again {folder}"
    finally:
        close_engines(pipe)


def test_words_and_a_lora_of_the_text_encoder_act_together(
    pristine_bundle: Path, torch_pipe: Any, tmp_path: Path
) -> None:
    lora = write_lora(tmp_path / "ink.safetensors", pristine_bundle, 1, endings=("q_proj", "fc1"))
    pipe = sdopt.load(add_slots_to(pristine_bundle, tmp_path / "slotted"))
    try:
        for each in (pipe, torch_pipe):
            each.load_textual_inversion({"glow": THREE})
        alone = encode(pipe, "a glow circle")
        assert error_of(alone, encode(torch_pipe, "a glow circle")) <= LIMIT
        for each in (pipe, torch_pipe):
            each.load_lora_weights(str(lora))
        both = encode(pipe, "a glow circle")
        assert error_of(both, encode(torch_pipe, "a glow circle")) <= LIMIT
        assert error_of(both, alone) > 0.01
        # The engine with the slots stays open for the word, and must not keep the adapter.
        pipe.unload_lora_weights()
        assert torch.equal(encode(pipe, "a glow circle"), alone)
    finally:
        close_engines(pipe)


def test_the_plain_graph_knows_nothing_of_words(pristine_bundle: Path) -> None:
    import onnx_ir as ir

    folder = pristine_bundle / "text_encoder"
    plain, other = ir.load(folder / GRAPH_NAME), ir.load(folder / SLOTS_GRAPH_NAME)
    assert [value.name for value in plain.graph.inputs] == ["input_ids"]
    assert [value.name for value in other.graph.inputs] == ["input_ids", "extra_embeddings"]
    assert not (pristine_bundle / "unet" / SLOTS_GRAPH_NAME).exists()
