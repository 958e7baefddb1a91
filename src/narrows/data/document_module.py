"""One entry to every kind of interleaved documents, `load_interleaved`, and their Lightning data module."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

from narrows.data.documents import END_OF_CHUNK, IMAGE, InterleavedCollate, InterleavedSet
from narrows.data.listing import part_called
from narrows.data.module import PositionedDataModule
from narrows.data.scene_documents import CHATS, load_scene_documents
from narrows.data.scenes import HELD_OUT_RULE
from narrows.errors import DataError, InvalidArgument, MissingExtra

HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class InterleavedData:
    """Documents to train on and documents to evaluate on.

    Args:
        name: "digits", or where they are.
        train: for training.
        held_out: for evaluation; shares no document with `train`.
        held_out_rule: which documents are held out, in words.
    """

    name: str
    train: InterleavedSet
    held_out: InterleavedSet
    held_out_rule: str


def load_interleaved(
    data: str | Path = "digits", *, image_size: int = 32, channels: int = 3, seed: int = 0, outside: bool = False
) -> InterleavedData:
    """Documents of text and images.

    Args:
        data: "digits" (captions of digit scenes, no download), "digit_chats" (conversations about them), "shape_chats"
            (scenes of coloured shapes, described in conversations), a `.jsonl` file, a `.tar` shard, or a folder of
            either. In a folder, what is called `val...`, `valid...`, `validation...` or `test...` is held out;
            otherwise a twentieth of the documents is, by a hash of file name and line or sample.
        image_size: side of the square images.
        channels: 3, or 1 for grey images.
        seed: of the digit scenes.
        outside: whether the images of a `.jsonl` file may stand outside its folder.

    Raises:
        InvalidArgument: `data` does not exist or is of another kind.
        DataError: malformed documents, or too few of them.
    """
    if str(data) == "digits" or str(data) in CHATS:
        sets = (
            load_scene_documents(str(data), split, size=image_size, channels=channels, seed=seed)
            for split in ("train", "held_out")
        )
        rule = "scenes of numbers of their own" if data == "shape_chats" else HELD_OUT_RULE
        return InterleavedData(str(data), *sets, held_out_rule=rule)
    try:
        from narrows.data.document_files import Record, StoredDocuments, read_jsonl, read_shards
    except ImportError as error:
        raise MissingExtra(error.name or "torchvision", extra="train", purpose="read images of a folder") from error

    def read(paths: Sequence[Path]) -> list[Record]:
        lines = [record for path in paths if path.suffix == ".jsonl" for record in read_jsonl(path, outside=outside)]
        return lines + read_shards(path for path in paths if path.suffix == ".tar")

    files = _files(Path(data))
    parts = {file: part_called(re.split(r"[\W\d_]", file.stem)[0]) for file in files}
    held_out_files = [file for file in files if parts[file] in ("validation", "test")]
    train = read([file for file in files if file not in held_out_files])
    if held_out_files:
        held_out, rule = read(held_out_files), f"the files {', '.join(file.name for file in held_out_files)}"
    else:
        ranked = sorted(train, key=lambda record: crc32(Path(record.row).name.encode()))
        count = max(1, round(HELD_OUT_SHARE * len(ranked)))
        held_out, train = ranked[:count], ranked[count:]
        rule = f"{HELD_OUT_SHARE:.0%} of the documents, chosen by a hash of file name and line or sample"
    if not train or not held_out:
        raise DataError(f"{data}: {len(train)} documents to train on and {len(held_out)} to hold out; both need one.")
    if not any(record.text.replace(IMAGE, "").strip() for record in train):
        raise DataError(f"{data}: all {len(train)} documents to train on are without text.")
    sets = (StoredDocuments(records, image_size=image_size, channels=channels) for records in (train, held_out))
    return InterleavedData(str(data), *sets, held_out_rule=rule)


def _files(data: Path) -> list[Path]:
    expected = "'digits', a .jsonl file, a .tar shard, or a folder of them"
    if not data.exists():
        raise InvalidArgument("data", expected=expected, got=f"{str(data)!r}, which does not exist")
    files = sorted(data.iterdir()) if data.is_dir() else [data]
    files = [file for file in files if not file.name.startswith(".")]
    found = [file for file in files if file.suffix in (".jsonl", ".tar") and file.is_file()]
    if not found:
        raise InvalidArgument("data", expected=expected, got=f"{str(data)!r}, which is or holds none")
    return found


class InterleavedDataModule(PositionedDataModule):
    """Interleaved text and images, in an order that is a pure function of (seed, epoch, position).

    Args:
        data: "digits", "digit_chats", "shape_chats", or where documents are: see
            `narrows.data.document_module.load_interleaved`.
        tokenizer: of the language model, from transformers; `narrows fit` takes the model's.
        image_size: side of the square images, as the vision encoder takes them; `narrows fit` asks the encoder.
        channels: 3, or 1 for grey images; likewise.
        image_token, end_of_chunk, max_tokens, max_images, mask_before_first_image, rest_weight: how documents become
            tokens and what is learned of them, see `InterleavedCollate`.
        batch_size: documents in a batch of one process.
        num_workers: worker processes that prepare documents; 0 prepares them in the training process.
        seed: of scenes and order.
        outside: whether the images of a `.jsonl` file may stand outside its folder.
    """

    def __init__(
        self,
        data: str = "digits",
        *,
        tokenizer: Any,
        image_size: int = 32,
        channels: int = 1,
        image_token: str = IMAGE,
        end_of_chunk: str = END_OF_CHUNK,
        max_tokens: int = 256,
        max_images: int | None = None,
        mask_before_first_image: bool = False,
        rest_weight: float = 0.0,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        outside: bool = False,
    ) -> None:
        collate = InterleavedCollate(
            tokenizer,
            image_token=image_token,
            end_of_chunk=end_of_chunk,
            max_tokens=max_tokens,
            max_images=max_images,
            mask_before_first_image=mask_before_first_image,
            rest_weight=rest_weight,
        )
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, collate=collate, kind="documents")
        self.data, self.image_size, self.channels, self.outside = data, image_size, channels, outside
        self.image_token, self.end_of_chunk = image_token, end_of_chunk

    @cached_property
    def loaded(self) -> InterleavedData:
        """The documents, listed on first access."""
        return load_interleaved(
            self.data, image_size=self.image_size, channels=self.channels, seed=self.seed, outside=self.outside
        )
