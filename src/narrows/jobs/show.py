"""`narrows show`: where the tokens of images go in a model, as pictures."""

from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from narrows.data import ImageSet, picture
from narrows.data.folder import load_unlabelled
from narrows.data.object_scenes import OBJECT_SCENES, load_object_scenes
from narrows.data.scenes import SCENES, load_scenes
from narrows.errors import InvalidArgument
from narrows.files import check_writable
from narrows.hub.models import open_model
from narrows.jobs.object_models import object_picture, open_object_model
from narrows.models import ImageClassifier, ObjectDiscovery
from narrows.validation import check_device, check_positive
from narrows.visualize import overlay, save


def show(
    model: str,
    images: list[str],
    output: str = "overlays",
    limit: int = 16,
    max_carriers: int = 8,
    device: str = "cpu",
) -> None:
    """Draw where the tokens of images go in a model: one picture for each image and bottleneck.

    Args:
        model: folder written by `narrows fit`, `compare`, `discover` or `save_pretrained`, or a registry name, whose
            weights are random.
        images: image files and folders of them, or "digits" or "small_digits" for digit scenes; of a model that finds
            objects, "sprites" or other scenes of `narrows.data.object_scenes`.
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
    if (finder := open_object_model(model)) is not None:
        _show_objects(finder.to(place), images, Path(output), limit)
        return
    scenes = images[0] if len(images) == 1 and images[0] in SCENES else None
    loaded = open_model(model, channels=1) if scenes else open_model(model)
    for note in loaded.notes:
        tqdm.write(f"{note}.")
    network, size = loaded.module.to(place), loaded.size[0]
    found: ImageSet = (
        load_scenes(scenes, "held_out", image_size=size)
        if scenes
        else load_unlabelled(images, image_size=size, channels=loaded.channels)
    )
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    indices = range(min(limit, len(found)))
    stems = _distinct_stems([found.name(index) for index in indices])
    for index in tqdm(indices, desc="Drawing", disable=None):
        batch, _ = found.batch([index])
        routings = network.routing(batch.to(place)) if isinstance(network, ImageClassifier) else ()
        on_grid = [routing.detach() for routing in routings if routing.grid is not None]
        if not on_grid:
            raise InvalidArgument("model", expected="a model with a token bottleneck to show", got=repr(model))
        for routing in on_grid:
            figure = overlay(picture(batch)[0], routing, max_carriers=max_carriers)
            save(figure, folder / f"{stems[index]}-{routing.name}.png")
    print(f"Pictures of {len(indices)} images are in {folder}")


def _show_objects(model: ObjectDiscovery, images: Sequence[str], folder: Path, limit: int) -> None:
    """Draw the objects that a model finds, in scenes or in images of the size its decoder is built for."""
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
    for index, stem in enumerate(tqdm(stems, desc="Drawing", disable=None)):
        batch, truth = found.batch([index])
        save(object_picture(model, batch, truth if truth.ndim > 1 else None), folder / f"{stem}-objects.png")
    print(f"Pictures of {len(stems)} images are in {folder}")


def _distinct_stems(names: Sequence[str]) -> list[str]:
    """Names of pictures: of the files, with their folders or at last a number where several files share a name."""
    short = [Path(name).stem for name in names]
    with_folder = ["-".join(Path(name).with_suffix("").parts[-2:]) for name in names]
    numbered = [f"{index:05}-{stem}" for index, stem in enumerate(short)]
    # Some file systems do not tell upper from lower case.
    return next(stems for stems in (short, with_folder, numbered) if len({s.lower() for s in stems}) == len(stems))
