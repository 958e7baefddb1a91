"""Base classes: of everything that is saved to a folder, and of image classifiers."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn

from narrows.errors import InvalidArgument
from narrows.files import replacing_folder
from narrows.layers.initialisation import reset_submodules
from narrows.routing import Routing

MODEL_CARD = "README.md"


class SavedWhole:
    """Makes `save_pretrained` of `huggingface_hub` write a folder whole or not at all."""

    def save_pretrained(self, save_directory: str | Path, *, repo_id: str | None = None, **options: Any) -> str | None:
        """Write weights, configuration and a model card; `options` are those of `huggingface_hub`.

        Raises:
            CannotWrite: the folder or the disk refuses; what was there is as it was.
        """
        folder = Path(save_directory)
        with replacing_folder(folder) as unfinished:
            url: str | None = super().save_pretrained(unfinished, repo_id=repo_id or folder.name, **options)  # pyright: ignore[reportAttributeAccessIssue]
            if (folder / MODEL_CARD).exists():  # somebody may have written more into it
                (unfinished / MODEL_CARD).unlink()
        return url


class SavedModel(
    nn.Module,
    SavedWhole,
    PyTorchModelHubMixin,
    library_name="narrows",
    license="apache-2.0",
    tags=["narrows", "token-bottleneck"],
):
    """Base class of models that are saved with their constructor's arguments and can draw their parameters anew.

    Saving and loading come from `huggingface_hub`: `save_pretrained(folder)` writes safetensors and the constructor's
    arguments as `config.json`, `from_pretrained(folder)` reads both. Device and dtype are not among them: where and in
    what precision a model was built is no part of what it is.
    """

    def __init__(self) -> None:
        super().__init__()
        arguments = cast(dict[str, Any], self._hub_mixin_config or {})
        what = {name: value for name, value in arguments.items() if name not in ("device", "dtype")}
        # Without the name of its class a folder could not be opened by `load_model`.
        self._hub_mixin_config = {**what, "architecture": type(self).__name__}

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
        asking = False

        def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal asking
            if asking:  # a routing() that calls submodules must not record those again
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
    """Raise unless `images` is `[B, channels, H, W]`."""
    if images.ndim != 4 or images.shape[1] != channels:
        raise InvalidArgument(
            "images", expected=f"shape [B, C, H, W] with C = {channels}", got=f"shape {tuple(images.shape)}"
        )
