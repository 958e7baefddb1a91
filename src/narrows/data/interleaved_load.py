"""One entry to every kind of interleaved documents: `load_interleaved`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from narrows.data.interleaved import InterleavedSet
from narrows.data.interleaved_digits import DigitPrompts
from narrows.errors import DataError, InvalidArgument, MissingExtra

HELD_OUT_SHARE = 0.05
HELD_OUT_NAMES = ("val", "valid", "validation", "test")


@dataclass(frozen=True)
class InterleavedData:
    """Documents to train on and documents to judge by.

    Args:
        name: "digits", or where they are.
        train: what is trained on.
        held_out: what is judged by; shares no document with `train`.
        held_out_rule: in words, which documents are held out.
    """

    name: str
    train: InterleavedSet
    held_out: InterleavedSet
    held_out_rule: str


def load_interleaved(
    data: str | Path = "digits", *, image_size: int = 32, channels: int = 3, seed: int = 0
) -> InterleavedData:
    """Documents of text and images.

    Args:
        data: "digits" (captions of digit scenes, no download), a `.jsonl` file, a `.tar` shard, or a folder of either.
            In a folder, what is called `val...`, `valid...`, `validation...` or `test...` is held out; otherwise a
            twentieth of the documents is, by a hash of where they stand.
        image_size: side of the square images.
        channels: 3, or 1 for grey images.
        seed: of the digit scenes.

    Raises:
        InvalidArgument: `data` does not exist or is of no such kind.
        DataError: documents that cannot be used, or too few of them.
    """
    if str(data) == "digits":
        sets = (DigitPrompts(split, size=image_size, channels=channels, seed=seed) for split in ("train", "held_out"))
        return InterleavedData("digits", *sets, held_out_rule="scenes of every fifth handwritten digit of each class")
    try:
        from narrows.data.interleaved_files import Record, StoredDocuments, read_jsonl, read_shards
    except ImportError as error:
        raise MissingExtra(error.name or "torchvision", extra="train", purpose="read images of a folder") from error

    def read(paths: Sequence[Path]) -> list[Record]:
        lines = [record for path in paths if path.suffix == ".jsonl" for record in read_jsonl(path)]
        return lines + read_shards(path for path in paths if path.suffix == ".tar")

    files = _files(Path(data))
    held_out_files = [file for file in files if file.stem.startswith(HELD_OUT_NAMES)]
    train = read([file for file in files if file not in held_out_files])
    if held_out_files:
        held_out, rule = read(held_out_files), f"the files {', '.join(file.name for file in held_out_files)}"
    else:
        ranked = sorted(train, key=lambda record: crc32(Path(record.row).name.encode()))
        count = max(1, round(HELD_OUT_SHARE * len(ranked)))
        held_out, train = ranked[:count], ranked[count:]
        rule = f"{HELD_OUT_SHARE:.0%} of the documents, chosen by a hash of where they stand"
    if not train or not held_out:
        raise DataError(f"{data}: {len(train)} documents to train on and {len(held_out)} to hold out; both need one.")
    sets = (StoredDocuments(records, image_size=image_size, channels=channels) for records in (train, held_out))
    return InterleavedData(str(data), *sets, held_out_rule=rule)


def _files(data: Path) -> list[Path]:
    expected = "'digits', a .jsonl file, a .tar shard, or a folder of them"
    if not data.exists():
        raise InvalidArgument("data", expected=expected, got=f"{str(data)!r}, which does not exist")
    files = sorted(data.iterdir()) if data.is_dir() else [data]
    found = [file for file in files if file.suffix in (".jsonl", ".tar")]
    if not found:
        raise InvalidArgument("data", expected=expected, got=f"{str(data)!r}, which is or holds none")
    return found
