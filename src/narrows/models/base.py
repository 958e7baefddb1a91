"""Base classes: of everything that is saved to a folder, and of image classifiers."""

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, constants, hf_hub_download
from jaxtyping import Float
from torch import Tensor, nn

from narrows.errors import InvalidArgument, InvalidType, NarrowsError
from narrows.files import replacing_folder
from narrows.layers.initialisation import reset_submodules
from narrows.models.card import model_card, named_classes
from narrows.routing import Routing
from narrows.validation import check_tensor
from narrows.weights import check_fits, config_text, load_strictly, misfits, read_config, read_file, write_safetensors

MODEL_CARD = "README.md"
UNSAVED = "not_saved"
"""Key of a configuration that names the constructor's arguments that are not in it."""
CLASSES = "classes"
"""Key of a configuration that names the classes, in the order of the logits."""
ABOUT = "about"
"""Key of a configuration that says what a model was trained on, and what it reaches."""
_PLACE = ("device", "dtype")
_NAMED = 3
_LARGEST_SIZE = 2**14


class SavedWhole:
    """Makes `save_pretrained` of `huggingface_hub` write a folder whole or not at all."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str | None:
        """Write weights, configuration and a model card, unless there is one already.

        Args:
            save_directory: the folder.
            repo_id: what the model is called on the hub; by default as the folder.
            model_card_kwargs: further rows of the card's table: {"Data": "flowers", "Held-out accuracy": "93.5 %"}.
            options: those of `huggingface_hub`; `push_to_hub=True` uploads it too.

        Raises:
            CannotWrite: the folder or the disk refuses; what was there is as it was.
        """
        folder = Path(save_directory)
        card = {"model_id": repo_id or folder.name, **(model_card_kwargs or {})}
        with replacing_folder(folder) as unfinished:
            url: str | None = super().save_pretrained(  # pyright: ignore[reportAttributeAccessIssue]
                unfinished, repo_id=repo_id or folder.name, model_card_kwargs=card, **options
            )
            config = unfinished / constants.CONFIG_NAME
            config.write_text(config_text(read_config(config)), encoding="utf-8")
            if (folder / MODEL_CARD).exists():  # somebody may have written more into it
                (unfinished / MODEL_CARD).unlink()
        return url

    def push_to_hub(self, repo_id: str, *, model_card_kwargs: Mapping[str, Any] | None = None, **options: Any) -> str:
        """Upload weights, configuration and model card to a repository of the Hugging Face hub; the commit's address.

        Args:
            repo_id: "user/name"; made where there is none.
            model_card_kwargs: further rows of the card's table.
            options: those of `huggingface_hub`: `private`, `token`, `commit_message` and others.
        """
        card = {"model_id": repo_id, **(model_card_kwargs or {})}
        return super().push_to_hub(repo_id, model_card_kwargs=card, **options)  # pyright: ignore[reportAttributeAccessIssue]

    def generate_model_card(self, *, model_id: str, **rows: Any) -> ModelCard:
        """What is known of the model: `card_rows`, further `rows`, and the code that loads it."""
        info = cast(Any, self)._hub_mixin_info.model_card_data
        return model_card(
            cast(nn.Module, self),
            model_id,
            task=info.pipeline_tag,
            code=self.card_code(model_id),
            rows={**self.card_rows(), **rows},
            tags=info.tags,
        )

    def card_code(self, model_id: str) -> str:
        """Python that loads the model by its name."""
        kind = type(self)
        return f"from {kind.__module__} import {kind.__name__}\n\nmodel = {kind.__name__}.from_pretrained({model_id!r})"

    def card_rows(self) -> dict[str, str]:
        """What is known of the model beside its task and size, for its card."""
        return {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """What `save_pretrained` wrote; `options` are those of `huggingface_hub` and of the constructor.

        Raises:
            InvalidArgument: a configuration that is damaged or was changed.
        """
        config = Path(pretrained_model_name_or_path) / constants.CONFIG_NAME
        if config.exists():
            read_config(config)
        return super().from_pretrained(pretrained_model_name_or_path, **options)  # pyright: ignore[reportAttributeAccessIssue]


class SavedModel(
    nn.Module,
    SavedWhole,
    PyTorchModelHubMixin,
    library_name="narrows",
    tags=["narrows", "token-bottleneck"],
):
    """Base class of models that are saved with their constructor's arguments and can draw their parameters anew.

    `save_pretrained(folder)` writes safetensors and the constructor's arguments as `config.json`, each with a checksum;
    `from_pretrained(folder)` reads both, and takes a repository of the Hugging Face hub too. Device and dtype are not
    among the arguments: where and in what precision a model was built is no part of what it is. Nor are those that are
    no JSON, such as a module: they have to be given to `from_pretrained` again.
    """

    classes: tuple[str, ...] = ()
    """What the logits are called, in their order; empty where nobody said. Saved with the model."""
    about: Mapping[str, str] = MappingProxyType({})
    """What it was trained on and what it reaches, by what each is called. Saved with the model, and in its card."""
    _unsaved: list[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Notes which arguments cannot be saved: `huggingface_hub` would write their defaults in their place."""
        made = super().__new__(cls, *args, **kwargs)
        given = {**dict(zip(list(cls._hub_mixin_init_parameters)[1:], args, strict=False)), **kwargs}
        made._unsaved = [name for name in given if name not in _PLACE and not cls._is_jsonable(given[name])]
        return made

    def __init__(self) -> None:
        super().__init__()
        arguments = cast(dict[str, Any], self._hub_mixin_config or {})
        what = {name: value for name, value in arguments.items() if name not in (*_PLACE, *self._unsaved)}
        # Without the name of its class a folder could not be opened by `load_model`.
        self._hub_mixin_config = {**what, "architecture": type(self).__name__}
        if self._unsaved:
            self._hub_mixin_config[UNSAVED] = self._unsaved

    def _save_pretrained(self, save_directory: Path) -> None:
        config = cast(dict[str, Any], self._hub_mixin_config)
        if not self._unsaved:
            self._check_as_built({name: value for name, value in config.items() if name != "architecture"})
        said = {CLASSES: list(self.classes), ABOUT: dict(self.about)}
        entries = {**config, **{name: value for name, value in said.items() if value}}
        (save_directory / constants.CONFIG_NAME).write_text(json.dumps(entries, sort_keys=True), encoding="utf-8")
        write_safetensors(self.state_dict(), save_directory / constants.SAFETENSORS_SINGLE_FILE)

    def _check_as_built(self, arguments: Mapping[str, Any]) -> None:
        """Raise unless the constructor makes the same parts: others would be lost, or their weights not fit."""
        built = cast(Any, type(self))(**arguments, device="meta")
        wrong = misfits(built.state_dict(), self.state_dict(), {})
        own = dict(self.named_modules())
        for name, part in built.named_modules():
            is_leaf = not any(part.children())
            if is_leaf and name in own and (type(own[name]), repr(own[name])) != (type(part), repr(part)):
                wrong.append(f"{name} is now {own[name]!r}, not {part!r}")
        if wrong:
            raise InvalidArgument(
                "model",
                expected=f"the parts that {type(self).__name__} makes of its arguments, which are what is saved",
                got=f"others: {', '.join(wrong[:_NAMED])}",
                hint="Undo the change, or build the model with arguments that make it; "
                "torch.save(model.state_dict()) saves any weights.",
            )

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: str | torch.device = "cpu",
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **arguments: Any,
    ) -> Any:
        """The model that `save_pretrained` wrote, in evaluation mode: its weights, all of them and no others.

        Args:
            pretrained_model_name_or_path: a folder, or a repository of the Hugging Face hub.
            map_location: where the parameters are put.
            force_download, token, cache_dir, local_files_only, revision: as `huggingface_hub` takes them.
            arguments: of the constructor, over those that were saved.

        Raises:
            InvalidArgument: a file that is missing, damaged or was changed, unknown arguments, weights of another
                model; the message names what does not fit.
            NarrowsError: a repository that cannot be downloaded.
        """
        place = Path(pretrained_model_name_or_path)
        names = (constants.CONFIG_NAME, constants.SAFETENSORS_SINGLE_FILE)
        if place.is_dir():
            config_file, weights_file = (place / name for name in names)
        else:
            download = {
                "force_download": force_download,
                "token": token,
                "cache_dir": cache_dir,
                "local_files_only": local_files_only,
                "revision": revision,
            }
            try:
                config_file, weights_file = (Path(hf_hub_download(str(place), name, **download)) for name in names)
            except Exception as error:  # the hub, the network and the disk fail in ways of their own
                reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                raise NarrowsError(
                    f"{place} is no folder, and could not be downloaded from the hub ({reason}). Check the path."
                ) from error
        parameters = [name for name in cls._hub_mixin_init_parameters if name != "self"]
        config = read_config(config_file, {*parameters, "architecture", UNSAVED, CLASSES, ABOUT})
        if config.pop("architecture", cls.__name__) != cls.__name__:
            raise InvalidArgument("architecture", expected=repr(cls.__name__), got=f"another one in {config_file}")
        for name in config.pop(UNSAVED, ()):
            if name not in arguments:
                expected = f"what the saved {cls.__name__} was built with, which cannot be saved"
                raise InvalidArgument(name, expected=expected, got=None, hint=f"from_pretrained(..., {name}=...)")
        classes = config.pop(CLASSES, [])
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            expected = "a list of the names of the classes"
            raise InvalidArgument(f"config.json: {CLASSES}", expected=expected, got=f"{classes!r} in {config_file}")
        about = config.pop(ABOUT, {})
        if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
            expected = "texts by their names"
            raise InvalidArgument(f"config.json: {ABOUT}", expected=expected, got=f"{about!r} in {config_file}")
        weights = cast(dict[str, Tensor], read_file(weights_file, argument="weights"))
        _check_sizes(config, weights)
        model = cls._built({**config, **arguments}, weights, str(config_file))
        load_strictly(model, weights, argument="weights", where=str(weights_file))
        model.classes, model.about = tuple(classes), about
        return model.to(map_location).eval()

    @classmethod
    def _built(cls, arguments: Mapping[str, Any], weights: Mapping[str, Tensor], where: str) -> Any:
        """A model of these arguments, once one without memory has shown that the weights are its."""
        try:
            if not any(isinstance(value, nn.Module) for value in arguments.values()):
                check_fits(cls(**{**arguments, "device": "meta"}), weights, argument="weights", where=where)
            return cls(**arguments)
        except NarrowsError:
            raise
        except Exception as error:  # a constructor trusts the types of its arguments
            reason = str(error).partition("\n")[0]
            raise InvalidArgument(
                "config.json", expected=f"arguments of a {cls.__name__}", got=f"others in {where!r} ({reason})"
            ) from error

    def card_rows(self) -> dict[str, str]:
        """Classes, size of images, and what `about` says."""
        config = cast(dict[str, Any], self._hub_mixin_config)
        size, channels = config.get("image_size"), config.get("channels")
        known = [] if size is None else [f"{size} × {size} pixels"]
        known += [] if channels is None else ["grey"] if channels == 1 else [f"{channels} channels"]
        images = {"Images": ", ".join(known)} if known else {}
        return {**images, **named_classes(self.classes), **self.about}

    def reset_parameters(self) -> None:
        """Draw every parameter anew, from the distribution that the constructor draws it from.

        A model built on the meta device gets its parameters so, after `model.to_empty(device=...)`.
        """
        reset_submodules(self)


class ImageClassifier(SavedModel, pipeline_tag="image-classification"):
    """Base class: images `[B, C, H, W]` in, logits `[B, num_classes]` out.

    A subclass implements `forward_features`, `forward_head` and `token_grid`.
    """

    def forward_features(self, images: Float[Tensor, "B C H W"]) -> Tensor:
        """The features that `forward_head` takes."""
        raise NotImplementedError

    def forward_head(self, features: Tensor) -> Float[Tensor, "B classes"]:
        """Logits from what `forward_features` returns."""
        raise NotImplementedError

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        """Logits `[B, num_classes]`, one row for each image."""
        return self.forward_head(self.forward_features(images))

    def token_grid(self, images: Float[Tensor, "B C H W"]) -> tuple[int, int]:
        """`(height, width)` of the grid of tokens that these images become."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone, beside biases and norms."""
        return set()

    @torch.no_grad()
    def routing(self, images: Float[Tensor, "B C H W"]) -> tuple[Routing, ...]:
        """Where the tokens of these images go: one `Routing` for each bottleneck, in the order they are passed.

        Every submodule with a method `routing` is asked with the arguments its `forward` gets. Where that routing
        stands on no grid and counts the model's tokens, it is placed on the model's grid.
        """
        recorded: list[Routing] = []
        names = {module: name for name, module in self.named_modules()}
        asking, thread = False, threading.get_ident()

        # Without keywords it is called where another thread takes its hook away meanwhile.
        def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            nonlocal asking
            # A routing() that calls submodules must not record those again; other threads run the model too.
            if asking or kwargs is None or threading.get_ident() != thread:
                return
            asking = True
            answer: Routing = module.routing(*args, **kwargs)  # pyright: ignore[reportCallIssue]
            asking = False
            recorded.append(self._placed(answer, names[module], self.token_grid(images)))

        bottlenecks = [module for module in names if module is not self and hasattr(module, "routing")]
        handles = [module.register_forward_pre_hook(ask, with_kwargs=True) for module in bottlenecks]
        try:
            self(images)
        finally:
            for handle in handles:
                handle.remove()
        return tuple(recorded)

    @staticmethod
    def _placed(routing: Routing, name: str, grid: tuple[int, int]) -> Routing:
        placed = replace(routing, name=name)
        prefix = routing.weights.shape[-1] - grid[0] * grid[1]
        # A model has at most a class token before its grid; anything else is not the model's own token sequence.
        return placed.with_grid(grid, prefix=prefix) if routing.grid is None and prefix in (0, 1) else placed


def check_images(images: Tensor, channels: int) -> None:
    """Raise unless `images` are numbers `[B, channels, H, W]`."""
    check_tensor("images", images, expected=f"a tensor [B, {channels}, H, W]")
    if not images.is_floating_point():
        raise InvalidType(
            "images", expected="a floating-point tensor", got=f"dtype {images.dtype}", hint="Normalise them first."
        )
    if images.ndim != 4 or images.shape[1] != channels:
        raise InvalidArgument(
            "images", expected=f"shape [B, C, H, W] with C = {channels}", got=f"shape {tuple(images.shape)}"
        )


def _check_sizes(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Raise, before anything is built, on numbers that no model with these weights can have."""

    def numbers(value: Any) -> Iterator[int]:
        if isinstance(value, int):
            yield abs(value)
        elif isinstance(value, list | dict):
            for each in value.values() if isinstance(value, dict) else value:
                yield from numbers(each)

    widest = max((side for value in weights.values() for side in value.shape), default=0)
    for name, value in config.items():
        # Every block has a parameter of its own, at least.
        limit = len(weights) if "depth" in name else max(widest, _LARGEST_SIZE)
        if (greatest := max(numbers(value), default=0)) > limit:
            expected = f"a number up to {limit:,}, as there are weights for it"
            raise InvalidArgument(f"config.json: {name}", expected=expected, got=f"{greatest:,}")
