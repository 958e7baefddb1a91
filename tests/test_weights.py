"""Files that were damaged, cut off, renamed or made to do harm: the same weights come out, or an error in words."""

import argparse
import io
import json
import os
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from narrows.checkpoints.files import read_weights
from narrows.errors import InvalidArgument, NarrowsError
from narrows.models import create_model, load_model
from narrows.weights import CHECKSUM, load_strictly, read_config, read_file, write_safetensors

SMALL = {
    "image_size": 16,
    "patch_size": 8,
    "channels": 1,
    "num_classes": 2,
    "dim": 8,
    "depth": 2,
    "heads": 2,
    "mlp_dim": 8,
}
WEIGHTS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "a.bias": torch.ones(3, dtype=torch.float16),
    "n": torch.tensor(3),
}


class Recipe:
    """Of a class that nobody else has."""

    def __init__(self) -> None:
        self.rate = 0.1


TRAINING: dict[str, Any] = {
    "state_dict": WEIGHTS,
    "args": argparse.Namespace(lr=0.1, device=torch.device("cpu")),
    "recipe": Recipe(),
    "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
    "folder": Path("runs"),
}


def damaged(content: bytes, number: int) -> bytes:
    """One of many ways to damage a file, most of them near its head, where formats keep what they are."""
    draw = random.Random(number)
    place = draw.randrange(min(len(content), 400) if number % 3 else len(content))
    kind = number % 7
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + content[place + 1 + draw.randrange(16) :]
    if kind == 2:
        return content[:place] + draw.randbytes(1 + draw.randrange(16)) + content[place:]
    changed = bytearray(content)
    if kind == 3:
        changed[place] ^= 1 << draw.randrange(8)
    elif kind == 4:
        changed[place] = draw.choice(b'09:{}[]",\x00\xff')
    elif kind == 5:
        changed[place : place + 8] = struct.pack("<Q", draw.choice((0, 2**31, 2**40, 2**63)))
    else:
        changed[place : place + 64] = bytes(64)
    return bytes(changed)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return sorted(found) == sorted(expected) and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items()
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A file of each format."""
    folder = tmp_path_factory.mktemp("formats")
    write_safetensors(WEIGHTS, folder / "ours.safetensors")
    torch.save(TRAINING, folder / "zip.ckpt")
    torch.save(WEIGHTS, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(WEIGHTS, folder / "theirs.safetensors")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "certain"),
    [("ours.safetensors", True), ("zip.ckpt", True), ("legacy.pth", False), ("theirs.safetensors", False)],
)
def test_a_damaged_file_gives_the_same_weights_or_an_error_in_words(
    files: dict[str, bytes], name: str, certain: bool, tmp_path: Path
) -> None:
    file, refused = tmp_path / name, list[str]()
    for number in range(150):
        file.write_bytes(damaged(files[name], number))
        try:
            found = read_weights(file)
        except NarrowsError as error:
            refused.append(str(error))
        else:
            assert same(found, WEIGHTS) or not certain, number
    assert len(refused) > 60
    assert all(len(message) < 500 and str(file) in message for message in refused)


def test_a_damaged_folder_gives_the_same_model_or_an_error_in_words(tmp_path: Path) -> None:
    model = create_model("vit_mini", **SMALL).eval()
    model.save_pretrained(tmp_path)
    config, images = (tmp_path / "config.json").read_bytes(), torch.randn(1, 1, 16, 16)
    expected, refused = model(images), list[str]()
    for number in range(70):
        (tmp_path / "config.json").write_bytes(damaged(config, number))
        try:
            found = load_model(tmp_path)
        except NarrowsError as error:
            refused.append(str(error))
        else:
            assert torch.equal(found(images), expected), number
    assert 0 < max(map(len, refused)) < 700


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "which is empty"),
        (b"GGUF\x03\x00\x00\x00\x00\x00", "a GGUF file, which llama.cpp reads"),
        (b"\x89HDF\r\n\x1a\n\x00\x00", "an HDF5 file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"PK\x03\x04 cut off", "not a zip file"),
        (struct.pack("<Q", 6 * 2**30) + b"{", "something else"),
    ],
)
def test_other_files_are_told_by_their_content(content: bytes, message: str, tmp_path: Path) -> None:
    for name in ("weights.safetensors", "weights.pth"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InvalidArgument, match=message):
            read_weights(tmp_path / name)


def test_the_content_says_what_a_file_is_and_not_its_name(files: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        assert same(read_weights(tmp_path / "pytorch_model.bin"), WEIGHTS), name


def test_what_is_no_ordinary_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    for path, message in (
        (tmp_path / "pipe.pth", "no ordinary file"),
        (Path("/dev/zero"), "no ordinary file"),
        (tmp_path, "which is a folder"),
        (tmp_path / "nowhere", "does not exist"),
        ("a\0b", "which cannot be opened"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            read_file(path)


def _bomb(reduced: tuple[Any, ...]) -> Any:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return reduced

    return Bomb()


_TOUCH: Callable[[str], str] = "open({!r}, 'w')".format


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_no_code_runs_from_a_pickle(legacy: bool, nested: bool, tmp_path: Path) -> None:
    trace = tmp_path / "it_ran"
    calls = (
        (os.system, (f"touch {trace}",)),
        (eval, (_TOUCH(str(trace)),)),
        (exec, (_TOUCH(str(trace)),)),
        (getattr, (Path, "touch")),
        (open, (str(trace), "w")),
        (__import__, ("antigravity",)),
        (pickle.loads, (pickle.dumps(_Touches(trace)),)),
        (torch.load, (str(trace),)),
        (bytearray, (10**12,)),
        (_Touches, (trace,)),
        (print, ("it ran",)),
        (io.open, (str(trace), "w")),
        (torch.hub.load, (str(tmp_path), "model")),
        (torch.Tensor, (10**13,)),
        (nn.Linear, (10**7, 10**7)),
    )
    for number, call in enumerate(calls):
        file = tmp_path / f"{number}.pth"
        bomb = _bomb(call)
        try:
            content = {"a": torch.ones(2), "args": [bomb]} if nested else bomb
            torch.save(content, file, _use_new_zipfile_serialization=not legacy)
        except (pickle.PicklingError, TypeError, AttributeError):  # some cannot be pickled so
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(InvalidArgument):
                read_file(file)
        assert not trace.exists(), call


class _Touches:
    """Leaves a trace when it is made or unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["trace"].touch()


def test_a_zip_that_grows_is_refused(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "fine.pth")
    with (
        zipfile.ZipFile(tmp_path / "fine.pth") as fine,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in fine.infolist():
            bomb.writestr(member.filename, bytes(2**24) if "data/0" in member.filename else fine.read(member))
    with pytest.raises(InvalidArgument, match="larger than the file"):
        read_file(tmp_path / "bomb.pth")


def test_objects_beside_the_weights_are_left_out(files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "run.ckpt").write_bytes(files["zip.ckpt"])
    found = read_file(tmp_path / "run.ckpt")
    assert found["args"].name == "argparse.Namespace"
    assert found["recipe"].name.endswith("Recipe")
    torch.save({"model": Recipe()}, tmp_path / "whole.pth")
    with pytest.raises(InvalidArgument, match=r"'model' of class .*Recipe, which weights_only=True leaves out"):
        read_weights(tmp_path / "whole.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("head.bias"), "no head.bias"),
        (lambda w: w.update({"head.bais": w.pop("head.bias")}), "no head.bias, also head.bais"),
        (lambda w: w.update({"more": torch.ones(1)}), "also more"),
        (lambda w: w.update({"head.weight": w["head.weight"].T.contiguous()}), r"head.weight of shape \(8, 2\)"),
        (lambda w: w.update({"head.weight": w["head.weight"].int()}), "head.weight of integers in place of floating"),
        (lambda w: w.update({"head.weight": w["head.weight"] + 0j}), "head.weight of complex numbers"),
        (lambda w: [w.update({f"m.{n}": w.pop(n)}) for n in list(w)], r"and \d+ more like it"),
    ],
)
def test_a_saved_model_opens_with_all_of_its_weights_or_not_at_all(
    change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    create_model("vit_mini", **SMALL).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InvalidArgument, match=f"weights: expected the parameters of a ViT.*{message}"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"depth": 3}, "no blocks.2"),
        ({"depth": 1}, "also blocks.1"),
        ({"depth": 10**9}, "depth: expected a number up to"),
        ({"dim": 10**9}, "dim: expected a number up to"),
        ({"image_size": 10**9}, "image_size: expected a number up to"),
        ({"dim": "8"}, "expected"),
        ({"dropout": "high"}, "expected"),
        ({"heads": None}, "expected"),
        ({"droput": 0.1}, "config.json: expected keys among .*got 'droput'"),
        ({"architecture": "SepViT"}, "expected keys among"),
    ],
)
def test_a_configuration_that_was_changed_is_not_built(entries: dict[str, Any], message: str, tmp_path: Path) -> None:
    create_model("vit_mini", **SMALL).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | entries))
    with pytest.raises(InvalidArgument, match=r"checksum differs.*remove 'narrows_sha256'"):
        load_model(tmp_path)
    del config[CHECKSUM]
    file.write_text(json.dumps(config | entries))
    with pytest.raises(NarrowsError, match=message):
        load_model(tmp_path)
    file.write_text(json.dumps(config))
    assert load_model(tmp_path).training is False


def test_a_configuration_is_one_json_object_of_reasonable_size(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for content, message in (("[1]", "a JSON object"), ("{", "in JSON"), ("[" * 10**5, "in JSON"), ("\xff", "in JSON")):
        file.write_bytes(content.encode("latin-1"))
        with pytest.raises(InvalidArgument, match=message):
            read_config(file)
    file.write_text(" " * 2**21)
    with pytest.raises(InvalidArgument, match="at most"):
        read_config(file)


def test_weights_change_their_precision_and_nothing_else() -> None:
    linear = nn.Linear(4, 3)
    load_strictly(linear, {"weight": torch.ones(3, 4, dtype=torch.bfloat16), "bias": torch.ones(3).double()})
    assert (linear.weight.dtype, linear.bias.dtype) == (torch.float32, torch.float32)
    before = linear.weight.clone()
    with pytest.raises(InvalidArgument, match=r"bias of torch.sparse_coo numbers"):
        load_strictly(linear, {"weight": torch.zeros(3, 4), "bias": torch.ones(3).to_sparse()})
    assert torch.equal(linear.weight, before)


def test_shared_and_strided_tensors_are_written_as_they_are_read(tmp_path: Path) -> None:
    whole = torch.randn(4, 6)
    given = {
        "whole": whole,
        "again": whole,
        "part": whole[:, ::2],
        "empty": torch.zeros(0, 3),
        "one": torch.tensor(2.0),
    }
    write_safetensors(given, tmp_path / "a.safetensors")
    assert same(dict(read_file(tmp_path / "a.safetensors")), given)
