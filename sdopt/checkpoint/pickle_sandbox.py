"""`.ckpt`, `.bin` and `.pt` files -> safetensors, read in a child process that can do no harm.

Four walls: torch's `weights_only` unpickler, which calls nothing but tensor constructors; limits of memory
and time; no network; an audit hook that refuses programs, sockets and every file but the one to write. The
parent unpickles nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from sdopt.checkpoint.cache import open_cache_folder
from sdopt.disk.files import disk_errors, fsync_folder, hash_file, require_free_disk
from sdopt.errors import CheckpointError, SdoptError, UnsafeInputError
from sdopt.model.precision import DType
from sdopt.processes.call import How, call
from sdopt.processes.channel import JsonTable
from sdopt.weights.dtypes import DTYPES
from sdopt.weights.safetensors_header import quantised_error, read_header
from sdopt.weights.tensor_kinds import advise, name_kind
from sdopt.weights.tensor_layout import plan_layout

# Address space: the libraries of a CUDA build of torch, and room for the file as it is mapped and as it is
# read.
_BASE_LIMIT_BYTES = 12 << 30
_LIMIT_PER_BYTE = 4
_SMALL_BYTES = 1 << 20
_BASE_TIMEOUT_S = 180.0
_SLOWEST_BYTES_PER_S = 10e6

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_REFUSED_EVENTS = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.startfile",
    "pty.", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink",
    "os.truncate", "os.kill", "os.putenv", "shutil.", "urllib.", "ftplib.", "smtplib.", "webbrowser.",
)  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# Trainers left objects of these libraries beside the weights of published checkpoints (Stable Diffusion 1.4
# has a callback of pytorch_lightning). They become empty objects: nothing of the libraries is imported or
# run.
_INERT_MODULES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.")
# Objects of Python's own that trainers keep beside the weights: settings, paths, counts, dates. They become empty
# objects as well: the named class is neither imported nor called.
_INERT_CLASSES = (
    "argparse.Namespace", "types.SimpleNamespace", "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath",
    "pathlib.PurePath", "pathlib.PurePosixPath", "pathlib.PureWindowsPath", "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath", "datetime.datetime", "datetime.date", "datetime.time", "datetime.timedelta",
    "datetime.timezone", "collections.UserDict", "collections.ChainMap",
    "uuid.UUID", "uuid.SafeUUID", "typing.Any", "decimal.Decimal", "fractions.Fraction",
    *(f"builtins.{name}" for name in ("set", "frozenset", "list", "dict", "int", "float", "str", "complex", "slice",
                                      "range", "bytearray")),
)  # fmt: skip
# torch fills nothing but a plain dict: what would be one with a default becomes that.
_INERT_DICTS = ("collections.defaultdict",)
_PYTHON_2 = {
    "__builtin__.xrange": "builtins.range", "__builtin__.": "builtins.",
    "UserDict.IterableUserDict": "collections.UserDict",
}  # fmt: skip
_INERT_LISTS = ("collections.deque",)
_PARAMETERS = "torch.nn.modules.container.ParameterDict"
# Packages whose names stand in files that torch wrote; one of any other is more than tensors.
_TORCHS_MODULES = ("torch.", "collections.", "_codecs.", "copyreg.")
_NEWEST_PROTOCOL = 2
_MOST_PICKLES = 5
_AGAIN = "download it again"
_REFUSED_BY_TORCH = (
    "Unsupported global",
    "Unsupported class",
    "Unsupported operand",
    "not an allowed global",
    "Trying to",
)


def convert_pickle(path: Path, *, of_word: bool = False) -> Path:
    """The same tensors as a safetensors file in the cache, by the pickle's SHA-256; converted once.

    With `of_word`, the vectors of a textual inversion: A1111 keeps them in a table below the others, and the word
    beside them, which `string_to_param/WORD` then names.

    Raises `UnsafeInputError` for a pickle that wants to run code (nothing of it has run), `CheckpointError`
    for one that is truncated or holds no tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", hint=_AGAIN)
    target = open_cache_folder("pickles") / f"{hash_file(path)}{'-word' if of_word else ''}.safetensors"
    if target.is_file():
        with contextlib.suppress(SdoptError):
            read_header(target)
            return target
    size_bytes = path.stat().st_size
    require_free_disk(target.parent, size_bytes)
    with disk_errors(target):
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".pickle.", suffix=".part")
        os.close(descriptor)
    temporary = Path(name)
    try:
        call(
            convert_in_sandbox,
            {"source": str(path.resolve()), "shown": str(path), "target": str(temporary), "of_word": of_word},
            timeout_s=_BASE_TIMEOUT_S + size_bytes / _SLOWEST_BYTES_PER_S,
            how=How.FRESH,
            memory_limit_bytes=_BASE_LIMIT_BYTES + _LIMIT_PER_BYTE * size_bytes,
        )
        read_header(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(target.parent)
    return target


def convert_in_sandbox(arguments: JsonTable) -> JsonTable:
    """The child's side: lock the process, read the pickle, write the tensors. Returns how many there were."""
    leave_network()
    import torch

    source, target = Path(arguments["source"]), Path(arguments["target"])
    # A late import would write its .pyc, and the hook would take that for the pickle's doing.
    sys.dont_write_bytecode = True
    with target.open("r+b") as file:
        sys.addaudithook(refuse_event)
        loaded = _load(torch, source, arguments["shown"])
        if arguments.get("of_word"):
            loaded = _lift_vectors(loaded)
        tensors = _find_tensors(loaded, torch, arguments["shown"])
        _check_size(tensors, source.stat().st_size, arguments["shown"])
        _write(torch, tensors, file, arguments["shown"])
    return {"tensors": len(tensors)}


def leave_network() -> bool:
    """Move this process into a network namespace without interfaces. False where the system does not allow
    it.

    Must come before threads start. Root needs no user namespace, and would lose its right to read others'
    files in one.
    """
    if sys.platform != "linux":
        return False
    unshare = ctypes.CDLL(None, use_errno=True).unshare
    return bool(unshare(_CLONE_NEWNET) == 0 or unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0)


def refuse_event(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook; it stays for the rest of the process. `open` has (path, mode, flags)."""
    if event.startswith(_REFUSED_EVENTS) or (event == "open" and int(arguments[2] or 0) & _WRITING):
        raise UnsafeInputError(f"the pickle made torch do {event}, which was refused", hint="do not use this file")


def _load(torch: Any, source: Path, shown: str) -> Any:
    import pickle

    try:
        with torch.serialization.safe_globals(_stand_in_for_trainers(torch, source)):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=_is_zip(source))
    except SdoptError:
        raise
    except pickle.UnpicklingError as error:
        if not any(sign in str(error) for sign in _REFUSED_BY_TORCH):
            raise CheckpointError(f"{shown} is damaged: {_first_reason(error)}", hint=_AGAIN) from error
        if "Unsupported operand" in str(error):
            _explain_operand(source, shown)
        raise UnsafeInputError(
            f"{shown} wants more than tensors: {_first_reason(error)}; nothing of it was run",
            hint="look for the same model as .safetensors; do not load this file with other programs",
        ) from error
    except Exception as error:  # a damaged file makes torch raise nearly anything
        raise CheckpointError(
            f"{shown} is truncated or not a checkpoint: {_first_reason(error)}", hint=_AGAIN
        ) from error


def _stand_in_for_trainers(torch: Any, source: Path) -> list[tuple[Any, str]]:
    """Empty classes for the trainer's and Python's classes that a file names, so that torch takes them for known."""

    class Inert:
        """Takes any arguments and any state, and does nothing."""

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __setstate__(self, _: object) -> None:
            pass

    class Parameters:
        """A `ParameterDict`, in which the first trainers of textual inversion kept vectors: its table alone."""

        def __setstate__(self, state: dict[str, Any]) -> None:
            self.parameters = state.get("_parameters")

    def plain_dict(*_: object) -> dict[Any, Any]:
        return {}

    def plain_list(*_: object) -> list[Any]:
        return []

    try:
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(source))
    except Exception:  # it reads only sound zip archives
        names = _survey_pickles(source).names
    # Python 2's names, which the protocol of torch's files keeps.
    for old, new in _PYTHON_2.items():
        names = {name.replace(old, new) for name in names}
    inert = [(Inert, name) for name in names if name.startswith(_INERT_MODULES) or name in _INERT_CLASSES]
    dicts = [(plain_dict, name) for name in names if name in _INERT_DICTS]
    tables = [(Parameters, name) for name in names if name == _PARAMETERS]
    return [*inert, *tables, *dicts, *((plain_list, name) for name in names if name in _INERT_LISTS)]


@dataclass
class _Survey:
    """What is in the pickles of a file: their protocol, None where there are none, and what they name."""

    protocol: int | None = None
    names: set[str] = field(default_factory=set)


def _survey_pickles(source: Path) -> _Survey:
    """The classes and functions that a file names: one pickle in an archive, a few behind each other in a file of
    before torch 1.6.

    Nothing is unpickled. What cannot be read is left to the loader, which says what is wrong.
    """
    survey = _Survey()
    with contextlib.suppress(Exception), _open_pickles(source) as file:
        for _ in range(_MOST_PICKLES):
            _survey_pickle(file, survey)
    return survey


def _open_pickles(source: Path) -> IO[bytes]:
    if not _is_zip(source):
        return source.open("rb")
    with zipfile.ZipFile(source) as archive:
        name = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
        return io.BytesIO(archive.read(name))


def _survey_pickle(file: IO[bytes], survey: _Survey) -> None:
    """Since protocol 4 a global's module and name are the two strings before it, which may be repeated ones."""
    import pickletools

    strings: list[Any] = ["", ""]
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO":
                survey.protocol = max(int(str(argument)), survey.protocol or 0)
            case "GLOBAL":
                survey.names.add(str(argument).replace(" ", "."))
            case "STACK_GLOBAL":
                survey.names.add(f"{strings[-2]}.{strings[-1]}")
            case "MEMOIZE":
                memo[len(memo)] = strings[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = strings[-1]
            case "BINGET" | "LONG_BINGET":
                strings.append(memo.get(argument))
            case name if "UNICODE" in name:
                strings.append(argument)


def _explain_operand(source: Path, shown: str) -> None:
    """Raise `CheckpointError` where torch refuses an operand of a pickle that asks for nothing but tensors."""
    survey = _survey_pickles(source)
    known = (*_TORCHS_MODULES, *_INERT_MODULES, *_INERT_CLASSES)
    if any(not name.startswith(known) for name in survey.names):
        return
    if survey.protocol is None:
        raise CheckpointError(f"{shown} is not a pickle that torch wrote", hint=_AGAIN)
    if survey.protocol > _NEWEST_PROTOCOL:
        raise CheckpointError(
            f"{shown}: its pickle has protocol {survey.protocol}, which is not read",
            hint="save it again with torch.save(..., pickle_protocol=2), if you trust where it comes from",
        )


def _is_zip(source: Path) -> bool:
    with source.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _first_reason(error: Exception) -> str:
    """torch explains at length how to switch its safety off: keep only what was wrong."""
    text = str(error) or type(error).__name__
    for line in text.replace(". ", "\n").splitlines():
        if any(sign in line for sign in _REFUSED_BY_TORCH):
            return line.strip()[:200]
    return text.strip().partition("\n")[0][:200]


def _lift_vectors(loaded: Any) -> Any:
    """A1111's table of vectors under the names that say whose word they are; anything else as it is."""
    table = loaded.get("string_to_param") if isinstance(loaded, dict) else None
    table = getattr(table, "parameters", table)
    if not isinstance(table, dict):
        return loaded
    name = loaded.get("name")
    own = isinstance(name, str) and len(table) == 1
    return {f"string_to_param/{name if own else key}": value for key, value in table.items() if isinstance(key, str)}


def _find_tensors(loaded: Any, torch: Any, shown: str) -> dict[str, Any]:
    table = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    tensors = {
        name: value
        for name, value in (table.items() if isinstance(table, dict) else ())
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if not tensors and isinstance(table, dict):
        names = [f"{key}.0.linear" if isinstance(key, int) else str(key) for key in table]  # a hypernetwork has numbers
        if kind := name_kind(names):
            raise CheckpointError(f"{shown} is {kind}, and not a Stable Diffusion checkpoint", hint=advise(kind))
    if not tensors:
        raise CheckpointError(f"{shown} holds no tensors by name", hint="sdopt reads checkpoints with a state_dict")
    return tensors


def _check_size(tensors: dict[str, Any], size_bytes: int, shown: str) -> None:
    """A small file may name a huge tensor (a repeated or compressed one): it must not fill the disk."""
    named_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if named_bytes > _LIMIT_PER_BYTE * size_bytes + _SMALL_BYTES:
        raise UnsafeInputError(f"{shown} has {size_bytes} bytes and names tensors of {named_bytes}", hint=_AGAIN)


def _write(torch: Any, tensors: dict[str, Any], file: IO[bytes], shown: str) -> None:
    """Write one tensor after the other: memory holds one, whatever the file's size."""
    # FP8 is of somebody else's quantisation.
    known = {getattr(torch, names.array): dtype for dtype, names in DTYPES.items() if dtype is not DType.FP8}
    odd = next((name for name, t in tensors.items() if t.dtype not in known or t.layout != torch.strided), None)
    if odd is not None and (tensors[odd].is_quantized or tensors[odd].dtype.itemsize == 1):
        raise quantised_error(shown, odd, str(tensors[odd].dtype).removeprefix("torch."))
    if odd is not None:
        raise CheckpointError(f"{shown}: tensor {odd!r} has the type {tensors[odd].dtype}, {tensors[odd].layout}")
    layout = plan_layout(Path(), {name: (known[t.dtype], tuple(t.shape)) for name, t in tensors.items()})
    file.write(layout.header)
    for name in sorted(layout.tensors, key=lambda name: layout.tensors[name].offset_bytes):
        flat = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8)
        file.write(memoryview(flat.numpy()))
    file.truncate()
    file.flush()
    os.fsync(file.fileno())
