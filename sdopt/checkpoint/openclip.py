"""Names of OpenCLIP's text transformer (SD 2.x, SDXL's second encoder) -> those of CLIP in transformers.

Its fused `in_proj` is q, k and v stacked by rows, so each is a sub-range of the same bytes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from sdopt.errors import CheckpointError
from sdopt.weights.safetensors_header import TensorRef

_ENDS = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias",
}  # fmt: skip
_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip
_BLOCK = re.compile(r"^transformer\.resblocks\.(\d+)\.(.+)$")
# The picture's half of CLIP, and what belongs to its training.
_NOT_TEXT = ("visual.", "logit_scale", "attn_mask", "transformer.text_model.", "transformer.embeddings.")
# SD 2.x files that were converted back from diffusers have lost the layer that is not used: 23 are all there
# is.
_SD2_WIDTH, _SD2_LAYERS = 1024, 23


def map_openclip(tensors: Mapping[str, TensorRef], *, projected: bool, where: str) -> dict[str, TensorRef]:
    """Tensors by the names of `CLIPTextModel` or, with `projected`, `CLIPTextModelWithProjection`.

    Without a projection it is SD 2.x, which conditions on the last but one layer: the last is left out, as in
    the published diffusers model, and the final norm follows the one before.
    """
    layers = 1 + max((int(found[1]) for key in tensors if (found := _BLOCK.match(key))), default=-1)
    if not layers:
        raise CheckpointError(f"{where}: the OpenCLIP text encoder has no layers")
    embedding = tensors.get("token_embedding.weight")
    complete = embedding is not None and embedding.shape[-1:] == (_SD2_WIDTH,) and layers == _SD2_LAYERS
    kept = layers if projected or complete else layers - 1
    mapped: dict[str, TensorRef] = {}
    for key, ref in tensors.items():
        block = _BLOCK.match(key)
        if block and int(block[1]) < kept:
            mapped.update(_map_layer(f"encoder.layers.{block[1]}", block[2], ref, where))
        elif key in _ENDS:
            mapped[_ENDS[key]] = ref
        elif key in ("text_projection", "text_projection.weight"):
            if projected:
                mapped["text_projection.weight"] = _transpose(ref, where) if key == "text_projection" else ref
        elif not block and not key.startswith(_NOT_TEXT):
            mapped[key] = ref
    return mapped


def _map_layer(layer: str, rest: str, ref: TensorRef, where: str) -> dict[str, TensorRef]:
    if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
        last = rest.rpartition("_")[2]
        return {
            f"{layer}.self_attn.{part}_proj.{last}": piece
            for part, piece in zip("qkv", _split_rows(ref, where), strict=True)
        }
    module, _, last = rest.rpartition(".")
    return {f"{layer}.{_LAYER.get(module, module)}.{last}": ref}


def _split_rows(ref: TensorRef, where: str) -> list[TensorRef]:
    if not ref.shape or ref.shape[0] % 3:
        raise CheckpointError(
            f"{where}: an attention's in_proj has the shape {list(ref.shape)}, which is not three of a kind"
        )
    shape = (ref.shape[0] // 3, *ref.shape[1:])
    third = ref.nbytes // 3
    return [dataclasses.replace(ref, shape=shape, offset_bytes=ref.offset_bytes + i * third) for i in range(3)]


def _transpose(ref: TensorRef, where: str) -> TensorRef:
    if len(ref.shape) != 2:
        raise CheckpointError(f"{where}: the text projection has the shape {list(ref.shape)}, and should be a matrix")
    return dataclasses.replace(ref, shape=ref.shape[::-1], transposed=True)
