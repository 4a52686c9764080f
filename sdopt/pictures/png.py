"""Pictures on disk: PNG files that say how they were drawn, and the way back from a file to the request.

Two texts are in a file: `parameters`, which other programs read, and `sdopt`, a JSON recipe, which sdopt
reads back.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import threading
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sdopt._version import __version__
from sdopt.disk.files import disk_errors, write_file
from sdopt.errors import ArtifactError, UsageError
from sdopt.model.lora import LoraUse, WordUse
from sdopt.model.request import TASKS, DrawRequest
from sdopt.pictures.infotext import format_infotext, parse_infotext

if TYPE_CHECKING:
    from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_KEY = "sdopt"
_TEXT_LIMIT_BYTES = 1 << 20
_CHUNK_LIMIT = 100_000
_SLUG_CHARACTERS = 60
_NUMBERED = re.compile(r"(\d{5,9})-")


class PictureRecipe(BaseModel):
    """How a picture was drawn. Without `bundle_sha256`, another program drew it and only its settings are
    known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    sdopt: str = ""
    bundle: str = ""
    bundle_sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    request: DrawRequest
    loras: tuple[LoraUse, ...] = ()
    """What acted on the picture, with the digests of the files: of the request's list, then of its prompt."""
    embeddings: tuple[WordUse, ...] = ()
    """The words that its prompts could have, with the digests of the files."""
    proposed: str = ""
    """What of the request was taken from a few-step model or LoRA, in a sentence."""


def write_picture(
    output: Path, image: Image.Image, recipe: PictureRecipe, *, sampler: str, model_hash: str = ""
) -> Path:
    """Write the picture and return its path; nothing is ever overwritten.

    `output` is the .png file to write, or an existing folder, in which it is `00001-seed-slug.png` under the next free
    number. The file appears whole or not at all. Raises `UsageError` for a file that exists, `MissingHardware` for a
    full disk, `ArtifactError` where it cannot be written.
    """
    data = _encode(image, recipe, sampler, model_hash)
    one_file = not output.is_dir()
    folder = output.parent if one_file else output
    with disk_errors(folder):
        taken = [int(match[1]) for path in folder.iterdir() if (match := _NUMBERED.match(path.name))]
    number = 1 + max(taken, default=0)
    temporary = folder / f".{os.getpid()}-{threading.get_ident()}-{number}.png"
    write_file(temporary, data)
    try:
        while True:
            name = f"{number:05d}-{recipe.request.seed}-{_slug(recipe.request.prompt)}.png"
            path = output if one_file else folder / name
            with contextlib.suppress(FileExistsError), disk_errors(path):
                _publish(temporary, path)
                return path
            if one_file:
                raise UsageError(f"{path} exists, and pictures are never overwritten", hint="choose another name")
            number += 1
    finally:
        temporary.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path) -> None:
    """Give a file its name. Raises `FileExistsError` where it is taken, also by a process that counted at the
    same time.
    """
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError:
        # Some file systems have no links. A rename would overwrite, so there the check comes first.
        if path.exists():
            raise FileExistsError(path) from None
        temporary.rename(path)


def read_recipe(path: Path, *, scheduler: str | None = None) -> PictureRecipe:
    """How a picture was drawn, from its own text or, failing that, from A1111's with `scheduler` for the sampler.

    Raises `UsageError` for a file that is not a PNG or says nothing, `ArtifactError` for one that is damaged or
    of a newer sdopt.
    """
    texts = _read_texts(path)
    if _KEY in texts:
        return _parse_recipe(path, texts[_KEY])
    if "parameters" not in texts:
        raise UsageError(
            f"{path} does not say how it was drawn",
            hint="many programs strip such text; take the original file",
        )
    return PictureRecipe(request=parse_infotext(texts["parameters"], scheduler=scheduler))


def _parse_recipe(path: Path, text: str) -> PictureRecipe:
    try:
        return PictureRecipe.model_validate_json(text)
    except UsageError as error:
        raise ArtifactError(
            f"{path}: its recipe is not one that this sdopt can follow: {error.message}",
            hint="pip install --upgrade sdopt",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in TASKS) or "recipe"
        raise ArtifactError(
            f"{path}: its recipe is damaged or of a newer sdopt: {where}: {first['msg']}",
            hint="pip install --upgrade sdopt",
        ) from error


def _encode(image: Image.Image, recipe: PictureRecipe, sampler: str, model_hash: str) -> bytes:
    from PIL.PngImagePlugin import PngInfo

    infotext = format_infotext(
        recipe.request, size_px=image.size, sampler=sampler, model=recipe.bundle, model_hash=model_hash,
        version=f"sdopt {__version__}", loras=recipe.loras,
    )  # fmt: skip
    texts = PngInfo()
    # PIL writes tEXt, and iTXt (UTF-8) where Latin-1 does not have a character.
    texts.add_text("parameters", infotext)
    texts.add_text(_KEY, recipe.model_dump_json())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=texts)
    return buffer.getvalue()


def _slug(prompt: str) -> str:
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:_SLUG_CHARACTERS].strip("-") or "picture"


def _read_texts(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            if file.read(len(_SIGNATURE)) != _SIGNATURE:
                raise UsageError(f"{path} is not a PNG file")
            return dict(_texts_of(path, file))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _texts_of(path: Path, file: BinaryIO) -> Iterator[tuple[str, str]]:
    """The texts of a PNG, read chunk by chunk: pixels are skipped, lengths and checksums are checked."""
    for _ in range(_CHUNK_LIMIT):
        header = file.read(8)
        if len(header) < 8:
            raise ArtifactError(f"{path} is a truncated PNG file")
        length, kind = struct.unpack(">I4s", header)
        if kind == b"IEND":
            return
        if kind not in (b"tEXt", b"iTXt"):
            file.seek(length + 4, os.SEEK_CUR)
            continue
        if length > _TEXT_LIMIT_BYTES:
            raise ArtifactError(
                f"{path} has a text of {length} bytes, and {_TEXT_LIMIT_BYTES} are the most that is read"
            )
        data, checksum = file.read(length), file.read(4)
        if len(checksum) < 4 or struct.pack(">I", zlib.crc32(kind + data)) != checksum:
            raise ArtifactError(f"{path} is a damaged PNG file: the checksum of its text is wrong")
        if text := _decode_text(path, kind, data):
            yield text
    raise ArtifactError(f"{path} has more parts than any picture")


def _decode_text(path: Path, kind: bytes, data: bytes) -> tuple[str, str] | None:
    key, separator, value = data.partition(b"\0")
    try:
        if kind == b"tEXt":
            return key.decode("latin-1"), value.decode("latin-1")
        # iTXt: flag and method of compression, language, translated key, text.
        compressed, _language, _translated, text = value[:1] != b"\0", *value[2:].split(b"\0", 2)
        if compressed:
            inflate = zlib.decompressobj()
            text = inflate.decompress(text, _TEXT_LIMIT_BYTES)
            if inflate.unconsumed_tail:
                raise ArtifactError(f"{path} has a compressed text of more than {_TEXT_LIMIT_BYTES} bytes")
        return (key.decode("latin-1"), text.decode()) if separator else None
    except (ValueError, zlib.error) as error:
        raise ArtifactError(f"{path} is a damaged PNG file: {error}") from error
