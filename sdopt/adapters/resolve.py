"""An adapter file against the layers of a bundle -> the pairs of matrices that its slots take."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from sdopt.adapters.adapter import Adapter, LowRank
from sdopt.adapters.adapter_file import AdapterFile
from sdopt.adapters.changes import Base, find_change
from sdopt.adapters.keys import LayerKind
from sdopt.adapters.low_rank import reduce_rank
from sdopt.adapters.match_layers import Layers, Match, bake_hint, keep_slots, match_layers
from sdopt.adapters.tensor_bytes import TensorReader, require_finite
from sdopt.errors import AdapterError
from sdopt.model.component import ComponentName

ERROR_LIMIT = 0.02
# Adapters that are loaded are held whole; larger ones are full differences, which are for baking.
_SIZE_LIMIT_BYTES = 4_000_000_000


def resolve_adapter(
    file: AdapterFile,
    layers: Layers,
    *,
    slots: Mapping[ComponentName, Collection[str]] | None,
    rank_limit: int | None,
    error_limit: float = ERROR_LIMIT,
    base: Base | None = None,
    name: str | None = None,
) -> Adapter:
    """fp32 pairs by layer, with all scales in `up`; `name` is the file's stem unless given.

    `layers` are all layers with a weight, with its shape; `slots` those that may be changed, None for all. What is not
    of low rank in the file is brought to `rank_limit` by its singular values. `base` holds the bundle's tensors by
    name, `LAYER.weight`, which only DoRA needs.

    Raises `AdapterError` where a layer of the file is not in the bundle or has no slot, its rank is above `rank_limit`,
    the error of a fit above `error_limit`, a bias or norm is changed, or a number is NaN or infinite.
    """
    matches = match_layers(file, layers)
    if slots is not None:
        matches = keep_slots(file, matches, slots)
    _require_matrices(file, matches)
    _require_rank(file, matches, rank_limit)
    if file.size_bytes > _SIZE_LIMIT_BYTES:
        raise AdapterError(
            f"{file.path.name} has {file.size_bytes / 1e9:.1f} GB, too many to load", hint=bake_hint(file)
        )
    found: dict[ComponentName, dict[str, LowRank]] = {}
    errors: dict[ComponentName, dict[str, float]] = {}
    with TensorReader(file.path) as reader:
        digest = reader.start_hash()
        for match in matches:
            pair, error = _find_pair(file, match, reader, base, rank_limit)
            if error is not None:
                _require_fit(file, match, error, error_limit, rank_limit)
                errors.setdefault(match.component, {})[match.layer] = error
            found.setdefault(match.component, {})[match.layer] = pair
        hashes = digest.result()
        return Adapter(name or file.path.stem, file.path, hashes.file, found, errors, hashes.tensors)


def _find_pair(
    file: AdapterFile, match: Match, reader: TensorReader, base: Base | None, rank_limit: int | None
) -> tuple[LowRank, float | None]:
    """The pair of a layer, and its error where it had to be fitted."""
    arrays = reader.read_layer(match.of_file)
    exact = _is_exact(match)
    if not exact:  # singular values of NaN would be an error of another kind
        require_finite(file.path, match.of_file.stem, arrays)
    difference = find_change(file, match, arrays, base)
    error = None
    if isinstance(difference, LowRank) and exact:
        up, down = difference.up, difference.down
    else:
        up, down, error = reduce_rank(difference, rank_limit)
    require_finite(file.path, match.of_file.stem, {"up": up, "down": down})
    return LowRank(down.reshape(down.shape[0], *match.shape[1:]), up), error


def _is_exact(match: Match) -> bool:
    """Whether the file has two matrices for the layer, which are taken as they are."""
    return match.of_file.kind is LayerKind.LOW_RANK and not match.of_file.is_decomposed


def _require_matrices(file: AdapterFile, matches: Sequence[Match]) -> None:
    other = [match for match in matches if "diff_b" in match.of_file.parts or len(match.shape) < 2]
    if other:
        many, first = f"{len(other)} {'bias or norm' if len(other) == 1 else 'biases or norms'}", other[0]
        raise AdapterError(
            f"{file.path.name} changes {many}, which no slot can hold, among them {first.component}'s {first.layer}",
            hint=bake_hint(file),
        )


def _require_rank(file: AdapterFile, matches: Sequence[Match], rank_limit: int | None) -> None:
    if rank_limit is None:
        return
    exact = [match for match in matches if _is_exact(match)]
    rank = max((match.of_file.parts["down"].shape[0] for match in exact), default=0)
    if rank > rank_limit:
        many = sum(match.of_file.parts["down"].shape[0] > rank_limit for match in exact)
        raise AdapterError(
            f"{file.path.name} has rank {rank}, and the slots hold {rank_limit}: {many} of its {len(matches)} layers "
            "are above it",
            hint=f"build larger slots, sdopt convert MODEL --lora-slots all:{rank}, or {bake_hint(file)}",
        )


def _require_fit(file: AdapterFile, match: Match, error: float, limit: float, rank: int | None) -> None:
    if error > limit:
        raise AdapterError(
            f"{file.path.name} is not of low rank: at rank {rank} its change of {match.component}'s {match.layer} is "
            f"off by {error:.1%}, and the limit is {limit:.1%}",
            hint=bake_hint(file),
        )
