"""Models of transformers that are not what their configuration says: an error with the names, before anything grows."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from narrows.errors import InvalidArgument, NarrowsError
from narrows.hub.models import open_model
from narrows.hub.readers import open_language_model
from tests.hub.small_gguf import DEPTH, save_gguf
from tests.hub.small_models import save_transformers
from tests.test_weights import damaged

transformers = pytest.importorskip("transformers")


def save_language_model(folder: Path) -> str:
    """A Llama of two layers, with the tokenizer of the GGUF file."""
    parts: tuple[Any, Any] = open_language_model(save_gguf(folder / "small.gguf"))
    for part in parts:
        part.save_pretrained(folder)
    (folder / "small.gguf").unlink()
    return str(folder)


def change(folder: str, **values: Any) -> None:
    """Other values in a folder's configuration."""
    file = Path(folder, "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


FOLDERS: dict[str, tuple[Callable[[Path], str], Callable[[str], Any]]] = {
    "vision": (save_transformers, lambda folder: open_model(f"hf:{folder}")),
    "language": (save_language_model, open_language_model),
}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (1, r"as many layers as its configuration counts, got .*layers?\.1\..* and more besides"),
        (5, r"expected all weights of .* without .*layers?\.[2-4]\."),
        (10**9, r"no more layers than the [\d,]+ tensors of .*, got 1,000,000,000 layers"),
    ],
)
def test_another_depth_is_an_error_with_the_names(tmp_path: Path, kind: str, depth: int, message: str) -> None:
    save, open_folder = FOLDERS[kind]
    folder = save(tmp_path)
    open_folder(folder)
    change(folder, num_hidden_layers=depth)
    with pytest.raises(InvalidArgument, match=message):
        open_folder(folder)


@pytest.mark.parametrize("depth", [0, 1, 3, 2**31])
def test_another_depth_of_a_gguf_file_is_an_error(tmp_path: Path, depth: int) -> None:
    file = save_gguf(tmp_path / "model.gguf")
    content, key = file.read_bytes(), b"llama.block_count" + struct.pack("<I", 4)
    assert content.count(key + struct.pack("<I", DEPTH)) == 1
    file.write_bytes(content.replace(key + struct.pack("<I", DEPTH), key + struct.pack("<I", depth)))
    with pytest.raises(InvalidArgument, match=rf"as many layers as the header of .* counts, {depth:,}, got 2. It may"):
        open_language_model(file)


def test_a_damaged_gguf_file_gives_a_model_of_its_shapes_or_an_error_in_words(tmp_path: Path) -> None:
    content = save_gguf(tmp_path / "whole.gguf").read_bytes()
    expected = open_language_model(tmp_path / "whole.gguf")[0].state_dict()
    file, refused = tmp_path / "model.gguf", list[str]()
    for number in range(60):
        file.write_bytes(damaged(content, number))
        try:
            found = open_language_model(file)[0].state_dict()
        except NarrowsError as error:
            refused.append(str(error))
        else:  # the format has no checksum: where only numbers were hit, nothing tells
            assert {name: value.shape for name, value in found.items()} == {
                name: value.shape for name, value in expected.items()
            }, number
            assert all(value.dtype == torch.float32 for value in found.values())
    assert len(refused) > 30
    assert all(len(message) < 600 and "model.gguf" in message for message in refused)
