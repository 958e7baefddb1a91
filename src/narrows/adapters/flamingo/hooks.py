"""Hooks on a language model and on its decoder layers that run the gated blocks; nothing else touches it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from narrows.adapters.flamingo.call import CALL, PASS, MediaPass, current
from narrows.adapters.flamingo.host import Host
from narrows.adapters.flamingo.memory import read_memory, text_length, write_memory
from narrows.errors import InvalidArgument
from narrows.ops.media_attention import Attend


class MediaHooks:
    """Hooks that run gated cross attention blocks between decoder layers, in calls with a `MediaCall`.

    A call of the language model on its own is left alone.

    Args:
        host: the language model.
        blocks: gated cross attention blocks by the number of their decoder layer.
        placement: "before" or "after" the layer.
        attend: which media text may see.
    """

    def __init__(self, host: Host, blocks: Mapping[int, nn.Module], *, placement: str, attend: Attend) -> None:
        self.attend = attend
        self._handles: list[RemovableHandle] = [
            host.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            host.model.register_forward_hook(self._end),
        ]
        for number, (layer_number, block) in enumerate(blocks.items()):
            layer, reads = host.layers[layer_number], partial(self._read, number, block)
            if placement == "before":
                hook = layer.register_forward_pre_hook(partial(_before, reads), with_kwargs=True)
            else:
                hook = layer.register_forward_hook(partial(_after, reads))
            self._handles.append(hook)

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the language model: start a pass."""
        if (call := current(self, CALL)) is None:
            return
        text = kwargs.get("input_ids", args[0] if args else None)
        batch, length = (kwargs["inputs_embeds"] if text is None else text).shape[:2]
        cache = kwargs.get("past_key_values")
        memory, start = read_memory(cache), text_length(cache)
        PASS.set((self, MediaPass(call, memory, batch=batch, start=start, length=length, attend=self.attend)))

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the language model: store the memory in its cache."""
        if (one := current(self, PASS)) is None:
            return
        PASS.set(None)
        for part in output if isinstance(output, tuple) else output.values():
            if isinstance(part, Cache):
                write_memory(part, one.memory())

    def _read(self, number: int, block: nn.Module, layer: nn.Module, text: Tensor) -> Tensor | None:
        """The hidden states at a decoder layer after its block; None outside of a `MediaCall`."""
        if (one := current(self, PASS)) is None:
            return None
        if text.shape[:-1] != one.shape:
            raise InvalidArgument(
                "language_model",
                expected="one hidden state for each token between decoder layers",
                got=f"shape {tuple(text.shape)} for text {one.shape} at {type(layer).__name__}",
                hint="This architecture cannot be supported.",
            )
        checkpointed = layer.training and getattr(layer, "gradient_checkpointing", False)
        return one.read(number, block, text, checkpointed=bool(checkpointed))


def _before(
    reads: Any, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A block before a decoder layer, whose hidden states come by position or by name."""
    text = reads(layer, args[0] if args else kwargs["hidden_states"])
    if text is None:
        return None
    return ((text, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": text})


def _after(reads: Any, layer: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
    """A block after a decoder layer, which returns hidden states alone or first in a tuple."""
    if not isinstance(output, tuple):
        return reads(layer, output)
    text = reads(layer, output[0])
    return None if text is None else (text, *output[1:])
