"""Vision models by name: timm's, transformers', narrows' own, or a folder."""

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

import torch
from huggingface_hub import PyTorchModelHubMixin, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Float
from torch import Tensor, nn

from narrows.checkpoints.files import Renamed, find_weights, fit_weights
from narrows.data.images import MEAN_AND_STD
from narrows.errors import InvalidArgument, MissingExtra, NarrowsError
from narrows.files import replacing_folder
from narrows.hub.strict import check_claimed_layers, check_no_surplus_layers, few
from narrows.models import ImageClassifier, create_model, list_models, load_model
from narrows.models.base import MODEL_CARD, SavedModel
from narrows.models.card import named_classes, timm_card
from narrows.models.vit import ATSViT, TransformerClassifier
from narrows.validation import check_positive
from narrows.weights import load_strictly, misfits, read_file

if TYPE_CHECKING:
    from PIL import Image

SPELLINGS = "timm:<name>, hf:<name or folder>, a folder written by save_pretrained, or a registry name of narrows"

_WITHOUT_HUB = (
    "Give a file of weights with --checkpoint, or copy the folder that HF_HOME names from where there is a network."
)
FETCH = "fetch it where there is a network (hf download {} --local-dir <folder>) and name the folder"
"""What to do without a network."""


@dataclass(frozen=True)
class LoadedModel:
    """A vision model that was opened by its name, with what is needed to prepare images for it.

    Args:
        name: the name it was opened by.
        module: the model, in evaluation mode.
        size: `(height, width)` of the images it takes.
        mean: what pixels in [0, 1] are normalised with, by channel.
        std: likewise.
        num_classes: width of its logits; 0 for a model that gives features.
        classes: what they are called, in their order; empty where that is not known.
        prepare: turns a PIL image into the `[C, H, W]` that the model takes; None for a model of narrows, whose images
            `narrows.data` prepares.
        notes: sentences about its weights: where in the checkpoint they were found, and what was changed to fit.
    """

    name: str
    module: nn.Module
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int = 0
    classes: tuple[str, ...] = ()
    prepare: "Callable[[Image.Image], Tensor] | None" = None
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.module.parameters()).device

    @property
    def channels(self) -> int:
        """Channels of the images it takes."""
        return len(self.mean)

    def outputs(self, images: Float[Tensor, "B C H W"], **options: Any) -> Float[Tensor, "B width"]:
        """Logits or pooled features; of a model whose pooler was not saved the first token.

        Args:
            images: as the model takes them.
            options: arguments of the model beside them.

        Raises:
            InvalidArgument: the model gives neither.
        """
        answer = self.module(images, **options)
        for found in (answer, getattr(answer, "logits", None), getattr(answer, "pooler_output", None)):
            if isinstance(found, Tensor):
                return found
        if getattr(self.module, "pooler", self) is None:
            return answer.last_hidden_state[:, 0]
        raise InvalidArgument(
            "model", expected="a model that gives logits or pooled features", got=type(answer).__name__
        )

    def tokens(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """The last features before they are pooled; a feature map as its tokens, one vector as a single token."""
        module: Any = self.module
        if isinstance(module, ATSViT):
            return module.feature_map(images).flatten(1, 2)
        if isinstance(module, TransformerClassifier):
            return module.forward_tokens(images)
        if not hasattr(module, "forward_features"):  # of transformers
            return module.base_model(images).last_hidden_state
        features = module.forward_features(images)
        if features.ndim == 2:
            return features[:, None]
        if features.ndim == 4:
            channels_first = not isinstance(module, ImageClassifier) and features.shape[1] == module.num_features
            features = features.flatten(2).transpose(1, 2) if channels_first else features.flatten(1, 2)
        return features

    def picture(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Normalised images as pictures in [0, 1]."""
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)


def open_model(
    name: str | Path, checkpoint: str | Path | None = None, *, checkpoint_key: str | None = None, **arguments: Any
) -> LoadedModel:
    """Open a vision model by its name.

    A checkpoint may be what any training script left: see `narrows.checkpoints.files.find_weights`. The model gets as
    many classes as its head has; without a head it gives features. Position embeddings of another image size are
    interpolated. All other weights have to be there, and no others; `notes` of what comes back says what was done.

    Args:
        name: "timm:<name>", "hf:<name or folder>" for transformers, a folder written by `save_pretrained`, `narrows
            fit` or `narrows compare`, or a registry name of narrows, whose weights are random without a checkpoint.
        checkpoint: a file with weights in place of those that belong to the name; then nothing is downloaded.
        checkpoint_key: where in that file they are, "model_ema" or "teacher" say; by default it is found out.
        arguments: of the model, as narrows spells them: `num_classes`, `image_size`, `channels`, and others of its own.
            A model of timm's with another `num_classes` begins with a new head; a saved model has to have been built
            with them; models of transformers take none.

    Raises:
        InvalidArgument: an unknown name, a file that does not exist or does not fit, arguments that cannot be had.
        NarrowsError: weights that have to be downloaded and cannot be.
        MissingExtra: without timm or transformers, where they are needed.
    """
    source, _, rest = str(name).partition(":")
    if checkpoint is None and checkpoint_key is not None:
        raise InvalidArgument("checkpoint_key", expected="a checkpoint that it is a part of", got=repr(checkpoint_key))
    check_positive(**{key: arguments[key] for key in ("image_size", "channels") if key in arguments})
    if (num_classes := arguments.get("num_classes")) is not None and num_classes < 0:
        raise InvalidArgument("num_classes", expected="0 (features) or more", got=num_classes)
    found = None if checkpoint is None else Checkpoint(read_file(checkpoint), str(checkpoint), checkpoint_key)
    if source == "timm" and rest:
        return _open_timm(rest, found, arguments)
    if source == "hf" and rest:
        return _open_transformers(rest, found, arguments)
    return _open_ours(str(name), found, arguments)


class Checkpoint(NamedTuple):
    """Everything in a checkpoint file, and which part of it is asked for."""

    content: Mapping[Any, Any]
    path: str
    key: str | None

    def fill(
        self,
        build: Callable[[int | None], nn.Module],
        size: Callable[[nn.Module], tuple[int, int]],
        heads: Callable[[nn.Module], Sequence[str]],
        num_classes: int | None,
    ) -> tuple[nn.Module, tuple[str, ...]]:
        """A model with the weights, and what to say of them.

        Args:
            build: makes the model for so many classes; None: as many as it usually has, 0: for features.
            size: height and width of the images it takes.
            heads: names of its linear layers that give classes.
            num_classes: what was asked for.
        """
        model = build(num_classes)
        names = heads(model)
        weights, notes = find_weights(model, self.content, key=self.key, where=repr(self.path))
        leaves = [f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")]
        given = next((len(weights[leaf]) for leaf in leaves if leaf in weights and weights[leaf].ndim), 0)
        if num_classes and num_classes != given:
            expected = f"{given}, as the head in {self.path!r} has" if given else "none (there is no head in the file)"
            raise InvalidArgument("num_classes", expected=f"{expected}, or 0 for features", got=num_classes)
        if num_classes == 0:
            weights = weights.without(leaves)
        elif names and (width := len(model.get_submodule(names[0]).weight)) != given:  # pyright: ignore
            try:
                model = build(given)
            except InvalidArgument as error:
                if given:
                    raise
                expected = f"a head ({leaves[0]}), which a {type(model).__name__} does not do without"
                raise InvalidArgument("checkpoint", expected=expected, got=f"none in {self.path!r}") from error
            weights, notes = find_weights(model, self.content, key=self.key, where=repr(self.path))
            change = f"has {given} classes, not {width}" if given else "has no head: the model gives features"
            notes.append(f"The checkpoint {change}")
        convolution = next((part for part in model.modules() if isinstance(part, nn.Conv2d)), None)
        grid = None
        if convolution is not None:
            (height, width), (down, right) = size(model), convolution.stride[:2]
            grid = height // down, width // right
        notes += fit_weights(weights, model.state_dict(), grid)
        weights = _renamed_by_timm(model, weights)
        broken = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
        if broken and set(broken) & {name for name, _ in model.named_parameters()}:
            raise InvalidArgument("checkpoint", expected="finite weights", got=f"NaN or infinity in {broken[0]!r}")
        load_strictly(model, weights, names=weights.names, where=self.path)
        return model, tuple(notes)


def save_model(
    model: nn.Module, folder: Path, *, classes: Sequence[str] = (), about: Mapping[str, str] | None = None
) -> None:
    """Write a model as safetensors, config and model card; `open_model` takes the folder.

    Of a model of timm's it is called "timm:local-dir:<folder>".

    Args:
        model: of narrows or of timm.
        folder: where to.
        classes: what its logits are called, in their order; saved beside the weights.
        about: what it was trained on and what it reaches, for the card.

    Raises:
        InvalidArgument: a model of neither narrows nor timm.
    """
    if isinstance(model, PyTorchModelHubMixin):
        if isinstance(model, SavedModel):
            model.classes, model.about = tuple(classes) or model.classes, about or model.about
        model.save_pretrained(folder)
    elif hasattr(model, "pretrained_cfg"):
        from timm.models import save_for_hf

        with replacing_folder(folder) as unfinished:
            named = {"label_names": list(classes)} if classes else None
            save_for_hf(model, str(unfinished), model_config=named, model_args=_timm_arguments(model))
            if not (folder / MODEL_CARD).exists():
                timm_card(model, folder.name, {**named_classes(classes), **(about or {})}).save(unfinished / MODEL_CARD)
    else:
        raise InvalidArgument("model", expected="a model of narrows or of timm", got=type(model).__name__)


def _open_ours(name: str, checkpoint: Checkpoint | None, arguments: Mapping[str, Any]) -> LoadedModel:
    build: Callable[..., Any]
    model: ImageClassifier
    notes: tuple[str, ...] = ()
    if Path(name).is_dir():
        model = load_model(name)
        build = partial(type(model), **{k: v for k, v in _config(model).items() if k != "architecture"})
        saved = _config(model)
        if other := {key: value for key, value in arguments.items() if saved.get(key) != value}:
            got = f"one with { ({key: saved.get(key) for key in other}) } in {name!r}"
            raise InvalidArgument("model", expected=f"a saved model with {other}", got=got)
    elif name in list_models():
        build = partial(create_model, name, **arguments)
        model = create_model(name, **arguments).eval()
        notes = (f"The weights of {name} are random: nothing has trained them",)
    else:
        _refuse(name)
    classes = model.classes if checkpoint is None else ()  # other weights are of other classes
    if checkpoint is not None:
        wanted, shape = arguments.get("num_classes"), _config(model)
        filled, notes = checkpoint.fill(
            lambda classes: build(**({} if classes is None else {"num_classes": classes})),
            lambda _: (shape["image_size"], shape["image_size"]),
            lambda _: ("head",),
            wanted,
        )
        model = cast(ImageClassifier, filled.eval())
    config = _config(model)
    side, (mean, std) = config["image_size"], MEAN_AND_STD[config["channels"]]
    num_classes = config["num_classes"]
    return LoadedModel(name, model, (side, side), mean, std, num_classes=num_classes, classes=classes, notes=notes)


def _config(model: ImageClassifier) -> dict[str, Any]:
    return cast(dict[str, Any], model._hub_mixin_config)


def _refuse(name: str) -> NoReturn:
    close = difflib.get_close_matches(name, list_models(), n=1)
    if name.startswith("timm/"):
        hint = f"A model of timm's is called timm:{name.removeprefix('timm/')}, with a colon."
    else:
        hint = f"Did you mean {close[0]!r}?" if close else f"A model of timm's is called timm:{name}, say."
    raise InvalidArgument("model", expected=SPELLINGS, got=repr(name), hint=hint)


def _open_timm(name: str, checkpoint: Checkpoint | None, arguments: Mapping[str, Any]) -> LoadedModel:
    """By what `timm.create_model` calls it: "vit_small_patch16_224", "local-dir:<folder>"."""
    try:
        import timm
        from timm.data.config import resolve_data_config
        from timm.data.imagenet_info import ImageNetInfo
        from timm.data.transforms_factory import create_transform

        import narrows.timm  # noqa: F401 (registers SepViT)
    except ImportError as error:
        raise MissingExtra("timm", extra="timm", purpose="open a model of timm's") from error
    plain = name.partition(".")[0]
    if ":" not in name and not timm.is_model(plain):
        close = difflib.get_close_matches(plain, timm.list_models(), n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "timm.list_models() lists them."
        raise InvalidArgument("model", expected="a model of timm's", got=repr(name), hint=hint)
    spelling = {"image_size": "img_size", "channels": "in_chans"}
    options = {spelling.get(key, key): value for key, value in arguments.items()}
    side = arguments.get("image_size")

    def shape(model: nn.Module) -> dict[str, Any]:
        return resolve_data_config({} if side is None else {"img_size": side}, model=model)

    notes: tuple[str, ...] = ()
    try:
        if checkpoint is None:
            _check_timms_weights(name)
            model = timm.create_model(name, pretrained=True, **options)
            classes = options.get("num_classes") or 0
            if classes and classes != model.pretrained_cfg.get("num_classes", classes):  # pyright: ignore
                notes = (f"The head for {classes} classes is new: its weights are random",)
        else:

            def build(classes: int | None) -> nn.Module:
                wanted: dict[str, Any] = {} if classes is None else {"num_classes": classes}
                return timm.create_model(name, pretrained=False, **{**options, **wanted})

            model, notes = checkpoint.fill(
                build,
                lambda model: shape(model)["input_size"][1:],
                _timm_heads,
                options.get("num_classes"),
            )
    except NarrowsError:
        raise
    except Exception as error:  # the hub, the network, the disk and timm fail in ways of their own
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}" if str(error) else type(error).__name__
        if checkpoint is not None or isinstance(error, TypeError | AssertionError):
            refused = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "its own arguments"
            raise InvalidArgument(
                "model", expected=f"one that takes {refused}", got=f"timm:{name} ({reason})"
            ) from error
        raise NarrowsError(f"The weights of timm:{name} could not be downloaded ({reason}). {_WITHOUT_HUB}") from error
    if side is not None:
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(1, arguments.get("channels", 3), side, side))
        except Exception as error:  # every model refuses sizes in its own way
            got = f"{side} ({str(error).partition(chr(10))[0][:200]})"
            raise InvalidArgument("image_size", expected=f"a size that timm:{name} takes", got=got) from error
    num_classes = getattr(model, "num_classes", 0)
    named = getattr(model, "pretrained_cfg", {}).get("label_names")
    wordnet = ImageNetInfo().label_names() if num_classes == 1000 else ()
    config = shape(model)
    return LoadedModel(
        name=f"timm:{name}",
        module=model.eval(),
        size=config["input_size"][1:],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        num_classes=num_classes,
        classes=tuple(named or wordnet),
        prepare=create_transform(**config, is_training=False),  # pyright: ignore[reportArgumentType]
        notes=notes,
    )


def _check_timms_weights(name: str) -> None:
    """Raise unless the hub or the cache has what `timm.create_model` will ask for."""
    from timm.models import get_pretrained_cfg

    source, _, rest = name.rpartition(":")
    found = None if source else get_pretrained_cfg(name)
    repository = (found.hf_hub_id if found else rest if source.startswith("hf") else None) or ""
    if "/" in repository:
        check_hub(repository.partition("@")[0], hint=_WITHOUT_HUB)


def _timm_arguments(model: nn.Module) -> dict[str, Any]:
    """Channels and size of a model of timm's where it was made for others: timm itself writes them since 1.0.31."""
    embedding: Any = getattr(model, "patch_embed", None)
    first = next((part for part in model.modules() if isinstance(part, nn.Conv2d)), None)
    channels, *usual = cast(Any, model).pretrained_cfg["input_size"]
    size = getattr(embedding, "img_size", None)
    made: dict[str, Any] = {} if first is None or first.in_channels == channels else {"in_chans": first.in_channels}
    return made if size is None or list(size) == usual else {**made, "img_size": list(size)}


def _timm_heads(model: nn.Module) -> Sequence[str]:
    named = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    names = (named,) if isinstance(named, str) else tuple(named)
    own = dict(model.named_modules())
    return [name for name in names if isinstance(own.get(name), nn.Linear)] or names


def _renamed_by_timm(model: nn.Module, weights: Renamed) -> Renamed:
    """The weights under timm's names where timm's own filter for the model's other releases knows theirs."""
    expected = model.state_dict()
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None or not hasattr(model, "pretrained_cfg") or not misfits(expected, weights, {}):
        return weights
    try:
        renamed = Renamed(convert(dict(weights), model))
    except Exception:  # it trusts what it is given
        return weights
    # It would also make another patch size of a patch embedding, which is another network.
    patch = [name for name in weights if name.endswith("patch_embed.proj.weight")]
    same = all(name not in renamed or renamed[name].shape == weights[name].shape for name in patch)
    return renamed if same and not misfits(expected, renamed, {}) else weights


def _open_transformers(name: str, checkpoint: Checkpoint | None, arguments: Mapping[str, Any]) -> LoadedModel:
    """By its name on the hub or by its folder: the classifier, or else the image encoder."""
    try:
        import transformers
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
    except ImportError as error:
        raise MissingExtra("transformers", extra="transformers", purpose="open a model of transformers'") from error
    if arguments:
        expected = "a model of timm or of narrows: those of transformers are opened as they are"
        raise InvalidArgument("model", expected=expected, got=f"{f'hf:{name}'!r} with {dict(arguments)}")
    if not Path(name).is_dir():
        check_hub(name, hint=f"If it is a folder, check the path; else {FETCH.format(name)}.")
    config, processor = _read(name, AutoConfig), _read(name, AutoImageProcessor)
    check_claimed_layers("model", config, name)
    architecture = (config.architectures or [""])[0]
    kind: Any = AutoModelForImageClassification if architecture.endswith("ForImageClassification") else AutoModel
    classifies = kind is AutoModelForImageClassification
    if hasattr(config, "vision_config") and not classifies:  # of several towers the one that sees
        kind = getattr(transformers, f"{type(config).__name__.removesuffix('Config')}VisionModel", kind)
    notes: tuple[str, ...] = ()
    if checkpoint is None:
        model, notes = _read_model(name, kind)
    else:

        def build(classes: int | None) -> nn.Module:
            if not hasattr(kind, "from_config"):
                return kind(config.vision_config)
            if classes:
                config.num_labels = classes
            chosen = AutoModel if classes == 0 else kind
            return chosen.from_config(config, trust_remote_code=False)

        def size(model: nn.Module) -> tuple[int, int]:
            side: Any = getattr(model.config, "image_size", 0)
            return (side, side) if isinstance(side, int) else tuple(side)

        model, notes = checkpoint.fill(build, size, lambda _: ("classifier",) if classifies else (), None)
        classifies = classifies and hasattr(model, "classifier")
    side = getattr(getattr(model.config, "vision_config", model.config), "image_size", None)
    if hasattr(model.config, "tubelet_size"):
        raise InvalidArgument(
            "model", expected="a model of images", got=f"a {type(model).__name__}, which takes videos"
        )
    if side is None:
        raise InvalidArgument("model", expected="a vision transformer of transformers'", got=type(model).__name__)
    return LoadedModel(
        name=f"hf:{name}",
        module=model.eval(),
        size=(side, side) if isinstance(side, int) else tuple(side),
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        num_classes=config.num_labels if classifies else 0,
        classes=tuple(config.id2label[index] for index in range(config.num_labels)) if classifies else (),
        prepare=partial(_prepare, processor),
        notes=notes,
    )


def _prepare(processor: Any, image: "Image.Image") -> Tensor:
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def _read_model(name: str, kind: Any) -> tuple[Any, tuple[str, ...]]:
    """A model with all of its weights: transformers draws what is missing at random, and only warns."""
    from transformers import AutoModel
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else every weight of the other tower is listed
    try:
        model, report = _read(name, kind, output_loading_info=True)
        missing = sorted(report["missing_keys"])
        if missing and hasattr(kind, "config_class"):  # a tower that only the whole finds its weights for
            whole, report = _read(name, AutoModel, output_loading_info=True)
            missing = [key for key in report["missing_keys"] if key.startswith("vision_model.")]
            model = whole.vision_model
    finally:
        logging.set_verbosity(verbosity)
    if missing and all("pooler." in key for key in missing):
        model, _ = _read(name, kind, output_loading_info=True, add_pooling_layer=False)
        return model, ("The saved weights have no pooler: features are those of the first token",)
    if missing:
        got = f"{f'hf:{name}'!r} without {few(missing)}"
        raise InvalidArgument("model", expected=f"all weights of a {type(model).__name__}", got=got)
    check_no_surplus_layers("model", f"hf:{name}", model, report)
    return model, ()


def _read(name: str, kind: Any, **options: Any) -> Any:
    local = Path(name).is_dir()
    try:
        return kind.from_pretrained(name, local_files_only=local, trust_remote_code=False, **options)
    except Exception as error:  # the hub, the network, the disk and transformers fail in ways of their own
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if local:
            expected = "a folder with config.json, preprocessor_config.json and weights"
            raise InvalidArgument("model", expected=expected, got=f"{name!r} ({reason})") from error
        raise NarrowsError(
            f"{name} could not be downloaded from the hub ({reason}). If it is a folder, check the path; else "
            f"{FETCH.format(name)}."
        ) from error


def check_hub(repository: str, *, hint: str) -> None:
    """Ask the hub once for a repository of which nothing is in the cache: its client asks again for half a minute.

    Raises:
        NarrowsError: no answer.
    """
    try:
        snapshot_download(repository, local_files_only=True)
    except LocalEntryNotFoundError:
        try:
            get_hf_file_metadata(hf_hub_url(repository, "config.json"))
        except HfHubHTTPError:  # an answer, if no file
            return
        except Exception as error:  # by the version of the client, any of its network's
            reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
            raise NarrowsError(f"{repository} is not here, and the hub does not answer ({reason}). {hint}") from error
    except HFValidationError:  # no name of a repository, which is said elsewhere
        return
