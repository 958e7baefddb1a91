"""Which images and clips a folder holds, and where the masks of their objects are, in the layouts people have them in.

| layout | images | masks |
| --- | --- | --- |
| beside one another | `cat.jpg` | `cat_mask.png`, or `_masks`, `_seg`, `_segmentation`, `_instances`, `_flat` (CLEVRTex) |
| twin folders | `images/a/cat.jpg` | `masks/a/cat.png`, or `annotations/`, `segmentations/`, `instances/` |
| VOC | `JPEGImages/1.jpg` | `SegmentationObject/1.png`, parts in `ImageSets/Segmentation/` |
| DAVIS | `JPEGImages/480p/dog/00000.jpg` | `Annotations/480p/dog/00000.png`, parts in `ImageSets/2017/` |
| Kubric | `1/rgba_00000.png` | `1/segmentation_00000.png` |
| COCO | `train2017/1.jpg` | `annotations/instances_train2017.json` |
| YouTube-VIS | `train/JPEGImages/dog/00000.jpg` | `train/instances.json` or `train.json` |
| MOVi | `movi_c-train.tfrecord-00000-of-00256` | in the same file |
| images alone | any | none: for training without scores |

Folders called `train`, `val` and `test` (or `Training`, `val2017`, ...) above the images are the parts.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from narrows.data.listing import HELD_OUT_SHARE, part_called, path_hash, printable, walk
from narrows.data.object_files import Clip, CocoClip, FileClip, list_movi
from narrows.errors import DataError, InvalidArgument

IMAGE_FOLDERS = ("images", "image", "imgs", "jpegimages", "rgb", "frames")
MASK_FOLDERS = ("masks", "mask", "annotations", "segmentations", "segmentation", "instances", "segmentationobject")
MASK_ENDINGS = ("_mask", "_masks", "_seg", "_segmentation", "_instances", "_flat")

Names = tuple[str, ...]


@dataclass
class ObjectFolder:
    """The images or clips of a folder.

    Args:
        layout: in words.
        parts: by part ("training", "validation", "test"), what it holds.
        held_out_rule: which are held out, in words.
        left_out: what was left out, in words.
    """

    layout: str
    parts: dict[str, list[Clip]] = field(default_factory=dict)
    held_out_rule: str = "parts of the folder"
    left_out: str = ""


def list_objects(root: Path, *, clips: bool = False, ignored: int | None = None) -> ObjectFolder:
    """Images, or clips, and their masks, in whichever of the layouts above the folder has.

    Where the folder has no parts a fifth is held out, by a hash of the name; of CLEVRTex the first tenth is the test
    part and the second the validation part, as published.

    Args:
        root: the folder.
        clips: frames in one folder are a clip; else every frame is an image by itself.
        ignored: the value of pixels in mask files that do not count; by default 255 in VOC and none elsewhere.

    Raises:
        InvalidArgument: no such folder.
        DataError: no images, masks for some images only, masks without an image, clips in a layout that has none, or
            a damaged index.
    """
    if not root.is_dir():
        state = "which is a file" if root.exists() else "which does not exist"
        raise InvalidArgument("data", expected="a folder of images, or of images and masks", got=f"{root}, {state}")
    found = _movi(root) or _index(root) or _files(root, ignored)
    if not clips:
        found.parts = {part: [frame for clip in held for frame in _frames(clip)] for part, held in found.parts.items()}
    every = [clip for part in found.parts.values() for clip in part]
    if not every:
        raise DataError(f"{root} ({found.layout}) holds no images. docs/objects.md describes the layouts. {found.left_out}")
    if clips and (found.layout in ("PASCAL VOC", "CLEVRTex") or all(len(clip) == 1 for clip in every)):
        raise DataError(f"{root} ({found.layout}) holds images and no clips, which are folders of frames.")
    without = [clip.name for clip in every if not clip.has_masks]
    if 0 < len(without) < len(every):
        raise DataError(
            f"{root}: {len(without)} of {len(every)} have no mask: {_some(without)}. Add the masks or move these images "
            "elsewhere. A folder of images alone trains without scores."
        )
    if "training" not in found.parts:
        raise DataError(f"{root} holds {' and '.join(found.parts)} images, and none to train on.")
    if len(found.parts) == 1:
        _hold_out(found)
    return found


def _hold_out(found: ObjectFolder) -> None:
    every = found.parts["training"]
    if found.layout == "CLEVRTex":
        tenth = len(every) // 10
        found.parts = {"test": every[:tenth], "validation": every[tenth : 2 * tenth], "training": every[2 * tenth :]}
        found.held_out_rule = "the first fifth, as published"
        return
    order = sorted(every, key=lambda clip: path_hash(clip.name.split("/")))
    count = min(max(1, round(HELD_OUT_SHARE * len(order))), len(order) - 1)
    held_out = {id(clip) for clip in order[:count]}
    found.parts["validation"] = [clip for clip in every if id(clip) in held_out]
    found.parts["training"] = [clip for clip in every if id(clip) not in held_out]
    found.held_out_rule = f"{HELD_OUT_SHARE:.0%}, chosen by a hash of the name"


def _frames(clip: Clip) -> Iterator[Clip]:
    """Each frame as an image by itself."""
    if len(clip) == 1 or not isinstance(clip, FileClip | CocoClip):
        yield clip
        return
    for number, frame in enumerate(clip.frames):
        name = (Path(clip.name) / printable(frame.name)).as_posix()
        if isinstance(clip, CocoClip):
            objects = tuple((seen[number],) for seen in clip.objects)
            yield replace(clip, name=name, frames=(frame,), objects=objects)
        else:
            yield replace(clip, name=name, frames=(frame,), masks=clip.masks[number : number + 1])


def _movi(root: Path) -> ObjectFolder | None:
    found = ObjectFolder("TFRecord files of MOVi")
    for file in sorted(path for path in root.rglob("*.tfrecord*") if path.is_file()):
        part = part_called(file.name.partition(".")[0].rpartition("-")[2])
        found.parts.setdefault(part or "training", []).extend(list_movi(file))
    return found if found.parts else None


def _index(root: Path) -> ObjectFolder | None:
    """COCO and YouTube-VIS: an index in JSON for each part."""
    found = ObjectFolder("an index of COCO or YouTube-VIS")
    for place in sorted((*root.glob("annotations/*.json"), *root.glob("*.json"), *root.glob("*/instances.json"))):
        try:
            index = json.loads(place.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{place} cannot be read as JSON: {error}. Is it complete?") from error
        notes = index.get("annotations") if isinstance(index, dict) else None
        if not isinstance(notes, list) or (notes and not {"segmentation", "segmentations"} & set(notes[0])):
            continue  # captions, key points and whatever else lies there
        part = part_called(place.stem.removeprefix("instances_")) or part_called(place.parent.name) or "training"
        try:
            found.parts.setdefault(part, []).extend(_indexed(index, place))
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(f"{place} is no index of COCO or YouTube-VIS: {type(error).__name__}: {error}.") from error
    return found if found.parts else None


def _indexed(index: dict[str, Any], place: Path) -> Iterator[CocoClip]:
    """What an index names. The files lie in a folder beside it, or one above, that is called like the index."""
    videos = "videos" in index
    of_entry = defaultdict[Any, list[dict[str, Any]]](list)
    for note in index["annotations"]:
        of_entry[note["video_id" if videos else "image_id"]].append(note)
    name = place.stem.removeprefix("instances_")
    inside = (("JPEGImages",), (name, "JPEGImages"), (name,), ("images", name), ("images",), ())
    folders = [above.joinpath(*names) for above in (place.parent, place.parent.parent) for names in inside]
    for entry in index["videos" if videos else "images"]:
        files = entry["file_names"] if videos else [entry["file_name"]]
        folder = next((folder for folder in folders if folder.joinpath(files[0]).is_file()), None)
        if folder is None:
            tried = ", ".join(str(folder) for folder in folders[:5])
            raise DataError(f"{place} names {files[0]}, which is in none of {tried} and the folder itself.")
        notes = of_entry[entry["id"]]
        yield CocoClip(
            Path(files[0]).parent.as_posix() if videos else files[0],
            tuple(folder / file for file in files),
            (entry["height"], entry["width"]),
            tuple(tuple(note["segmentations"]) if videos else (note["segmentation"],) for note in notes),
            tuple(bool(note.get("iscrowd")) for note in notes),
        )


def _files(root: Path, ignored: int | None) -> ObjectFolder:
    """Images and masks that lie in files, and belong together by their names."""
    tree = walk(root)
    images, masks = dict[Names, Names](), dict[Names, Names]()
    for names in tree.files:
        kind, key = _role(names)
        known = masks if kind == "mask" else images
        if key in known:
            both = f"{'/'.join(known[key])} and {'/'.join(names)}"
            raise DataError(f"{root}: {both} have one name, and it cannot be told which is meant. Rename one.")
        known[key] = names
    found = ObjectFolder("images")
    if not masks.keys() & images.keys():  # a class of images may be called "masks"
        images |= {names: names for names in masks.values()}
        masks = {}
    elif any("segmentationobject" in _lower(names) for names in masks.values()):
        found.layout, ignored = "PASCAL VOC", 255 if ignored is None else ignored
        tree.leave_out([names for key, names in images.items() if key not in masks], "images without masks")
    elif any(names[-1].lower().startswith("clevrtex") for names in masks.values()):
        found.layout = "CLEVRTex"
        tree.leave_out([names for key, names in images.items() if key not in masks], "other maps of an image")
    if found.layout != "images":
        images = {key: names for key, names in images.items() if key in masks}
    lonely = [names for key, names in masks.items() if key not in images]
    if lonely:
        raise DataError(f"{root}: {len(lonely)} mask(s) without an image: {_some(map('/'.join, lonely))}.")
    part_of = _listed_parts(root)
    of_clip = defaultdict[tuple[Names, str], list[Names]](list)
    for key, names in images.items():
        if not part_of:
            of_clip[key[:-1], _part_above(names)].append(key)
        elif (part := part_of.get(key[-1]) or part_of.get(names[-2])) is not None:
            of_clip[key[:-1], part].append(key)
    unlisted = len(images) - sum(map(len, of_clip.values()))
    if unlisted:
        tree.left_out["images that no list in ImageSets/ names"] += ["..."] * unlisted
    for (_, part), keys in sorted(of_clip.items()):
        keys.sort()
        with_mask = [key for key in keys if key in masks]
        if with_mask and len(with_mask) < len(keys):
            missing = _some("/".join(images[key]) for key in keys if key not in masks)
            raise DataError(f"{root}: no mask of {missing}, while other frames beside it have one. Add or remove some.")
        frames = tuple(root.joinpath(*images[key]) for key in keys)
        place = frames[0].parent if len(frames) > 1 else frames[0]
        name = printable(place.relative_to(root).as_posix())
        clip = FileClip(name, frames, tuple(root.joinpath(*masks[key]) for key in with_mask), ignored)
        found.parts.setdefault(part, []).append(clip)
    found.left_out = tree.describe_left_out()
    return found


def _role(names: Names) -> tuple[str, Names]:
    """Whether a file is an image or a mask, and a key that the two of a pair share."""
    folders, stem = _lower(names[:-1]), Path(names[-1]).stem
    for number, folder in enumerate(folders):
        if folder in MASK_FOLDERS or folder in IMAGE_FOLDERS:
            kind = "mask" if folder in MASK_FOLDERS else "image"
            return kind, (*names[:number], *names[number + 1 : -1], stem)
    if stem.startswith("segmentation_"):
        return "mask", (*names[:-1], stem.replace("segmentation_", "rgba_", 1))
    for ending in MASK_ENDINGS:
        if stem.lower().endswith(ending):
            return "mask", (*names[:-1], stem[: -len(ending)])
    return "image", (*names[:-1], stem)


def _listed_parts(root: Path) -> dict[str, str]:
    """By the name of an image (VOC) or of a clip (DAVIS), the part that a list in `ImageSets` puts it in."""
    for folder in ("Segmentation", "2017"):
        lists = {path: part_called(path.stem) for path in sorted((root / "ImageSets" / folder).glob("*.txt"))}
        if any(lists.values()):
            return {name: part for path, part in lists.items() if part for name in path.read_text().split()}
    return {}


def _part_above(names: Names) -> str:
    return next(filter(None, map(part_called, names[:-1])), "training")


def _lower(names: Iterable[str]) -> list[str]:
    return [name.lower() for name in names]


def _some(names: Iterable[str]) -> str:
    first = [printable(name) for name in names]
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")
