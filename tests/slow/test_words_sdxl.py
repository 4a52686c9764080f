"""Words in both of SDXL's text encoders, whose configs pool at the highest id: diffusers then pools at the word."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch

import sdopt
from sdopt.errors import AdapterError
from sdopt.model.family import Family, Prediction
from sdopt.pipeline.load import close_engines
from tests.checkpoints import make_model, small_recipe, write_folder
from tests.sdopt_process import run_sdopt
from tests.unit.test_pipeline_families import load_plain
from tests.word_files import make_vectors, write_sdxl

LIMIT = 2e-6
WORD, PROMPT = "<inky>", "a <inky> castle"


def test_both_text_encoders_learn_a_word_and_pool_at_the_end(tmp_path: Path) -> None:
    model = write_folder(tmp_path / "model", make_model(small_recipe(Family.SDXL)))
    done = run_sdopt(
        "convert", str(model), "-o", str(tmp_path / "xl"), "--precision", "fp32", "--no-verify", "--size", "64x64",
        cache=tmp_path / "cache",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pipe = sdopt.load(tmp_path / "xl")
    plain = load_plain(model, diffusers.StableDiffusionXLPipeline, prediction=Prediction.EPSILON.value)
    try:
        parts = [make_vectors(2, seed, 64) for seed in (1, 2)]
        pipe.load_textual_inversion(write_sdxl(tmp_path / "inky.safetensors", *parts), token=WORD)
        for name, vectors in zip(("", "_2"), parts, strict=True):
            encoder, tokenizer = getattr(plain, f"text_encoder{name}"), getattr(plain, f"tokenizer{name}")
            plain.load_textual_inversion(vectors, token=WORD, text_encoder=encoder, tokenizer=tokenizer)
        found, expected = (
            each.encode_prompt(PROMPT, device="cpu", do_classifier_free_guidance=False) for each in (pipe, plain)
        )
        assert (found[0] - expected[0]).norm() / expected[0].norm() <= LIMIT

        ids = plain.tokenizer_2(plain.maybe_convert_prompt(PROMPT, plain.tokenizer_2), return_tensors="pt").input_ids
        end = int((ids[0] == plain.tokenizer_2.eos_token_id).nonzero()[0])
        with torch.inference_mode():
            padded = torch.nn.functional.pad(ids, (0, 77 - ids.shape[1]), value=plain.tokenizer_2.pad_token_id)
            state = plain.text_encoder_2(padded).last_hidden_state[:, end]
            pooled = plain.text_encoder_2.text_projection(state)
        assert (found[2] - pooled).norm() / pooled.norm() <= LIMIT
        with pytest.raises(AdapterError, match="text_encoder gets no vectors of it"):
            pipe.load_textual_inversion(parts[0], token="other")
        pipe.load_textual_inversion(parts[0], token="other", text_encoder=pipe.text_encoder_2)
    finally:
        close_engines(pipe)
