"""CLIP's tokenizer for single files, which carry none: folders as transformers reads them, derived from the
merges.

The vocabulary follows from the merges: 256 byte characters, the same at a word's end, the merges in order,
two marks.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

from sdopt.checkpoint.cache import open_cache_folder
from sdopt.disk.digest import digest_of
from sdopt.disk.files import disk_errors, fsync_folder, write_file

VOCABULARY = 49408
END_OF_TEXT = "<|endoftext|>"
EXCLAMATION = "!"
_START_OF_TEXT = "<|startoftext|>"


def write_clip_tokenizer(pad_token: str) -> Path:
    """A folder with CLIP's tokenizer in the cache, written once. `pad_token` fills prompts up to 77 tokens.

    SD 1.x and SDXL's first encoder pad with the end of text, OpenCLIP's encoders with `!` (id 0).
    """
    merges = files("sdopt.checkpoint").joinpath("data/clip/merges.txt").read_text(encoding="utf-8")
    contents = {
        "merges.txt": merges,
        "vocab.json": json.dumps({token: i for i, token in enumerate(_list_tokens(merges))}, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(_configure(pad_token), indent=1),
        "special_tokens_map.json": json.dumps(_name_marks(pad_token), indent=1),
    }
    target = open_cache_folder("tokenizers") / digest_of(contents)[:32]
    if target.is_dir():
        return target
    with disk_errors(target):
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".tokenizer."))
        try:
            for name, text in contents.items():
                write_file(temporary / name, text.encode())
            temporary.chmod(0o755)
            try:
                os.rename(temporary, target)
            except OSError:
                # Another process was faster, and wrote the same.
                if not target.is_dir():
                    raise
            fsync_folder(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _list_tokens(merges: str) -> list[str]:
    characters = _byte_characters()
    merged = ["".join(line.split(" ")) for line in merges.splitlines()[1:]]
    ends = [character + "</w>" for character in characters]
    return [*characters, *ends, *merged, _START_OF_TEXT, END_OF_TEXT]


def _byte_characters() -> list[str]:
    """One visible character for each byte, as GPT-2 chose them: printable bytes stand for themselves, and
    come first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(others)]


def _name_marks(pad_token: str) -> dict[str, str]:
    return {
        "bos_token": _START_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": pad_token,
        "unk_token": END_OF_TEXT,
    }


def _configure(pad_token: str) -> dict[str, object]:
    return {
        "add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer", **_name_marks(pad_token),
    }  # fmt: skip
