"""Strict loading of transformers' models, which by themselves draw missing weights at random and drop surplus ones."""

import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from narrows.errors import InvalidArgument

_GGUF_NAMES = 2**22
"""Bytes of a GGUF file in which the names of its tensors stand, behind the first of them."""
_UINT32 = 4
"""GGUF's number for the kind of a value."""


def check_claimed_layers(argument: str, config: Any, place: str | Path) -> None:
    """Raise where a configuration claims more layers than a folder has tensors: building them could take for ever.

    Args:
        argument: name of the argument that the error names.
        config: of transformers.
        place: a folder with safetensors; of others nothing is known before they are opened.

    Raises:
        InvalidArgument: it does.
    """
    files = sorted(Path(place).glob("*.safetensors")) if Path(place).is_dir() else []
    if not files:
        return
    try:
        tensors = sum(len(_names(file)) for file in files)
    except (OSError, SafetensorError):  # told by what reads the weights
        return
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        layers = getattr(part, "num_hidden_layers", 0)
        if isinstance(layers, int) and layers > tensors:
            expected = f"no more layers than the {tensors:,} tensors of {place}"
            raise InvalidArgument(argument, expected=expected, got=f"{layers:,} layers in its configuration")


def check_gguf_layers(argument: str, file: Path) -> None:
    """Raise where a GGUF file has another number of layers than it claims: transformers leaves out what is too much.

    Raises:
        InvalidArgument: it does, or it claims none.
    """
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        claimed, tensors = content.find(b".block_count"), content.find(b"blk.")
        claim = content[claimed : claimed + 20] if claimed >= 0 else b""
        names = content[tensors : tensors + _GGUF_NAMES] if tensors >= 0 else b""
    kind, layers = struct.unpack_from("<II", claim, 12) if len(claim) == 20 else (0, 0)
    if kind != _UINT32:
        raise InvalidArgument(argument, expected="a GGUF file that counts its layers", got=f"{file}, which does not")
    found = len(set(re.findall(rb"blk\.(\d{1,6})\.", names)))
    if layers != found:
        expected = f"as many layers as the header of {file} counts, {layers:,}"
        raise InvalidArgument(argument, expected=expected, got=f"{found:,}", hint="It may be cut off.")


def check_no_surplus_layers(argument: str, name: str, model: nn.Module, report: Mapping[str, Any]) -> None:
    """Raise where weights are left of layers that a model's configuration does not count.

    They are named like the model's own, but for their numbers.

    Args:
        argument: name of the argument that the error names.
        name: what the model was opened by.
        model: as transformers opened it.
        report: what `from_pretrained(..., output_loading_info=True)` gives beside it.

    Raises:
        InvalidArgument: there are some.
    """
    own = {_unnumbered(key) for key in model.state_dict()}
    surplus = [key for key in sorted(report["unexpected_keys"]) if re.search(r"\d", key) and _unnumbered(key) in own]
    if surplus:
        expected, got = "as many layers as its configuration counts", f"{name!r} with {few(surplus)} besides"
        raise InvalidArgument(argument, expected=expected, got=got)


def few(names: Sequence[str]) -> str:
    """The first four of some names, for an error."""
    return ", ".join(names[:4]) + (" and more" if len(names) > 4 else "")


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "0", name)
