"""The state of a call of a `Flamingo`, and of each forward pass of the language model in it.

Hooks find both through context variables that are set in a copy of the caller's context: they are not visible in other
threads, nor after the call, even if it raised. A decoder layer that is run again in the backward pass, in whatever
thread, finds its pass by its input (`LayerInputs`).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from narrows.adapters.flamingo.host import execution_device
from narrows.adapters.flamingo.memory import MediaMemory, append
from narrows.errors import InvalidArgument, NarrowsError
from narrows.layers.gated_cross_attention import GatedCrossAttentionBlock, MediaKeysValues
from narrows.ops.media_attention import Attend
from narrows.routing import Routing


@dataclass
class MediaCall:
    """The media of one call of `forward` or `generate`.

    Args:
        media: `[B, M, N, D]`, latents of the new media.
        counts: `[B]`, number of new media of each row.
        locations: `[B, T]`, True at media tokens of the new text. Generated text holds no media, whatever its tokens.
        start: number of text tokens before, in the cache.
        whole: whether all of the new text is read in one pass.
        virtual: number of positions that a prompt of peft puts before the text; known in the first pass is how.
        document_starts: `[B, T]`, True where documents packed into one row begin, or None.
        routings: a list to append the routing of each block to, or None.
        begun: whether the language model has begun to read.
    """

    media: Float[Tensor, "B M N D"]
    counts: Int[Tensor, " B"]
    locations: Bool[Tensor, "B T"]
    start: int
    whole: bool
    virtual: int = 0
    document_starts: Bool[Tensor, "B T"] | None = None
    routings: list[Routing] | None = None
    begun: bool = False

    def begin(self, start: int, length: int, *, known: bool) -> None:
        """Note that a pass over `length` tokens begins behind `start` others; raise where that is not this text.

        `known`: whether the cache has a memory of those.
        """
        if not self.begun and self.virtual:
            if start == self.start + self.virtual:  # as keys and values
                self.start = start
            elif start == self.start and length == self.locations.shape[1] + self.virtual:  # as embeddings
                self.locations = pad(self.locations, (self.virtual, 0))
        first, new = not self.begun, self.locations.shape[1]
        self.begun = True
        follows = start == self.start if first else start == self.start or (start > self.start and known)
        if follows and (not self.whole or length == new):
            return
        raise InvalidArgument(
            "language_model",
            expected=f"a pass over the {new} tokens of the call's text, behind {self.start} others",
            got=f"one over {length} tokens behind {start}",
            hint="Something around the language model reads another text, so places of media are not known in it.",
        )

    def locations_at(self, start: int, length: int) -> Bool[Tensor, "B length"]:
        """`locations` of `length` tokens from `start` on, False beyond the new text."""
        given = self.locations[:, start - self.start : start - self.start + length]
        return pad(given, (0, length - given.shape[1]))


class MediaPass:
    """One forward pass of the language model: which media its tokens see, and the memory that it leaves.

    Without gradients each block projects a medium once, and the memory keeps keys and values. With gradients a block
    projects in its own forward, where FSDP has gathered its parameters, and no part of the graph is kept.

    Args:
        call: the call it is part of.
        memory: of the text before, or None.
        batch, start, length: shape of the current tokens, after `start` others.
        attend: which media text may see.
    """

    def __init__(
        self, call: MediaCall, memory: MediaMemory | None, *, batch: int, start: int, length: int, attend: Attend
    ) -> None:
        self.shape = (batch, length)
        before = MediaMemory.of_text(batch, start, call.media) if memory is None else memory
        # The media of the call are new in the first pass over its text; after that the memory has them.
        self._new = call.media if start == call.start and call.media.shape[1] else None
        self._repeats = batch // len(call.media)
        after = before if self._new is None else before.with_media(self._new, call.counts)
        locations = call.locations_at(start, length).repeat_interleave(self._repeats, dim=0)
        after = after.with_text(locations, written=start >= call.start + call.locations.shape[1])
        self._visible = attend.visible(after.locations, call.document_starts).rows(after.length - length, after.length)
        self._call, self._before, self._after = call, before, after
        self._kept: list[MediaKeysValues] = []
        self._read_all = start + length >= call.start + call.locations.shape[1]
        self.differentiable = torch.is_grad_enabled()
        keeps = not self.differentiable
        self._dropped = after.dropped if keeps and before.keys_values else torch.zeros_like(after.dropped)

    def read(
        self, number: int, block: GatedCrossAttentionBlock, text: Float[Tensor, "R T D"], *, checkpointed: bool = False
    ) -> Float[Tensor, "R T D"]:
        """The text after block `number`, in its own dtype; `checkpointed`: with activation checkpointing."""
        gate = block.attn_gate
        device = execution_device(block, gate)
        inside = text.to(device, gate.dtype)
        if self.differentiable:
            media = self._after.latents[self._after.sample].to(device, gate.dtype)
        else:
            media = self._keys_values(number, block, device)
        visible = self._visible
        first, last = (numbers - self._dropped[:, None] for numbers in (visible.first, visible.last))
        visible = visible._replace(first=first.to(device), last=last.to(device))
        if self._call.routings is not None:
            with _gathered(block):
                queries = inside.to(block.attn_gate.dtype)  # that of FSDP's mixed precision
                self._call.routings.append(block.routing(queries, media, visible=visible))
        if checkpointed and self.differentiable:
            return checkpoint(block, inside, media, visible=visible, use_reentrant=False).to(text)
        return block(inside, media, visible=visible).to(text)

    def memory(self) -> MediaMemory:
        """The memory for the text after this pass."""
        kept = tuple(self._kept)
        if not kept:
            return replace(self._after, keys_values=None, dropped=torch.zeros_like(self._after.dropped))
        memory = replace(self._after, keys_values=kept, dropped=self._dropped)
        columns, most = kept[0].key.shape[1], self._visible.most
        settled = self._new is None and self._before.keys_values is not None and (most is None or columns <= most)
        # Later text sees no medium before the first that the last token sees, and where none is to come, no more.
        return memory if settled else memory.seen_from(self._visible.first[:, -1], most if self._read_all else None)

    def _keys_values(self, number: int, block: GatedCrossAttentionBlock, device: torch.device) -> MediaKeysValues:
        """Keys and values of the media that tokens of this pass may see, projected once."""
        before = self._before
        if before.keys_values is not None and self._new is None:
            made = before.keys_values[number]
        else:
            media = self._after.latents if before.keys_values is None else self._new
            assert media is not None
            with _gathered(block):
                key, value, _ = block.keys_values(media.to(device, block.attn_gate.dtype))
            if before.keys_values is None:
                sample = self._after.sample.to(device)
                made = MediaKeysValues(key[sample], value[sample])
            else:
                counts = (before.counts - before.dropped).to(device)
                old = before.keys_values[number]
                key, value = (new.repeat_interleave(self._repeats, 0) for new in (key, value))
                made = MediaKeysValues(append(old.key, counts, key), append(old.value, counts, value))
        self._kept.append(made)
        return made


@contextmanager
def _unsharded(module: FSDPModule) -> Any:
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def _gathered(module: nn.Module) -> AbstractContextManager[object]:
    """A context in which a module whose parameters are sharded (FSDP2) has them, outside of its `forward`."""
    return _unsharded(module) if isinstance(module, FSDPModule) else nullcontext()


class LayerInputs:
    """The passes whose decoder layers may be run again, by the hidden states that went into a layer.

    Activation checkpointing keeps the input of what it runs again, and passes the very same tensor. A copy of a model
    has none of them.
    """

    def __init__(self) -> None:
        self._passes = WeakTensorKeyDictionary()
        self._lock = Lock()

    def __reduce__(self) -> tuple[type["LayerInputs"], tuple[()]]:
        """Nothing of a pass is copied or pickled."""
        return LayerInputs, ()

    def note(self, text: Tensor, one: MediaPass) -> None:
        """Remember the pass that `text` is part of, as long as there is that tensor."""
        with self._lock:
            self._passes[text] = one

    def find(self, text: Tensor) -> MediaPass | None:
        """The pass that `text` is part of, if it was noted."""
        with self._lock:
            return self._passes.get(text)


CALL: ContextVar[tuple[object, MediaCall] | None] = ContextVar("narrows_media_call", default=None)
PASS: ContextVar[tuple[object, MediaPass] | None] = ContextVar("narrows_media_pass", default=None)


def run(owner: Any, call: MediaCall, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `function(*args, **kwargs)` with `call` as the current call of `owner`.

    Raises:
        NarrowsError: the language model did not run, or where it cannot know of the call.
    """
    if torch.compiler.is_compiling():  # A graph holds the state in the owner: only the compiler ever sees it there.
        owner.traced_call = call
        output = function(*args, **kwargs)
        owner.traced_call = None
    else:
        context = copy_context()
        context.run(CALL.set, (owner, call))
        output = context.run(function, *args, **kwargs)
    if not call.begun:
        raise NarrowsError(
            "The language model read its text without the media of the call: it ran in another thread or process, "
            "something other than it ran, or what wraps it ran its forward past its hooks, as peft before 0.21 does. "
            "Let it run where it is called, by calling it."
        )
    return output


def current(owner: object, variable: ContextVar[tuple[object, Any] | None]) -> Any:
    """The value of `variable` if `owner` set it, else None."""
    found = variable.get()
    return None if found is None or found[0] is not owner else found[1]
