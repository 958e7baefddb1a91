"""The place of a `MediaMemory` in a cache of transformers: one more layer, behind those of the language model.

Whatever is done to a cache is done to each of its layers: beam search reorders them, assisted decoding cuts them back,
sampling repeats them. So the media go wherever `past_key_values` goes, and no module keeps a state.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer

from narrows.adapters.flamingo.memory import MediaMemory


class MediaCacheLayer(DummyLayer):
    """A cache layer without keys and values of text.

    Args:
        memory: the media of the text in this cache; None after `reset`.
    """

    def __init__(self, memory: MediaMemory) -> None:
        super().__init__()
        self.memory: MediaMemory | None = memory

    def reset(self) -> None:
        """Forget the text and its media."""
        self.memory = None

    def crop(self, tokens_to_remove: int) -> None:
        """Go back by so many tokens; the number is negative, as transformers has it."""
        if self.memory is not None:
            self.memory = self.memory.without_last(abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams continue those at `beam_idx`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these texts."""
        if self.memory is not None:
            self.memory = self.memory.rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Continue each text in several ways."""
        if self.memory is not None:
            rows = torch.arange(len(self.memory.sample), device=self.memory.sample.device)
            self.memory = self.memory.rows(rows.repeat_interleave(repeats))


def read(cache: Cache | None) -> MediaMemory | None:
    """The media of the text in `cache`, if any are known."""
    layers = [] if cache is None else cache.layers
    return next((layer.memory for layer in layers if isinstance(layer, MediaCacheLayer)), None)


def write(cache: Cache, memory: MediaMemory) -> None:
    """Keep `memory` with `cache`."""
    for layer in cache.layers:
        if isinstance(layer, MediaCacheLayer):
            layer.memory = memory
            return
    layers: list[Any] = cache.layers
    layers.append(MediaCacheLayer(memory))


def text_length(cache: Cache | None) -> int:
    """How many tokens of text are in `cache`."""
    memory = read(cache)
    if memory is not None:
        return memory.length
    return 0 if cache is None else int(cache.get_seq_length())
