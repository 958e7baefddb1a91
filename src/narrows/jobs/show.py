"""Where the tokens of images go in a model, as pictures."""

from pathlib import Path

from torch import Tensor
from tqdm.auto import tqdm

from narrows.data import ImageSet, picture
from narrows.data.folder import load_unlabelled
from narrows.data.scenes import SCENES, load_scenes
from narrows.errors import InvalidArgument
from narrows.models import ImageClassifier, create_model, list_models, load_model
from narrows.routing import Routing
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
        model: folder written by `narrows fit`, `narrows compare` or `save_pretrained`, or a registry name, whose
            weights are random.
        images: image files and folders of them, or "digits" or "small_digits" for digit scenes.
        output: folder for the pictures.
        limit: at most so many images.
        max_carriers: at most so many carriers get a panel.
        device: where the model runs.
    """
    if limit < 1:
        raise InvalidArgument("limit", expected="a positive integer", got=limit)
    scenes = images[0] if len(images) == 1 and images[0] in SCENES else None
    network = _open(model, **({"channels": 1} if scenes else {})).to(device)
    size, channels = _input_of(network)
    found: ImageSet = (
        load_scenes(scenes, "held_out", image_size=size)
        if scenes
        else load_unlabelled(images, image_size=size, channels=channels)
    )
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    indices = range(min(limit, len(found)))
    for index in tqdm(indices, desc="Drawing", disable=None):
        batch, _ = found.batch([index])
        _draw(batch, _routings(network, batch.to(device), model), folder, Path(found.name(index)).stem, max_carriers)
    print(f"Pictures of {len(indices)} images are in {folder}")


def _open(model: str, **arguments: int) -> ImageClassifier:
    if Path(model).is_dir():
        return load_model(model)
    if model in list_models():
        return create_model(model, **arguments).eval()
    raise InvalidArgument(
        "model", expected=f"a folder with a saved model or one of {', '.join(list_models())}", got=repr(model)
    )


def _input_of(network: ImageClassifier) -> tuple[int, int]:
    """Side and channels of the images the model was built for."""
    config = network._hub_mixin_config
    assert isinstance(config, dict)
    return config["image_size"], config["channels"]


def _routings(network: ImageClassifier, images: Tensor, name: str) -> list[Routing]:
    routings = [routing for routing in network.routing(images) if routing.grid is not None]
    if not routings:
        raise InvalidArgument("model", expected="a model with a token bottleneck to show", got=repr(name))
    return routings


def _draw(images: Tensor, routings: list[Routing], folder: Path, name: str, max_carriers: int) -> None:
    image = picture(images)[0]
    for routing in routings:
        figure = overlay(image, routing.detach(), max_carriers=max_carriers)
        save(figure, folder / f"{name}-{routing.name}.png")
