"""What makes a `Flamingo` a model of transformers to those who train one: the Trainer, accelerate."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelHubMixin, constants
from torch import Tensor, nn
from transformers import PreTrainedModel

from narrows.adapters.flamingo.host import Frozen
from narrows.adapters.flamingo.saving import adapter_of, gathered, saved_names
from narrows.models.base import SavedWhole
from narrows.weights import write_safetensors


class PretrainedAddition(SavedWhole, ModelHubMixin, PreTrainedModel):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A `PreTrainedModel` that has configuration, embeddings and loss of the language model in it.

    It saves what was added to that, and what trains of it.

    Args:
        host: the causal language model itself.
    """

    supports_gradient_checkpointing = True
    language_model: nn.Module

    def __init__(self, host: PreTrainedModel) -> None:
        nn.Module.__init__(self)  # that of PreTrainedModel would change the configuration, which is not ours
        self.config = host.config
        self.name_or_path = host.name_or_path
        self.generation_config = getattr(host, "generation_config", None)
        self.loss_type = getattr(host, "loss_type", None)
        takes = inspect.signature(host.forward).parameters.values()
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes)
        self.accepts_loss_kwargs: bool = getattr(host, "accepts_loss_kwargs", takes_any)
        self._loss_name = type(host).__name__
        self.warnings_issued: dict[str, bool] = {}
        self._frozen: Frozen | None = None
        self._state_to_save: Mapping[str, Tensor] | None = None

    @property
    def is_frozen(self) -> bool:
        """Whether language model and encoder were frozen, `freeze=True`."""
        return self._frozen is not None

    @property
    def _keys_to_ignore_on_save(self) -> list[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Names that a checkpoint lacks; the Trainer misses none of them."""
        return sorted(set(self.state_dict()) - saved_names(self))

    def _get_name(self) -> str:
        """The class of the language model, by which the Trainer knows that smoothed labels are those of causal text."""
        return self._loss_name

    def __repr__(self) -> str:
        """The modules, under the name of this class."""
        return super().__repr__().replace(self._loss_name, type(self).__name__, 1)

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Nothing: the language model tied its own."""

    def get_input_embeddings(self) -> Any:
        """Those of the language model."""
        model: Any = self.language_model
        return model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """Those of the language model."""
        model: Any = self.language_model
        return model.get_output_embeddings()

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: str | Path,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        repo_id: str | None = None,
        **options: Any,
    ) -> str | None:
        """Write what was added, and what a peft adapter or `freeze=False` lets train of the language model.

        Args:
            save_directory: a folder; others of its files stay.
            state_dict: weights of this model that are gathered already. None: if they are sharded, every process has
                to call this.
            is_main_process: False: take part in gathering, and write nothing.
            repo_id, options: as `huggingface_hub` takes them.

        Raises:
            CannotWrite: the folder or the disk refuses; what was there is as it was.
        """
        self._state_to_save = gathered(self.state_dict() if state_dict is None else state_dict, saved_names(self))
        try:
            return super().save_pretrained(save_directory, repo_id=repo_id, **options) if is_main_process else None
        finally:
            self._state_to_save = None

    def card_rows(self) -> dict[str, str]:
        """The language model, and how many parameters were added to it."""
        saved, own = saved_names(self), self.state_dict()
        added = sum(own[name].numel() for name in saved if name in own)
        name = Path(str(self.name_or_path or "")).name
        return {
            "Parameters": f"{added:,}, beside those of the language model",
            "Language model": f"{self._loss_name} {name}".strip(),
        }

    def card_code(self, model_id: str) -> str:
        """Python that adds what was saved to a language model."""
        return (
            "import narrows\n\n# language_model and vision_encoder are those it was trained with.\n"
            f"model = narrows.Flamingo.from_pretrained(\n    {model_id!r}, language_model=language_model, "
            "vision_encoder=vision_encoder\n)"
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        assert self._state_to_save is not None
        write_safetensors(self._state_to_save, save_directory / constants.SAFETENSORS_SINGLE_FILE)
        adapter, config = adapter_of(self.language_model), cast(dict[str, Any], self._hub_mixin_config)
        if adapter is not None:
            adapter.save_pretrained(str(save_directory))
        self._hub_mixin_config = config | {"adapter": adapter is not None}
