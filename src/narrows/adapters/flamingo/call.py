"""The media of one call, and what the gated blocks do in one pass of the language model within it.

Both are found through context variables that are set in a copy of the caller's context: another thread sees nothing of
them, and neither does anyone after the call, however it ended.
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
from narrows.ops.media_attention import Attend, VisibleMedia
from narrows.routing import Routing


@dataclass(frozen=True)
class MediaCall:
    """One call of a `Flamingo`, `forward` or `generate`.

    Args:
        media: `[B, M, N, D]`, latents of the media that this call brings, those of a row one after another.
        counts: `[B]`, how many a row brings.
        locations: `[B, T]`, where they stand in the text that this call brings. What a model writes after it holds no
            media, whatever tokens it writes.
        start: how many tokens of text went before.
        document_starts: `[B, T]`, where documents begin that are packed into one row, or None.
        routings: where to put what each block reads, or None.
    """

    media: Float[Tensor, "B M N D"]
    counts: Int[Tensor, " B"]
    locations: Bool[Tensor, "B T"]
    start: int
    document_starts: Bool[Tensor, "B T"] | None = None
    routings: list[Routing] | None = None

    def locations_at(self, start: int, length: int) -> Bool[Tensor, "B length"]:
        """The same for `length` tokens from `start` on."""
        given = self.locations[:, start - self.start : start - self.start + length]
        return pad(given, (0, length - given.shape[1]))


class MediaPass:
    """One pass of the language model: what its tokens see, and the memory it leaves behind.

    Without gradients each block projects a medium once and the memory keeps what it made. With them a block projects
    inside its own forward, where FSDP has its parameters whole, and nothing is kept that hangs on the graph.

    Args:
        call: the call it is part of.
        memory: the media of the text before, or None.
        batch, start, length: of the tokens that pass now, which `start` tokens precede.
        attend: what text may see.
    """

    def __init__(
        self, call: MediaCall, memory: MediaMemory | None, *, batch: int, start: int, length: int, attend: Attend
    ) -> None:
        self.shape = (batch, length)
        before = MediaMemory.of_text(batch, start, call.media) if memory is None else memory
        # What the call brings is new in the first pass over its text; after that the memory has it.
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
        self, number: int, block: GatedCrossAttentionBlock, text: Float[Tensor, "R T D"], *, again: bool = False
    ) -> Float[Tensor, "R T D"]:
        """The text after block `number`, in the precision it came in; `again`: backward makes it again."""
        like = block.attn_gate
        inside = text.to(like.device, like.dtype)
        media = self._keys_values(number, block) if self._keeps else self._after.latents[self._after.sample].to(like)
        dropped = self._dropped[:, None]
        first, last, most = self._visible
        visible = VisibleMedia((first - dropped).to(like.device), (last - dropped).to(like.device), most)
        if self._call.routings is not None:
            self._call.routings.append(block.routing(inside, media, visible=visible))
        if again and not self._keeps:
            return checkpoint(block, inside, media, visible=visible, use_reentrant=False).to(text.dtype)
        return block(inside, media, visible=visible).to(text.dtype)

    def memory(self) -> MediaMemory:
        """What text after this pass has to know."""
        kept = tuple(self._kept.values())
        if not kept:
            return replace(self._after, keys_values=None, dropped=torch.zeros_like(self._after.dropped))
        memory = replace(self._after, keys_values=kept, dropped=self._dropped)
        columns, most = kept[0].key.shape[1], self._visible.most
        settled = self._new is None and self._before.keys_values is not None and (most is None or columns <= most)
        # What the last token sees from, later text sees from, or from a later medium.
        return memory if settled else memory.seen_from(self._visible.first[:, -1])

    def _keys_values(self, number: int, block: GatedCrossAttentionBlock) -> MediaKeysValues:
        """Keys and values of the media that any token of this pass sees."""
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
    """`function(*args, **kwargs)`, in which `owner` finds `call`."""
    context = copy_context()
    context.run(CALL.set, (owner, call))
    return context.run(function, *args, **kwargs)


def mine(owner: object, variable: ContextVar[tuple[object, Any] | None]) -> Any:
    """What `variable` holds for `owner`, or None."""
    found = variable.get()
    return None if found is None or found[0] is not owner else found[1]
