"""Kernels that TensorRT-RTX compiled on this machine, kept on disk: the second start of a plan compiles none.

A file for each plan, GPU and driver, under sdopt's cache: SHA-256 of the content, then the content. What was torn or
changed never reaches the library, and is written anew. Losing a file costs the time to compile, and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path
from typing import Any

from sdopt.backends.cuda import GpuIdentity
from sdopt.disk.files import write_file
from sdopt.disk.store import cache_root
from sdopt.errors import SdoptError

_DIGEST_BYTES = 32


def runtime_cache_path(plan_sha256: str, gpu: GpuIdentity) -> Path:
    machine = re.sub(r"[^A-Za-z0-9.]+", "-", f"{gpu.name} {gpu.driver or 'unknown'}").strip("-")
    return cache_root() / "runtime-cache" / f"{plan_sha256}-{machine}"


class RuntimeCacheFile:
    """An `IRuntimeCache` and its file. The library itself refuses content of another version, GPU or driver."""

    def __init__(self, cache: Any, path: Path) -> None:
        self._cache, self._path = cache, path
        self._on_disk = b""
        content = _read_content(path)
        if content is not None and cache.deserialize(content):
            self._on_disk = hashlib.sha256(content).digest()

    def save(self) -> None:
        """Write what is in the cache, where it is not what the file has. A disk that cannot take it is no error."""
        content = bytes(self._cache.serialize())
        digest = hashlib.sha256(content).digest()
        if digest == self._on_disk:
            return
        with contextlib.suppress(OSError, SdoptError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._path, digest + content)
            self._on_disk = digest


def _read_content(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None
