"""The media of the text in a cache: their places, latents, keys and values, for the text that follows.

A `MediaMemory` is immutable. A call makes a new one from the last, and stores it in `past_key_values` only after it has
finished: as one more cache layer, so that whatever is done to a cache (cropping, reordering, repeating) is done to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer

from narrows.adapters.flamingo.host import CACHES
from narrows.errors import InvalidArgument
from narrows.layers.gated_cross_attention import MediaKeysValues


@dataclass(frozen=True)
class MediaMemory:
    """Media and their places in R texts of S tokens each.

    Args:
        locations: `[R, S]`, True at media tokens, from which `Attend.visible` finds what each token sees.
        latents: `[L, M, N, D]`, the media of L samples. All are kept: text cropped to before a medium reads the one
            before it again.
        sample: `[R]`, the sample whose media a text reads; beams share one.
        counts: `[R]`, number of media of each text so far.
        keys_values: for each block, keys and values of the W media that later text may see, `[R, W, N, H, E]`; None: to
            be projected from the latents.
        dropped: `[R]`, number of media before those in `keys_values`.
        written: so many of the last tokens are known to be text, without a look at `locations`.
    """

    locations: Bool[Tensor, "R S"]
    latents: Float[Tensor, "L M N D"]
    sample: Int[Tensor, " R"]
    counts: Int[Tensor, " R"]
    keys_values: tuple[MediaKeysValues, ...] | None
    dropped: Int[Tensor, " R"]
    written: int = 0

    @staticmethod
    def of_text(num_texts: int, length: int, media: Float[Tensor, "L M N D"]) -> "MediaMemory":
        """Texts without media; `media` gives width, device and dtype."""
        none = torch.zeros(num_texts, dtype=torch.long, device=media.device)
        locations = torch.zeros(num_texts, length, dtype=torch.bool, device=media.device)
        return MediaMemory(locations, media[:1, :0], none, none, None, none)

    @property
    def length(self) -> int:
        """S, number of tokens so far."""
        return self.locations.shape[1]

    def with_media(self, media: Float[Tensor, "B M N D"], counts: Int[Tensor, " B"]) -> "MediaMemory":
        """Append `counts` media to each text; R is a multiple of B if prompts are repeated (beams, samples)."""
        repeats = len(self.sample) // len(media)
        if self.latents.shape[1] == 0:
            sample = torch.arange(len(media), device=media.device).repeat_interleave(repeats)
            return replace(self, latents=media, sample=sample, counts=counts.repeat_interleave(repeats))
        new = media.repeat_interleave(repeats, dim=0)
        return replace(
            self,
            latents=append(self.latents[self.sample], self.counts, new),
            sample=torch.arange(len(self.sample), device=media.device),
            counts=self.counts + counts.repeat_interleave(repeats),
        )

    def with_text(self, locations: Bool[Tensor, "R T"], *, written: bool = False) -> "MediaMemory":
        """Append T tokens; `written`: by the language model, so that none of them is a medium's."""
        known = self.written + locations.shape[1] if written else 0
        return replace(self, locations=torch.cat((self.locations, locations), 1), written=known)

    def seen_from(self, first: Int[Tensor, " R"], most: int | None) -> "MediaMemory":
        """Drop keys and values of media before number `first`, which later text does not see.

        Where text sees at most `most` media, the width of what is kept is known without reading it from the device.
        """
        assert self.keys_values is not None
        dropped = torch.maximum(self.dropped, first - 1)
        width = self.keys_values[0].key.shape[1]
        if most is not None:
            width = min(width, most)
        elif not torch.compiler.is_compiling():
            width = int((self.counts - dropped).max().clamp(min=0))
        columns = (dropped - self.dropped)[:, None] + torch.arange(width, device=first.device)
        kept = tuple(MediaKeysValues(take(key, columns), take(value, columns)) for key, value, _ in self.keys_values)
        return replace(self, keys_values=kept, dropped=dropped)

    def without_last(self, num_tokens: int) -> "MediaMemory":
        """Crop the last `num_tokens` tokens."""
        length = max(self.length - num_tokens, 0)
        kept, cut = self.locations[:, :length], self.locations[:, length:]
        if num_tokens <= self.written or not cut.any():
            return replace(self, locations=kept, written=max(self.written - num_tokens, 0))
        none = torch.zeros_like(self.dropped)
        return replace(self, locations=kept, counts=kept.sum(1), keys_values=None, dropped=none, written=0)

    def rows(self, index: Int[Tensor, " rows"]) -> "MediaMemory":
        """Select, reorder or repeat texts."""
        index = index.to(self.sample.device)
        kept = self.keys_values
        if kept is not None:
            kept = tuple(MediaKeysValues(key[index], value[index]) for key, value, _ in kept)
        return replace(
            self,
            locations=self.locations[index],
            sample=self.sample[index],
            counts=self.counts[index],
            keys_values=kept,
            dropped=self.dropped[index],
        )


def take(media: Float[Tensor, "R M *media"], columns: Int[Tensor, "R W"]) -> Float[Tensor, "R W *media"]:
    """`media[r, columns[r]]`, with columns clamped to the last medium."""
    row = torch.arange(len(media), device=media.device)[:, None]
    return media[row, columns.clamp(max=media.shape[1] - 1)] if media.shape[1] else media


def append(
    media: Float[Tensor, "R M *media"], counts: Int[Tensor, " R"], new: Float[Tensor, "R m *media"]
) -> Float[Tensor, "R both *media"]:
    """Concatenate `new` after the first `counts` media of each row, without padding between."""
    number = torch.arange(media.shape[1] + new.shape[1], device=media.device)
    columns = torch.where(number < counts[:, None], number, media.shape[1] + number - counts[:, None])
    return take(torch.cat((media, new), 1), columns)


class MediaCacheLayer(DummyLayer):
    """A cache layer of transformers that holds a `MediaMemory` in place of keys and values of text.

    Args:
        owner: the key of the `MediaHooks` whose it is; several can read one language model.
        memory: the media of the text in this cache; None after `reset`.
    """

    def __init__(self, owner: str, memory: MediaMemory) -> None:
        super().__init__()
        self.owner = owner
        self.memory: MediaMemory | None = memory

    def reset(self) -> None:
        """Empty the cache."""
        self.memory = None

    def crop(self, tokens_to_remove: int) -> None:
        """Crop the last tokens; transformers passes their number as a negative."""
        if self.memory is not None:
            self.memory = self.memory.without_last(abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select texts."""
        if self.memory is not None:
            self.memory = self.memory.rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each text."""
        if self.memory is not None:
            rows = torch.arange(len(self.memory.sample), device=self.memory.sample.device)
            self.memory = self.memory.rows(rows.repeat_interleave(repeats))


def media_layers(cache: Cache | None) -> list[MediaCacheLayer]:
    """The layers of a cache that hold media."""
    return [] if cache is None else [layer for layer in cache.layers if isinstance(layer, MediaCacheLayer)]


def read_memory(cache: Cache | None, owner: str) -> MediaMemory | None:
    """The memory of `owner` in a cache, if there is one."""
    return next((layer.memory for layer in media_layers(cache) if layer.owner == owner), None)


def write_memory(cache: Cache, owner: str, memory: MediaMemory) -> None:
    """Store the memory of `owner` in a cache."""
    for layer in media_layers(cache):
        if layer.owner == owner:
            layer.memory = memory
            return
    layers: list[Any] = cache.layers
    layers.append(MediaCacheLayer(owner, memory))


def cache_of(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments of a language model."""
    given = (arguments.get(name) for name in CACHES)
    return next((found for found in map(text_cache, given) if found is not None), None)


def text_cache(cache: Any) -> Cache | None:
    """The cache of the text, in what decoders have that could read an encoder too."""
    cache = getattr(cache, "self_attention_cache", cache)
    return cache if isinstance(cache, Cache) else None


def text_length(cache: Cache | None) -> int:
    """Number of text tokens in a cache.

    Raises:
        InvalidArgument: a cache without attention, that does not count its text, was filled without media.
    """
    for layer in media_layers(cache):
        if layer.memory is not None:
            return layer.memory.length
    if cache is None:
        return 0
    if cache.layers and not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        if any(any(getattr(layer, "has_previous_state", {}).values()) for layer in cache.layers):
            raise InvalidArgument("cache_params", expected="a cache of this Flamingo", got="one of another text")
        return 0
    return int(cache.get_seq_length())
