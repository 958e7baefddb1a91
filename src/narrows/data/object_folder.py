"""Which images and clips a folder holds, and where the masks of their objects are, in the layouts people have them in.

| layout | images | masks |
| --- | --- | --- |
| side by side | `cat.jpg` | `cat_mask.png`, or `_masks`, `_seg`, `_segmentation`, `_instances`, CLEVRTex's `_flat` |
| twin folders | `images/a/cat.jpg` | `masks/a/cat.png`, or `annotations/`, `segmentations/`, `instances/` |
| VOC | `JPEGImages/1.jpg` | `SegmentationObject/1.png`, parts in `ImageSets/Segmentation/` |
| DAVIS | `JPEGImages/480p/dog/00000.jpg` | `Annotations/480p/dog/00000.png`, parts in `ImageSets/2017/` |
| Kubric | `1/rgba_00000.png` | `1/segmentation_00000.png` |
| COCO | `train2017/1.jpg` | `annotations/instances_train2017.json` |
| YouTube-VIS | `train/JPEGImages/dog/00000.jpg` | `train/instances.json` or `train.json` |
| MOVi | `movi_c-train.tfrecord-00000-of-00256` | in the same file |
| images alone | any | none: for training without scores |
| a table of the `datasets` library | a column of type `Image` | another called `mask`, `annotation`, `label`, ... |

Folders called `train`, `val` and `test` (or `Training`, `val2017`, ...) above the images are the parts.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from narrows.data.decoding import readable
from narrows.data.folder import UNREADABLE_SHARE, find_unreadable
from narrows.data.images import IGNORED, MEAN_AND_STD, ImageData, ImageSet
from narrows.data.listing import HELD_OUT_SHARE, part_called, parts_of, path_hash, printable, say_left_out, walk
from narrows.data.object_files import Clip, CocoClip, FileClip, MoviClip, list_movi
from narrows.data.positions import keys, uniforms
from narrows.data.tables import Row, Table
from narrows.errors import DataError, InvalidArgument
from narrows.validation import check_positive

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


def list_objects(root: Path | Table, *, clips: bool = False, ignored: int | None = None) -> ObjectFolder:
    """Images, or clips, and their masks, in whichever of the layouts above the folder has.

    Where the folder has no parts a fifth is held out, by a hash of the name; of CLEVRTex the first tenth is the test
    part and the second the validation part, as published.

    Args:
        root: the folder, or an opened table, whose splits are the parts.
        clips: frames in one folder are a clip; else every frame is an image by itself.
        ignored: the value of pixels in mask files that do not count; by default 255 in VOC and none elsewhere.

    Raises:
        InvalidArgument: no such folder.
        DataError: no images, masks for some images only, masks without an image, clips in a layout that has none, or
            a damaged index.
    """
    if isinstance(root, Path) and not root.is_dir():
        state = "which is a file" if root.exists() else "which does not exist"
        raise InvalidArgument("data", expected="a folder of images, or of images and masks", got=f"{root}, {state}")
    if isinstance(root, Table):
        found, root = _rows(root, ignored), Path(root.root)  # its name, from here on
    else:
        found = _movi(root) or _index(root) or _files(root, ignored)
    if not clips:
        found.parts = {part: [frame for clip in held for frame in _frames(clip)] for part, held in found.parts.items()}
    every = [clip for part in found.parts.values() for clip in part]
    if not every:
        raise DataError(
            f"{root} ({found.layout}) holds no images. docs/objects.md describes the layouts. {found.left_out}"
        )
    if clips and (found.layout in ("PASCAL VOC", "CLEVRTex") or all(len(clip) == 1 for clip in every)):
        raise DataError(f"{root} ({found.layout}) holds images and no clips, which are folders of frames.")
    without = [clip.name for clip in every if not clip.has_masks]
    if 0 < len(without) < len(every):
        raise DataError(
            f"{root}: {len(without)} of {len(every)} have no mask: {_some(without)}. Add the masks or move these "
            "images elsewhere. A folder of images alone trains without scores."
        )
    if "training" not in found.parts:
        raise DataError(f"{root} holds {' and '.join(found.parts)} images, and none to train on.")
    if len(found.parts) == 1:
        _hold_out(found)
    return found


class ObjectImages(ImageSet):
    """Images or clips with the masks of their objects, cropped to a square at the centre, resized and normalised.

    The label of a pixel is the number of its object, 0 on the background, and `IGNORED` where nothing is known; all are
    `IGNORED` where there are no masks. Masks are resized by nearest neighbours.

    Args:
        clips: images or clips, as `list_objects` finds them.
        image_size: side of the square images, in pixels.
        frames: T, of a clip: a random window of training clips, the first T frames of others. None for images.
        crop: side of the square that is cropped, as a share of the shorter side (0.8 for CLEVRTex).
        augmented: mirror at random and choose windows at random, as a pure function of (seed, epoch, index).
        seed: of the augmentation.

    Raises:
        DataError: a clip with fewer frames, or a mask of another size than its image, when it is read.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        *,
        image_size: int,
        frames: int | None = None,
        crop: float = 1.0,
        augmented: bool = False,
        seed: int = 0,
    ) -> None:
        check_positive(image_size=image_size, frames=1 if frames is None else frames)
        if not 0 < crop <= 1:
            raise InvalidArgument("crop", expected="a share in (0, 1]", got=crop)
        self.clips, self.image_size, self.frames, self.crop = tuple(clips), image_size, frames, crop
        self.augmented, self.seed = augmented, seed

    def __len__(self) -> int:
        return len(self.clips)

    def name(self, index: int) -> str:
        """The file, or the folder of a clip."""
        return self.clips[index].name

    @property
    def has_masks(self) -> bool:
        """Whether there are masks to score with."""
        return all(clip.has_masks for clip in self.clips)

    def batch(
        self, indices: Sequence[int], epoch: int = 0
    ) -> tuple[Float[Tensor, "B *T 3 H W"], Int[Tensor, "B *T H W"]]:
        """Normalised images and the object of each pixel; with `frames`, of clips."""
        samples = [self._sample(index, epoch) for index in indices]
        images, masks = (torch.stack(part) for part in zip(*samples, strict=True))
        return images, masks

    def _sample(self, index: int, epoch: int) -> tuple[Tensor, Tensor]:
        clip, count = self.clips[index], self.frames or 1
        if len(clip) < count:
            raise DataError(
                f"{clip.name} has {len(clip)} frames, and {count} are asked for. Ask for fewer, or remove it."
            )
        mirror, where = (
            uniforms(keys(self.seed, epoch, np.array([index], np.uint64)), 2)[0] if self.augmented else (1.0, 0.0)
        )
        begin = int(where * (len(clip) - count + 1))
        images, masks = zip(*(self._frame(clip, frame) for frame in range(begin, begin + count)), strict=True)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in MEAN_AND_STD[3])
        pixels, labels = (pixels - mean) / std, torch.from_numpy(np.stack(masks))
        if mirror < 0.5:
            pixels, labels = pixels.flip(-1), labels.flip(-1)
        return (pixels[0], labels[0]) if self.frames is None else (pixels, labels)

    def _frame(self, clip: Clip, frame: int) -> tuple[np.ndarray, np.ndarray]:
        image = clip.image(frame)
        side = max(1, round(self.crop * min(image.size)))
        left, top = ((whole - side) // 2 for whole in image.size)
        box, size = (left, top, left + side, top + side), (self.image_size, self.image_size)
        pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box))
        if not clip.has_masks:
            return pixels, np.full(size, IGNORED)
        mask = clip.mask(frame)
        _check_size(clip, frame, mask.shape[::-1], image.size)
        nearest = ((np.arange(self.image_size) + 0.5) * side / self.image_size).astype(int)
        return pixels, mask[(top + nearest)[:, None], left + nearest]


def load_object_folder(
    root: Path | Table,
    *,
    image_size: int,
    frames: int | None = None,
    crop: float = 1.0,
    seed: int = 0,
    ignored: int | None = None,
    unreadable_share: float = UNREADABLE_SHARE,
) -> ImageData:
    """A folder or a table of images, or of clips, with the masks of their objects: `list_objects`, `ObjectImages`.

    Every image file is opened once, and the size of every mask file compared with that of its image.

    Raises:
        DataError: what `list_objects` finds, too many unreadable images, or masks that do not fit the images.
    """
    found = list_objects(root, clips=frames is not None, ignored=ignored)
    name = str(root.root if isinstance(root, Table) else root)
    files = [clip.frames for held in found.parts.values() for clip in held if isinstance(clip, FileClip | CocoClip)]
    skipped = find_unreadable([file for inside in files for file in inside], allowed_share=unreadable_share)

    def images(part: str) -> ObjectImages:
        clips = [clip for clip in found.parts[part] if skipped.isdisjoint(getattr(clip, "frames", ()))]
        training = part == "training"
        part_images = ObjectImages(
            clips, image_size=image_size, frames=frames, crop=crop, augmented=training, seed=seed if training else 0
        )
        if not clips:
            raise DataError(f"{name}: no readable image among the {part} images.")
        part_images.batch([0])
        for clip in clips:
            _check_sizes(clip)
        return part_images

    held_out = [images(part) for part in ("validation", "test") if part in found.parts]
    say_left_out(PurePath(name), found.left_out)
    return ImageData(
        name=name,
        train=images("training"),
        held_out=held_out[0],
        test=held_out[-1],
        classes=(),
        image_size=image_size,
        channels=3,
        held_out_rule=found.held_out_rule,
        skipped=tuple(sorted(skipped)),
        left_out=found.left_out,
    )


def _check_sizes(clip: Clip) -> None:
    """Raise where a mask has another size than its image; files are read where their heads differ alone."""
    if isinstance(clip, MoviClip) or not clip.has_masks:
        return
    for frame, image in enumerate(clip.frames):
        known = clip.size[::-1] if isinstance(clip, CocoClip) else _size_of(clip.masks[frame])
        if known is None or known != _size_of(image):  # a photograph may be stored turned
            _check_size(clip, frame, clip.mask(frame).shape[::-1], clip.image(frame).size)


def _size_of(file: Path | Row) -> tuple[int, int] | None:
    try:
        with Image.open(readable(file)) as head:
            return head.size
    except Exception:  # a broken file makes decoders raise anything; reading it says what is wrong
        return None


def _check_size(clip: Clip, frame: int, mask: tuple[int, ...], image: tuple[int, int]) -> None:
    if tuple(mask) != image:
        raise DataError(
            f"{clip.name}: the mask of frame {frame} is {mask[0]} x {mask[1]} pixels, the image {image[0]} x "
            f"{image[1]}. A mask has the size of its image."
        )


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
        name = (Path(clip.name) / printable(Path(str(frame)).name)).as_posix()
        if isinstance(clip, CocoClip):
            objects = tuple((seen[number],) for seen in clip.objects)
            yield replace(clip, name=name, frames=(frame,), objects=objects)
        else:
            yield replace(clip, name=name, frames=(frame,), masks=clip.masks[number : number + 1])


def _rows(table: Table, ignored: int | None) -> ObjectFolder:
    found = ObjectFolder("a table", held_out_rule="splits of the table")
    for part, split in parts_of(table).items():
        images, masks = table.rows_and_masks(split)
        pairs = zip(images, masks, strict=True) if masks else ((image,) for image in images)
        found.parts[part] = [FileClip(str(image), (image,), tuple(mask), ignored) for image, *mask in pairs]
    return found


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
    for (_, part), frame_keys in sorted(of_clip.items()):
        frame_keys.sort()
        with_mask = [key for key in frame_keys if key in masks]
        if with_mask and len(with_mask) < len(frame_keys):
            missing = _some("/".join(images[key]) for key in frame_keys if key not in masks)
            raise DataError(f"{root}: no mask of {missing}, while other frames beside it have one. Add or remove some.")
        frames = tuple(root.joinpath(*images[key]) for key in frame_keys)
        names = images[frame_keys[0]]
        name = printable("/".join(names[:-1] if len(frames) > 1 else names))
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
