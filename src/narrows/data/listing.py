"""Which images a folder or a table holds, what their classes are, and which of them are held out."""

import hashlib
import logging
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePath

from narrows.data.decoding import EXTENSIONS, begins_like_an_image
from narrows.data.tables import Row, Table
from narrows.errors import DataError, InvalidArgument

log = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.2

PARTS = {
    "training": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "evaluation"),
}
"""What folders of training, validation and test images are called; `train_set`, `Val` and `test-images` count too."""

LISTED_FOLDERS = "links to folders that are listed already"

SYSTEM_NAMES = ("__macosx", "thumbs.db", "desktop.ini")

Place = Path | Row
"""Where a picture is: a file, or a row of a table."""

Sample = tuple[Place, int]


def printable(name: str) -> str:
    r"""A name in which what cannot be printed, control characters and bytes that are not UTF-8, is written as escapes.

    >>> print(printable("a\nb"))
    a\nb
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def part_called(name: str) -> str | None:
    """The part a folder or a file of this name holds, by its beginning up to numbers and words as in `train_set`.

    >>> part_called("Train-images"), part_called("val2017"), part_called("trains")
    ('training', 'validation', None)
    """
    word = re.sub(r"[\W\d_]*(set|data|dataset|images?|imgs?|split)?[\W\d_]*$", "", name.lower())
    return next((part for part, names in PARTS.items() if word in names), None)


@dataclass
class Tree:
    """The image files inside a folder.

    Args:
        root: the folder.
        files: image files, as the names that lead to them from `root`, in order.
        folders: folders, in the same way.
        left_out: by reason, paths inside `root` that are not among `files`.
    """

    root: Path
    files: list[tuple[str, ...]] = field(default_factory=list)
    folders: list[tuple[str, ...]] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def describe_left_out(self) -> str:
        """What was left out, counted, with examples; empty if nothing was."""
        counted = [
            f"{len(paths)} {reason} ({', '.join(map(printable, sorted(paths)[:3]))}{', ...' * (len(paths) > 3)})"
            for reason, paths in self.left_out.items()
        ]
        return "; ".join(counted)

    def leave_out(self, names: Iterable[tuple[str, ...]], reason: str) -> None:
        """Take these files out."""
        gone = set(names)
        if not gone:
            return
        self.files = [file for file in self.files if file not in gone]
        self.left_out[reason] += ["/".join(file) for file in gone]


def walk(root: Path) -> Tree:
    """The image files inside `root` at any depth, each of them once, with everything else counted.

    Files are known by their extension, or without one by their first bytes. Hidden files, what operating systems leave
    behind and the runs of narrows itself are left out. Links are followed, after everything that is no link; a folder
    or a file that is already listed, or a folder that holds `root`, is not listed through a link.
    """
    tree, seen = Tree(root), set[tuple[int, int]]()
    inside = os.path.realpath(root)
    folders: list[tuple[str, ...]] = [()]
    links: list[tuple[str, ...]] = []

    def add(names: tuple[str, ...], identity: tuple[int, int]) -> None:
        if identity in seen:
            tree.left_out["links to files that are listed already"].append("/".join(names))
        elif _is_image(root, names):
            seen.add(identity)
            tree.files.append(names)
        else:
            tree.left_out["files that are no images"].append("/".join(names))

    def open_folder(names: tuple[str, ...]) -> None:
        path = os.path.join(root, *names)
        try:
            status = os.stat(path)
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError:
            tree.left_out["folders that cannot be opened"].append("/".join(names))
            return
        identity = status.st_dev, status.st_ino
        if identity in seen or (names and inside.startswith(os.path.join(os.path.realpath(path), ""))):
            tree.left_out[LISTED_FOLDERS].append("/".join(names))
            return
        seen.add(identity)
        if names:
            tree.folders.append(names)
        inner: list[tuple[str, ...]] = []
        for entry in entries:
            child = (*names, entry.name)
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM_NAMES:
                tree.left_out["hidden and system files and folders"].append("/".join(child))
            elif entry.is_symlink():
                links.append(child)
            elif entry.is_dir(follow_symlinks=False):
                if _is_run(entry.path):
                    tree.left_out["runs of narrows"].append("/".join(child))
                else:
                    inner.append(child)
            elif entry.is_file(follow_symlinks=False):
                add(child, (status.st_dev, entry.inode()))
            else:
                tree.left_out["pipes, sockets and devices"].append("/".join(child))
        folders.extend(reversed(inner))  # the first is opened next

    while folders or links:
        if folders:
            open_folder(folders.pop())
            continue
        names = links.pop(0)
        try:
            status = os.stat(os.path.join(root, *names))
        except OSError:
            tree.left_out["broken links"].append("/".join(names))
            continue
        if stat.S_ISDIR(status.st_mode):
            folders.append(names)
        elif stat.S_ISREG(status.st_mode):
            add(names, (status.st_dev, status.st_ino))
        else:
            tree.left_out["pipes, sockets and devices"].append("/".join(names))
    tree.files.sort()
    return tree


@dataclass(frozen=True)
class LabelledImages:
    """The labelled images of a folder or of a table.

    Args:
        root: the folder, or what the table is called.
        classes: names of the classes; labels count in this order.
        training: training images, or all images where no part is held out.
        held_out: the images of the validation part and of the test part, by "validation" and "test".
        names: what the folders or splits of the parts are called, "training" among them; empty for `root` itself.
        left_out: what was left out, in words.
    """

    root: PurePath
    classes: tuple[str, ...]
    training: list[Sample]
    held_out: Mapping[str, list[Sample]]
    names: Mapping[str, str]
    left_out: str

    def describe(self, part: str) -> str:
        """The folder or the split of a part, in words."""
        name = self.names[part]
        return f"the folder {name or self.root.name}/" if isinstance(self.root, Path) else f"the split {name}"


def list_folder(root: Path) -> LabelledImages:
    """Classes and images of `root/<class>/<image>`, or of `root/train/<class>/<image>` with `val` and `test` beside it.

    Raises:
        DataError: no class folders, no images, a single class, a class that the training images do not have, or folders
            of which it cannot be told whether they are classes or parts.
    """
    tree = walk(root)
    parts = _parts(tree)
    training = [names for names in tree.files if names[: len(parts["training"])] == parts["training"]]
    depth = len(parts["training"]) + 1
    if not parts["training"]:
        held_out_folders = {folder for kind, folder in parts.items() if kind != "training"}
        training = [names for names in training if names[:1] not in held_out_folders]
    loose = [names for names in training if len(names) == depth]
    at = root.joinpath(*parts["training"])
    advice = f"Expected {at}/<class>/<image>, at least two classes, files ending in {', '.join(EXTENSIONS)}."
    if not any(len(folder) == depth for folder in tree.folders):
        raise DataError(f"{at} holds no class folders. {advice}")
    classes = sorted({names[depth - 1] for names in training if len(names) > depth})
    if not classes:
        raise DataError(f"{at}: no image in any class folder. {advice}")
    if len(classes) == 1:
        below = sorted({names[depth] for names in training if len(names) > depth + 1})
        hint = f" Did you mean {at / classes[0]}, which holds {', '.join(below[:4])}?" if len(below) > 1 else ""
        raise DataError(f"{at} holds a single class with images, {classes[0]!r}: nothing to tell apart. {advice}{hint}")
    tree.leave_out(loose, "images in no class folder")
    labels = {name: label for label, name in enumerate(classes)}
    held_out = {
        kind: _known(tree, folder, labels) for kind, folder in parts.items() if kind != "training"
    }  # fmt: skip
    return LabelledImages(
        root,
        tuple(map(printable, classes)),
        [(root.joinpath(*names), labels[names[depth - 1]]) for names in training if len(names) > depth],
        held_out,
        {kind: "/".join(folder) for kind, folder in parts.items()},
        tree.describe_left_out(),
    )


def list_table(table: Table) -> LabelledImages:
    """Classes and pictures of a table, by its columns of the types `Image` and `ClassLabel`.

    Splits are parts by the names that folders have (`train`, `validation`, `test`, ...); of a table with a single split
    all are training images. Classes are those of the training images.

    Raises:
        DataError: no such columns, or several; no split to train on, or two of one part; a single class; a class that
            the training images do not have.
    """
    parts = parts_of(table)
    column = table.column(parts["training"], "ClassLabel")
    classes = {part: table.classes(split) for part, split in parts.items()}
    trained = set(classes["training"])
    known = [str(name) for name in table.splits[parts["training"]].features[column].names if name in trained]
    if len(known) < 2:
        only = f"the single class {known[0]!r}" if known else "no row with a class"
        raise DataError(f"{table.root}, split {parts['training']}, holds {only}: nothing to tell apart.")
    labels = {name: label for label, name in enumerate(known)}
    samples: dict[str, list[Sample]] = {}
    left_out = [f"the split {split}" for split in table.splits if split not in parts.values()]
    for part, split in parts.items():
        found = [(row, name) for row, name in zip(table.rows(split), classes[part], strict=True) if name is not None]
        if unknown := sorted({name for _, name in found} - labels.keys()):
            raise DataError(
                f"{table.root}, split {split}, holds classes that the training images do not: "
                f"{', '.join(map(printable, unknown[:8]))}. Rename or remove them."
            )
        samples[part] = [(row, labels[name]) for row, name in found]
        if without := classes[part].count(None):
            left_out.append(f"{without:,} rows of the split {split} without a class")
    return LabelledImages(
        root=table.root,
        classes=tuple(map(printable, known)),
        training=samples.pop("training"),
        held_out={part: found for part, found in samples.items() if found},
        names=parts,
        left_out="; ".join(left_out),
    )


def split(samples: Sequence[Sample], *, root: PurePath, classes: Sequence[str]) -> tuple[list[Sample], list[Sample]]:
    """Training and held-out samples: a fifth is held out by the hash of the path inside `root`, or number of the row.

    An image thereby stays in its split when others are added or removed. Each class keeps at least one file in each
    split: the one with the smallest hash is held out, the one with the greatest trained on.

    Raises:
        DataError: a class with fewer than two images.
    """
    train: list[Sample] = []
    held_out: list[Sample] = []
    of_class: list[list[tuple[float, Place]]] = [[] for _ in classes]
    for path, label in samples:
        of_class[label].append((path_hash(path.parts[len(root.parts) :]), path))
    for label, (name, files) in enumerate(zip(classes, of_class, strict=True)):
        if len(files) < 2:
            raise DataError(
                f"{root}: class {name!r} has {len(files)} readable image(s) and needs at least 2, one to train on and "
                "one to hold out. Add images or remove the class."
            )
        files.sort()
        below = sum(value < HELD_OUT_SHARE for value, _ in files)
        count = min(max(below, 1), len(files) - 1)
        held_out += sorted((path, label) for _, path in files[:count])
        train += sorted((path, label) for _, path in files[count:])
    return train, held_out


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """The image files among these paths and in these folders at any depth, in a fixed order.

    Raises:
        InvalidArgument: a path that does not exist or is neither a file nor a folder, or no image file at all.
    """
    found: list[Path] = []
    left_out: list[tuple[Path, str]] = []
    for path in map(Path, paths):
        if path.is_dir():
            tree = walk(path)
            found += [path.joinpath(*names) for names in tree.files]
            left_out.append((path, tree.describe_left_out()))
        elif path.is_file():
            found.append(path)
        else:
            state = "is neither a file nor a folder" if path.exists() else "does not exist"
            raise InvalidArgument("images", expected="image files or folders", got=f"{path}, which {state}")
    if not found:
        raise InvalidArgument("images", expected=f"files ending in {', '.join(EXTENSIONS)}", got="none")
    for root, described in left_out:
        say_left_out(root, described)
    return found


def say_left_out(root: PurePath, described: str) -> None:
    """Say, once, what of a folder or a table was left out, in words; nothing of nothing."""
    if described:
        say_once(f"{printable(str(root))}: left out {described}")


@cache
def say_once(message: str) -> None:
    """Log a warning, the first time only."""
    log.warning("%s", message)


def _parts(tree: Tree) -> dict[str, tuple[str, ...]]:
    """By part, the folder that holds it; of "training", the root itself if there is no such folder.

    A folder that is called like a part is one if it holds class folders. Where that leaves several readings, this is an
    error.
    """
    root, of_part = tree.root, defaultdict[str, list[str]](list)
    holding = {names[0] for names in tree.files if len(names) > 1}
    deep = {names[0] for names in tree.files if len(names) > 2}
    below = [*tree.folders, *(tuple(path.split("/")) for path in tree.left_out.get(LISTED_FOLDERS, ()))]
    empty = {names[0] for names in below if len(names) > 1} - holding
    named = {name: part for name in holding | empty if (part := part_called(name)) is not None}
    for name in sorted(named.keys() & (deep | empty)):
        of_part[named[name]].append(name)
    for part, names in of_part.items():
        if len(names) > 1:
            raise DataError(f"{root}: {' and '.join(names)} are both folders of {part} images. Rename or remove one.")
    parts = {part: (names[0],) for part, names in of_part.items()}
    flat, classes = sorted(named.keys() - deep - empty), sorted(holding - named.keys())
    if "training" in parts:
        if classes and len(parts) == 1:
            raise DataError(
                f"{root} holds {of_part['training'][0]}/ with class folders, and beside it {', '.join(classes[:4])}: "
                "it cannot be told whether that is the training part or a class. Move one of them elsewhere."
            )
        beside = [names for names in tree.files if (names[0],) not in parts.values()]
        flat_files = [names for names in beside if names[0] in flat and len(names) > 1]
        tree.leave_out(flat_files, "images in a part without class folders, hence without labels")
        tree.leave_out(set(beside) - set(flat_files), "images outside of the parts")
        return parts
    if flat and not classes:
        raise DataError(
            f"{root}: {', '.join(f'{name}/' for name in flat)} hold images but no class folders. Expected "
            f"{root / flat[0]}/<class>/<image>."
        )
    if parts and not classes and not flat:
        (name, *_) = (folder[0] for folder in parts.values())
        raise DataError(f"{root} holds {name}/ but no train/. Expected {root}/train/<class>/<image> beside it.")
    return {"training": (), **parts}


def parts_of(table: Table) -> dict[str, str]:
    """The split of each part; of a table with a single one that is the training part."""
    if len(table.splits) == 1:
        return {"training": next(iter(table.splits))}
    of_part = defaultdict[str, list[str]](list)
    for split in table.splits:
        if (part := part_called(split)) is not None:
            of_part[part].append(split)
    for part, splits in of_part.items():
        if len(splits) > 1:
            raise DataError(f"{table.root}: {' and '.join(splits)} are both splits of {part} images. Leave one out.")
    if "training" not in of_part:
        raise DataError(f"{table.root} has the splits {', '.join(table.splits)}: expected one that is called train.")
    return {part: splits[0] for part, splits in of_part.items()}


def _known(tree: Tree, folder: tuple[str, ...], labels: Mapping[str, int]) -> list[Sample]:
    """The samples of a held-out part."""
    files = [names for names in tree.files if names[: len(folder)] == folder]
    at, depth = tree.root.joinpath(*folder), len(folder) + 1
    tree.leave_out((names for names in files if len(names) == depth), "images in no class folder")
    unknown = sorted({names[depth - 1] for names in files if len(names) > depth} - labels.keys())
    if unknown:
        raise DataError(
            f"{at} holds classes that the training images do not: {', '.join(map(printable, unknown))}. Rename or "
            "remove them."
        )
    return [(tree.root.joinpath(*names), labels[names[depth - 1]]) for names in files if len(names) > depth]


def _is_image(root: Path, names: tuple[str, ...]) -> bool:
    extension = os.path.splitext(names[-1])[1].lower()
    if any(character.isalpha() for character in extension):
        return extension in EXTENSIONS
    return begins_like_an_image(root.joinpath(*names))


def _is_run(path: str) -> bool:
    """Whether a folder is the output of a command: named by the time, with our files in it."""
    if re.match(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", os.path.basename(path)) is None:
        return False
    return any(os.path.exists(os.path.join(path, name)) for name in ("config.yaml", "runs.csv", "report.html"))


def path_hash(names: Sequence[str]) -> float:
    """A number in [0, 1), a pure function of the names that lead to a file."""
    return int.from_bytes(hashlib.sha256(os.fsencode("/".join(names))).digest()[:8], "big") / 2**64
