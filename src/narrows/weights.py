"""Weights in files: read within limits and without running code, put into modules all or none, written with a checksum.

Whatever came from somewhere else is opened here. A file that is damaged, cut off, of another format or made to do harm
is an error in words before memory is taken for it; nothing that a pickle names is ever imported or called.
"""

import copy
import hashlib
import json
import os
import pickletools
import stat
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from narrows.errors import InvalidArgument

CHECKSUM = "narrows_sha256"
"""Key of the checksum in the metadata of a safetensors file of ours, and in a configuration of ours."""

_OTHERS = {
    b"GGUF": "a GGUF file, which llama.cpp reads",
    b"\x89HDF": "an HDF5 file, as Keras writes it",
    b"\x93NUM": "an array of NumPy",
    b"vers": "text: perhaps a pointer of Git LFS, whose file has not been fetched (git lfs pull)",
    b"<!DO": "a web page: the download went wrong",
    b"<htm": "a web page: the download went wrong",
}
_SAFETENSORS_HEADER, _CONFIG_SIZE = 100 * 2**20, 2**20
_DEPTH = 4
"""How deep dictionaries may be nested in a checkpoint for their tensors to be found."""
_NAMED = 4
"""Parameters that a complaint names of each kind."""
_CHUNK = 2**20
_lock = Lock()


class Ignored:
    """Stands for an object of any class that a checkpoint holds beside its weights. It does nothing."""

    name = ""

    def __new__(cls, *_: Any) -> "Ignored":
        """Takes whatever the class would have been called with."""
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def check_file(path: str | Path, *, argument: str, expected: str) -> int:
    """The size of an ordinary file that can be read.

    Raises:
        InvalidArgument: nothing there, a folder, a pipe or a device, no permission, or an empty file.
    """
    try:
        found = Path(path).stat()
        wrong = "which is empty" if found.st_size == 0 else None
        if stat.S_ISDIR(found.st_mode):
            wrong = "which is a folder"
        elif not stat.S_ISREG(found.st_mode):
            wrong = "which is no ordinary file"
        elif wrong is None and not os.access(path, os.R_OK):
            wrong = "which may not be read"
    except FileNotFoundError:
        wrong = "which does not exist"
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        wrong = f"which cannot be opened: {getattr(error, 'strerror', None) or error}"
    else:
        if wrong is None:
            return found.st_size
    raise InvalidArgument(argument, expected=expected, got=f"{str(path)!r}, {wrong}")


def read_file(path: str | Path, *, argument: str = "checkpoint") -> Mapping[Any, Any]:
    """What is in a safetensors file, or in one of `torch.save`; objects that are no tensors become `Ignored`.

    The format is told by the content. A checksum that is there has to be right.

    Raises:
        InvalidArgument: no such file, another format, a file that is damaged, or one that claims to hold more than it
            is long.
    """
    size = check_file(path, argument=argument, expected="a file with weights")
    expected = "safetensors, or what torch.load reads with weights_only=True"
    try:
        with Path(path).open("rb") as file:
            start = file.read(9)
            if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= min(size - 8, _SAFETENSORS_HEADER):
                found = _read_safetensors(path)
            elif start.startswith((b"PK\x03\x04", b"\x80")):
                found = _read_torch(file, size)
            else:
                what = _OTHERS.get(start[:4], "something else, a damaged file or a download that was cut off")
                raise ValueError(what)
    except Exception as error:  # a damaged file makes its readers raise anything
        reason = str(error).strip().partition("\n")[0].partition(". ")[0][:160] or type(error).__name__
        raise InvalidArgument(argument, expected=expected, got=f"{str(path)!r}: {reason}") from error
    if isinstance(found, Mapping):
        return found
    kind = found.name if isinstance(found, Ignored) else type(found).__name__
    got = f"an object of class {kind} in {str(path)!r}"
    raise InvalidArgument(argument, expected="tensors by name", got=got, hint="Save module.state_dict().")


def _read_safetensors(path: str | Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:  # pyright: ignore[reportPrivateImportUsage]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        written = (file.metadata() or {}).get(CHECKSUM)
    if written is not None and written != checksum(tensors):
        raise ValueError("its weights are not those that were written into it (the checksum differs)")
    return tensors


def _read_torch(file: BinaryIO, size: int) -> Any:
    """Everything that `torch.load` takes for weights, and `Ignored` for the rest."""
    file.seek(0)
    if file.read(1) == b"P":
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(member.compress_type for member in members) or sum(member.file_size for member in members) > size:
                raise ValueError("its parts are larger than the file")
            if len(pickles := [member for member in members if member.filename.endswith("/data.pkl")]) != 1:
                raise ValueError("a ZIP archive without weights")
            for member in members:
                if member.CRC == 0:  # torch.save was told not to compute it
                    del member.CRC
                with archive.open(member) as part:
                    while part.read(_CHUNK):  # raises where a checksum is not that of the bytes
                        pass
            names = _names(archive.open(pickles[0]))
    else:
        file.seek(0)
        names = set[str]().union(*(_names(file) for _ in range(5)))  # magic number, version, system, object, storages
    if "builtins.bytearray" in names:
        raise ValueError("it asks for memory that no weights need (bytearray)")
    file.seek(0)
    known = {"collections.OrderedDict", "collections.Counter", "_codecs.encode", "builtins.set", "builtins.complex"}
    others: Any = [
        (type("Ignored", (Ignored,), {"name": name}), name)
        for name in names - known
        if not name.startswith("torch.distributed.")
    ]
    with _lock, torch.serialization.safe_globals(others):
        return torch.load(file, "cpu", weights_only=True)


def _names(pickle: Any) -> set[str]:
    """What a pickle names: classes and functions."""
    found = set[str]()
    for code, argument, _ in pickletools.genops(pickle):
        if code.name == "GLOBAL":
            found.add(".".join(str(argument).split(" ", 1)).replace("__builtin__.", "builtins."))
        elif code.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"a pickle that torch.save did not write ({code.name})")
    return found


def tensors_in(found: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Every tensor of nested dictionaries by its path: {"model": {"weight": ...}} gives "model.weight"."""

    def walk(mapping: Mapping[Any, Any], path: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        seen.add(id(mapping))
        for key, value in mapping.items():
            if isinstance(key, str) and isinstance(value, Tensor):
                yield path + key, value
            elif isinstance(key, str) and isinstance(value, Mapping) and depth and id(value) not in seen:
                yield from walk(value, f"{path}{key}.", depth - 1)

    seen: set[int] = set()
    return dict(walk(found, "", _DEPTH))


def load_strictly(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    argument: str = "checkpoint",
    names: Mapping[str, str] | None = None,
    where: str = "",
    assign: bool = False,
) -> None:
    """Put every weight into a module: all that it has, and no others, or none.

    Args:
        module: any module; parameters and buffers keep their dtype and device, unless `assign`.
        weights: by the names that `module.state_dict()` has.
        argument: what messages call the weights.
        names: under which names they came, for messages, where those are others.
        where: the file, for messages.
        assign: the module gets a copy of every weight as it is, with its dtype and device.

    Raises:
        InvalidArgument: names every weight that is missing, left over, of another shape or of another kind of number.
    """
    check_fits(module, weights, argument=argument, names=names, where=where)
    module.load_state_dict({n: value.clone() for n, value in weights.items()} if assign else weights, assign=assign)


def check_fits(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    argument: str = "checkpoint",
    names: Mapping[str, str] | None = None,
    where: str = "",
) -> None:
    """Raise as `load_strictly` does, and load nothing."""
    wrong = misfits(module.state_dict(), weights, names or {})
    if wrong and not _converts(module, weights):
        raise InvalidArgument(
            argument,
            expected=f"the parameters of a {type(module).__name__}, all of them and no others",
            got=", ".join(wrong) + (f" in {where!r}" if where else ""),
        )


def _converts(module: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Whether hooks of the module, which read what earlier versions wrote, make these its weights."""
    own = module.state_dict()
    if any(name in own and kind_of(value) != kind_of(own[name]) for name, value in weights.items()):
        return False
    empty: dict[int, Any] = {
        id(p): torch.empty_like(p, device="meta") for p in [*module.parameters(), *module.buffers()]
    }
    memo = {key: nn.Parameter(value) if value.is_floating_point() else value for key, value in empty.items()}
    try:
        copy.deepcopy(module, memo).load_state_dict({name: value.to("meta") for name, value in weights.items()})
    except Exception:  # hooks trust what they are given
        return False
    return True


def misfits(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], names: Mapping[str, str]) -> list[str]:
    """What is wrong with weights for a module, in words: missing, of another shape or kind of number, left over."""
    missing = [f"no {name}" for name in expected if name not in weights]
    shapes, kinds, more = [], [], []
    for name, value in weights.items():
        theirs = names.get(name, name)
        own = expected.get(name)
        if own is None:
            more.append(f"also {theirs}")
        elif value.shape != own.shape:
            shapes.append(f"{theirs} of shape {tuple(value.shape)} in place of {tuple(own.shape)}")
        elif kind_of(value) != kind_of(own):
            kinds.append(f"{theirs} of {kind_of(value)} in place of {kind_of(own)}")
    return [*_some(missing), *_some(shapes), *_some(kinds), *_some(more)]


def kind_of(value: Tensor) -> str:
    """What a tensor is made of, where that matters: weights may change their precision, nothing else."""
    if value.layout != torch.strided or value.is_quantized:
        return f"{value.layout} numbers" if not value.is_quantized else "quantised numbers"
    if value.is_floating_point():
        return "floating-point numbers"
    return "complex numbers" if value.is_complex() else "truth values" if value.dtype == torch.bool else "integers"


def _some(complaints: Sequence[str]) -> list[str]:
    """The first complaints, and how many more there are."""
    left = len(complaints) - _NAMED
    return [*complaints[:_NAMED], *([f"and {left} more like it"] if left > 0 else [])]


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name!r} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_safetensors(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors with their checksum; tensors that share memory are written each by itself."""
    seen = set[int]()
    state: dict[str, Tensor] = {}
    for name, value in tensors.items():
        value = value.detach().cpu()
        pointer = value.untyped_storage().data_ptr()
        shared = value.numel() > 0 and pointer in seen
        state[name] = value.clone(memory_format=torch.contiguous_format) if shared else value.contiguous()
        seen.add(pointer)
    save_file(state, path, metadata={"format": "pt", CHECKSUM: checksum(state)})


def read_config(
    path: str | Path, known: Collection[str] | None = None, *, argument: str = "config.json"
) -> dict[str, Any]:
    """A configuration in JSON, without its checksum.

    Args:
        path: the file.
        known: the keys that it may have; None for any.
        argument: what messages call it.

    Raises:
        InvalidArgument: no such file, no JSON object, an unknown key, or one that was changed after it was written.
    """
    size = check_file(path, argument=argument, expected="a configuration in JSON")
    if size > _CONFIG_SIZE:
        raise InvalidArgument(argument, expected=f"at most {_CONFIG_SIZE:,} bytes of JSON", got=f"{size:,} in {path}")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise InvalidArgument(argument, expected="a configuration in JSON", got=f"{str(path)!r}: {error}") from error
    if not isinstance(found, dict):
        raise InvalidArgument(argument, expected="a JSON object", got=f"a {type(found).__name__} in {str(path)!r}")
    written = found.pop(CHECKSUM, None)
    if written is not None and written != _config_checksum(found):
        raise InvalidArgument(
            argument,
            expected="the configuration that was written with the weights",
            got=f"another one in {str(path)!r} (the checksum differs)",
            hint=f"If you changed it on purpose, remove {CHECKSUM!r} from it; else copy or download it again.",
        )
    if known is not None and (unknown := [key for key in found if key not in known]):
        got = f"{', '.join(map(repr, unknown[:_NAMED]))} in {str(path)!r}"
        raise InvalidArgument(argument, expected=f"keys among {', '.join(sorted(known))}", got=got)
    return found


def config_text(config: Mapping[str, Any]) -> str:
    """A configuration as JSON, with its checksum; `read_config` reads it."""
    entries = json.loads(json.dumps(config))
    return json.dumps({**entries, CHECKSUM: _config_checksum(entries)}, sort_keys=True, indent=2) + "\n"


def _config_checksum(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
