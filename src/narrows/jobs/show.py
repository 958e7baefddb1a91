"""`narrows show`: where the tokens of images go in a model, as pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from narrows.data import ImageSet, picture
from narrows.data.folder import load_unlabelled
from narrows.data.object_scenes import OBJECT_SCENES, load_object_scenes
from narrows.data.scenes import SCENES, load_scenes
from narrows.errors import InvalidArgument
from narrows.files import check_writable
from narrows.hub.models import open_model
from narrows.jobs.object_models import object_picture, open_object_model
from narrows.models import ImageClassifier, ObjectDiscovery
from narrows.screen import say, track
from narrows.validation import check_device, check_positive
from narrows.visualize import overlay, save
from narrows.weights import read_config


@dataclass(frozen=True)
class Shown:
    """Pictures of where tokens go.

    Args:
        models: names or folders of the models.
        pictures: the files.
        images: of how many images.
        folder: where the pictures are.
    """

    models: Sequence[str]
    pictures: Sequence[Path]
    images: int
    folder: Path


def show(
    model: str,
    images: list[str],
    output: str = "overlays",
    limit: int = 16,
    max_carriers: int = 8,
    device: str = "auto",
) -> Shown:
    """Draw where the tokens of images go in a model: one picture for each image and bottleneck.

    Args:
        model: folder written by `narrows fit`, `compare`, `discover` or `save_pretrained`, or a registry name, whose
            weights are random. Of the folder of a run every model in it is drawn, each in a folder of its own.
        images: image files, folders of them and "hf:<name>", or "digits" or "small_digits" for digit scenes; of a model
            that finds objects, "sprites" or other scenes of `narrows.data.object_scenes`.
        output: folder for the pictures.
        limit: at most so many images.
        max_carriers: at most so many carriers get a panel.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".

    Raises:
        InvalidArgument: no such model, images or device, or a model without a bottleneck.
        CannotWrite: `output` cannot be written.
    """
    check_positive(limit=limit, max_carriers=max_carriers)
    place = check_device(device)
    check_writable(output, folder=True)
    models = [str(folder) for folder in models_in(model)] or [model]
    pictures: list[Path] = []
    count = 0
    for name in models:
        folder = Path(output) / Path(name).name if len(models) > 1 else Path(output)
        finder = open_object_model(name)
        if finder is not None:
            drawn = _draw_objects(finder.to(place), images, folder, limit)
        else:
            drawn = _draw(name, images, folder, limit, max_carriers, place)
        if not drawn and len(models) > 1:
            say(f"{name} has no token bottleneck to show.")
        count = max(count, len(drawn))
        pictures += [path for of_image in drawn for path in of_image]
    if not pictures:
        raise InvalidArgument("model", expected="a model with a token bottleneck to show", got=repr(model))
    return Shown(models, pictures, count, Path(output))


def models_in(folder: str | Path) -> dict[Path, str]:
    """The models in a folder, or in that of a run of `narrows fit`, `compare` or `discover`: what each of them is."""
    root = Path(folder)
    places = (root, root / "model", *sorted(root.glob("models/*")))
    return {
        place: str(read_config(place / "config.json").get("architecture", "another model"))
        for place in places
        if (place / "config.json").is_file()
    }


def _draw(
    name: str, images: list[str], folder: Path, limit: int, max_carriers: int, device: torch.device
) -> list[list[Path]]:
    """For each image its pictures, one of every bottleneck; nothing of a model that has none."""
    scenes = images[0] if len(images) == 1 and images[0] in SCENES else None
    loaded = open_model(name, channels=1) if scenes else open_model(name)
    for note in loaded.notes:
        say(f"{note}.", "yellow")
    network, size = loaded.module.to(device), loaded.size[0]
    found: ImageSet = (
        load_scenes(scenes, "held_out", image_size=size)
        if scenes
        else load_unlabelled(images, image_size=size, channels=loaded.channels)
    )
    indices = range(min(limit, len(found)))
    stems = _distinct_stems([found.name(index) for index in indices])
    drawn = []
    for index in track(indices, f"drawing {Path(name).name}", unit="images"):
        batch, _ = found.batch([index])
        routings = network.routing(batch.to(device)) if isinstance(network, ImageClassifier) else ()
        on_grid = [routing.detach() for routing in routings if routing.grid is not None]
        if not on_grid:
            return []
        folder.mkdir(parents=True, exist_ok=True)
        paths = {routing.name: folder / f"{stems[index]}-{routing.name}.png" for routing in on_grid}
        for routing in on_grid:
            save(overlay(picture(batch)[0], routing, max_carriers=max_carriers), paths[routing.name])
        drawn.append(list(paths.values()))
    return drawn


def _draw_objects(model: ObjectDiscovery, images: Sequence[str], folder: Path, limit: int) -> list[list[Path]]:
    """The objects that a model finds, in scenes or in images of the size its decoder is built for."""
    if len(images) == 1 and images[0] in OBJECT_SCENES:
        found = load_object_scenes(images[0]).held_out
    else:
        size = getattr(model.decoder, "image_size", None)
        if size is None:
            expected = f"one that rebuilds pixels, or scenes: {', '.join(OBJECT_SCENES)}"
            raise InvalidArgument("model", expected=expected, got="one that rebuilds features")
        found = load_unlabelled(images, image_size=size, channels=3)
    folder.mkdir(parents=True, exist_ok=True)
    stems = _distinct_stems([found.name(index) for index in range(min(limit, len(found)))])
    drawn = []
    for index, stem in enumerate(track(stems, "drawing", unit="images")):
        batch, truth = found.batch([index])
        path = folder / f"{stem}-objects.png"
        save(object_picture(model, batch, truth if truth.ndim > 1 else None), path)
        drawn.append([path])
    return drawn


def _distinct_stems(names: Sequence[str]) -> list[str]:
    """Names of pictures: of the files, with their folders or at last a number where several files share a name."""
    short = [Path(name).stem for name in names]
    with_folder = ["-".join(Path(name).with_suffix("").parts[-2:]) for name in names]
    numbered = [f"{index:05}-{stem}" for index, stem in enumerate(short)]
    # Some file systems do not tell upper from lower case.
    return next(stems for stems in (short, with_folder, numbered) if len({s.lower() for s in stems}) == len(stems))
