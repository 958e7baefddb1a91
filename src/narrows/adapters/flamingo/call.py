"""The state of a call of a `Flamingo`, and of each forward pass of the language model in it.

Hooks find both through context variables that are set in a copy of the caller's context: they are not visible in other
threads, nor after the call, even if it raised.
"""

from collections.abc import Callable
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from narrows.adapters.flamingo.memory import MediaMemory, append
from narrows.layers.gated_cross_attention import GatedCrossAttentionBlock, MediaKeysValues
from narrows.ops.media_attention import Attend
from narrows.routing import Routing


@dataclass(frozen=True)
class MediaCall:
    """The media of one call of `forward` or `generate`.

    Args:
        media: `[B, M, N, D]`, latents of the new media.
        counts: `[B]`, number of new media of each row.
        locations: `[B, T]`, True at media tokens of the new text. Generated text holds no media, whatever its tokens.
        start: number of text tokens before, in the cache.
        document_starts: `[B, T]`, True where documents packed into one row begin, or None.
        routings: a list to append the routing of each block to, or None.
    """

    media: Float[Tensor, "B M N D"]
    counts: Int[Tensor, " B"]
    locations: Bool[Tensor, "B T"]
    start: int
    document_starts: Bool[Tensor, "B T"] | None = None
    routings: list[Routing] | None = None

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
        after = after.with_text(call.locations_at(start, length).repeat_interleave(self._repeats, dim=0))
        self._visible = attend.visible(after.locations, call.document_starts).rows(after.length - length, after.length)
        self._call, self._before, self._after = call, before, after
        self._kept: dict[GatedCrossAttentionBlock, MediaKeysValues] = {}
        self._keeps = not torch.is_grad_enabled()
        self._dropped = after.dropped if self._keeps and before.keys_values else torch.zeros_like(after.dropped)

    def read(
        self, number: int, block: GatedCrossAttentionBlock, text: Float[Tensor, "R T D"], *, checkpointed: bool = False
    ) -> Float[Tensor, "R T D"]:
        """The text after block `number`, in its own dtype; `checkpointed`: with activation checkpointing."""
        like = block.attn_gate
        inside = text.to(like.device, like.dtype)
        media = self._keys_values(number, block) if self._keeps else self._after.latents[self._after.sample].to(like)
        dropped = self._dropped[:, None]
        visible = self._visible
        first, last = (visible.first - dropped).to(like.device), (visible.last - dropped).to(like.device)
        visible = visible._replace(first=first, last=last)
        if self._call.routings is not None:
            self._call.routings.append(block.routing(inside, media, visible=visible))
        if checkpointed and not self._keeps:
            return checkpoint(block, inside, media, visible=visible, use_reentrant=False).to(text.dtype)
        return block(inside, media, visible=visible).to(text.dtype)

    def memory(self) -> MediaMemory:
        """The memory for the text after this pass."""
        kept = tuple(self._kept.values())
        if not kept:
            return replace(self._after, keys_values=None, dropped=torch.zeros_like(self._after.dropped))
        memory = replace(self._after, keys_values=kept, dropped=self._dropped)
        columns, most = kept[0].key.shape[1], self._visible.most
        settled = self._new is None and self._before.keys_values is not None and (most is None or columns <= most)
        # Later text sees no medium before the first that the last token sees.
        return memory if settled else memory.seen_from(self._visible.first[:, -1])

    def _keys_values(self, number: int, block: GatedCrossAttentionBlock) -> MediaKeysValues:
        """Keys and values of the media that tokens of this pass may see, projected once."""
        before, like = self._before, block.attn_gate
        if before.keys_values is None:
            key, value, _ = block.keys_values(self._after.latents.to(like))
            made = MediaKeysValues(key[self._after.sample], value[self._after.sample])
        elif self._new is None:
            made = before.keys_values[number]
        else:
            counts = (before.counts - before.dropped).to(like.device)
            old = before.keys_values[number]
            key, value = (new.repeat_interleave(self._repeats, 0) for new in block.keys_values(self._new.to(like))[:2])
            made = MediaKeysValues(append(old.key, counts, key), append(old.value, counts, value))
        self._kept[block] = made
        return made


CALL: ContextVar[tuple[object, MediaCall] | None] = ContextVar("narrows_media_call", default=None)
PASS: ContextVar[tuple[object, MediaPass] | None] = ContextVar("narrows_media_pass", default=None)


def run(owner: object, call: MediaCall, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `function(*args, **kwargs)` with `call` as the current call of `owner`."""
    context = copy_context()
    context.run(CALL.set, (owner, call))
    return context.run(function, *args, **kwargs)


def current(owner: object, variable: ContextVar[tuple[object, Any] | None]) -> Any:
    """The value of `variable` if `owner` set it, else None."""
    found = variable.get()
    return None if found is None or found[0] is not owner else found[1]
