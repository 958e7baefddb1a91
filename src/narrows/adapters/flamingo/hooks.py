"""Hooks on a language model and on its decoder layers that run the gated blocks; nothing else touches it."""

from collections.abc import Mapping
from functools import partial
from threading import Lock
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from narrows.adapters.flamingo.call import CALL, PASS, LayerInputs, MediaCall, MediaPass, current
from narrows.adapters.flamingo.host import Host
from narrows.adapters.flamingo.memory import cache_of, read_memory, text_cache, text_length, write_memory
from narrows.errors import InvalidArgument
from narrows.ops.media_attention import Attend

_FOLLOWING = Lock()


class MediaHooks:
    """Hooks that run gated cross attention blocks between decoder layers, in calls with a `MediaCall`.

    A call of the language model on its own is left alone.

    Args:
        host: the language model.
        blocks: gated cross attention blocks by the number of their decoder layer.
        placement: "before" or "after" the layer.
        attend: which media text may see.
    """

    def __init__(self, host: Host, blocks: Mapping[int, Any], *, placement: str, attend: Attend) -> None:
        self.attend, self.placement, self.key = attend, placement, uuid4().hex
        self.traced_call: MediaCall | None = None
        self._traced_pass: MediaPass | None = None
        self._inputs = LayerInputs()
        self._layers, self._blocks, self._cached = host.layers, dict(blocks), host.cached
        self._handles: list[RemovableHandle] = [
            host.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            host.model.register_forward_hook(self._end, with_kwargs=True),
        ]
        self._on_layers: dict[int, tuple[nn.Module, RemovableHandle]] = {}
        self.follow_layers()

    def follow_layers(self) -> None:
        """Put the hooks on what stands in the list of decoder layers now.

        What checkpoints, compiles or shards a layer takes its place there, and what a block does stays outside of it.
        """
        with _FOLLOWING:
            for number, (layer_number, block) in enumerate(self._blocks.items()):
                layer, before = self._layers[layer_number], self._on_layers.get(number)
                if before is not None and before[0] is layer:
                    continue
                if before is not None:
                    before[1].remove()
                reads = partial(self._read, number, block)
                if self.placement == "before":
                    handle = layer.register_forward_pre_hook(partial(_before, reads), with_kwargs=True)
                else:
                    handle = layer.register_forward_hook(partial(_after, reads), with_kwargs=True)
                self._on_layers[number] = layer, handle

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in (*self._handles, *(handle for _, handle in self._on_layers.values())):
            handle.remove()

    def headless(self, backbone: nn.Module, **kwargs: Any) -> Any:
        """What the language model's backbone returns, called by itself: no hook on the model around it runs."""
        self._begin(backbone, (), kwargs)
        output = backbone(**kwargs)
        self._end(backbone, (), kwargs, output)
        return output

    # All four are called without their last argument where another thread removes them meanwhile; no call of theirs is.

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Before the language model: start a pass."""
        if kwargs is None:
            return
        compiling = torch.compiler.is_compiling()
        call = self.traced_call if compiling and self.traced_call is not None else current(self, CALL)
        if call is None:
            return
        batch, length = _text_shape(args, kwargs)
        cache = cache_of(kwargs) if self._cached else None
        memory, start = read_memory(cache, self.key), text_length(cache)
        call.begin(start, length, known=memory is not None)
        one = MediaPass(call, memory, batch=batch, start=start, length=length, attend=self.attend)
        if compiling:
            self._traced_pass = one
        else:
            PASS.set((self, one))

    def _end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        """After the language model: store the memory in its cache."""
        if output is None:
            return
        one = self._pass()
        if one is not None and torch.compiler.is_compiling():
            self._traced_pass = None
        elif one is not None:
            PASS.set(None)
        parts = output if isinstance(output, tuple) else output.values()
        cache = next((part for part in map(text_cache, parts) if part is not None), cache_of(kwargs))
        if cache is None or not self._cached:
            return
        if one is not None:
            write_memory(cache, self.key, one.memory())
        elif (memory := read_memory(cache, self.key)) is not None:  # text that was read without its media
            none = torch.zeros(_text_shape(args, kwargs), dtype=torch.bool, device=memory.locations.device)
            write_memory(cache, self.key, memory.with_text(none, written=True))

    def _pass(self) -> MediaPass | None:
        if torch.compiler.is_compiling() and self._traced_pass is not None:
            return self._traced_pass
        return current(self, PASS)

    def _read(self, number: int, block: Any, layer: nn.Module, given: Tensor, text: Tensor) -> Tensor | None:
        """The hidden states `text` after their block; None outside of a `MediaCall`.

        `given` are the hidden states that went into the layer.
        """
        one = self._pass()
        if one is None:
            if torch.compiler.is_compiling() or (one := self._inputs.find(given)) is None:
                return None
        elif one.differentiable and not torch.compiler.is_compiling():
            if not torch.is_grad_enabled():
                raise InvalidArgument(
                    "language_model",
                    expected="activation checkpointing around its decoder layers by their own class, by a wrapper in "
                    "their place, or with use_reentrant=False",
                    got=f"reentrant checkpointing inside of which {type(layer).__name__} is called",
                )
            self._inputs.note(given, one)
        if text.shape[:-1] != one.shape:
            raise InvalidArgument(
                "language_model",
                expected="one hidden state for each token between decoder layers",
                got=f"shape {tuple(text.shape)} for text {one.shape} at {type(layer).__name__}",
                hint="This architecture cannot be supported.",
            )
        checkpointed = layer.training and getattr(layer, "gradient_checkpointing", False)
        return one.read(number, block, text, checkpointed=bool(checkpointed))


def _text_shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    text = kwargs.get("input_ids", args[0] if args else None)
    batch, length = (kwargs["inputs_embeds"] if text is None else text).shape[:2]
    return batch, length


def _before(
    reads: Any, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A block before a decoder layer, whose hidden states come by position or by name."""
    if kwargs is None:
        return None
    given = args[0] if args else kwargs["hidden_states"]
    text = reads(layer, given, given)
    if text is None:
        return None
    return ((text, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": text})


def _after(reads: Any, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Any:
    """A block after a decoder layer, which returns hidden states alone or first in a tuple."""
    if output is None:
        return None
    given = args[0] if args else kwargs["hidden_states"]
    if not isinstance(output, tuple):
        return reads(layer, given, output)
    text = reads(layer, given, output[0])
    return None if text is None else (text, *output[1:])
