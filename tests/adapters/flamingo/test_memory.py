"""Whatever is done to a cache, what is read with it is what the whole text gives without one."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from narrows.adapters.flamingo import Flamingo
from narrows.adapters.flamingo.memory import MediaCacheLayer, read_memory
from narrows.ops.media_attention import AllPrevious, ConsecutiveGroup, LastMedia, LastMedium
from tests.adapters.flamingo.hosts import MEDIA_TOKEN, flamingo, language_model, media, text
from tests.support import assert_close

POLICIES = [LastMedium(), LastMedia(2), ConsecutiveGroup(), AllPrevious()]
ROWS = ("ab#cde##f#gh", "#xyz#u#v#tt#")


@pytest.fixture(scope="module", params=POLICIES, ids=str)
def model(request: pytest.FixtureRequest) -> Flamingo:
    return flamingo(language_model("llama"), attend=request.param)


@pytest.fixture(scope="module")
def last_medium() -> Flamingo:
    return flamingo(language_model("llama"))


def logits(model: Flamingo, tokens: Tensor, images: Tensor | None, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, media=images, **{"use_cache": False, **kwargs}).logits


class Turns:
    """A conversation in parts, each with the media of its own text."""

    def __init__(self, model: Flamingo, tokens: Tensor, images: Tensor, cache: Any = None) -> None:
        self.model, self.tokens, self.images = model, tokens, images
        self.cache = DynamicCache(config=model.language_model.config) if cache is None else cache

    def read(self, start: int, stop: int) -> Tensor:
        before, part = self.tokens[:, :start], self.tokens[:, start:stop]
        skip, counts = (before == MEDIA_TOKEN).sum(1), (part == MEDIA_TOKEN).sum(1)
        slots = torch.arange(max(1, int(counts.max())))
        mine = (skip[:, None] + slots).clamp(max=self.images.shape[1] - 1)
        chosen = self.images[torch.arange(len(part))[:, None], mine]
        mask = slots < counts[:, None]
        if not mask.any():
            chosen, mask = None, None
        return logits(self.model, part, chosen, media_mask=mask, past_key_values=self.cache, use_cache=True)


def cut(length: int, *sizes: int) -> list[tuple[int, int]]:
    bounds = [0]
    while bounds[-1] < length:
        bounds.append(min(length, bounds[-1] + sizes[(len(bounds) - 1) % len(sizes)]))
    return list(pairwise(bounds))


@pytest.mark.parametrize("sizes", [(1,), (5,), (2, 7), (12,)], ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_text_read_in_parts(model: Flamingo, sizes: tuple[int, ...], static: bool) -> None:
    tokens, images = text(*ROWS), media(2, 5)
    mask = torch.tensor([[True, True, True, True, False], [True, True, True, True, True]])
    whole = logits(model, tokens, images, media_mask=mask)
    cache = StaticCache(config=model.language_model.config, max_cache_len=16) if static else None
    turns = Turns(model, tokens, images, cache)
    parts = [turns.read(start, stop) for start, stop in cut(12, *sizes)]
    assert_close(torch.cat(parts, 1), whole, 1e-5)


@pytest.mark.parametrize("keep", [11, 9, 7, 6, 3, 1])
def test_a_cropped_cache(model: Flamingo, keep: int) -> None:
    tokens, images = text("ab#cde##f#gh", "cd#abe##h#fg"), media(2, 4)
    turns = Turns(model, tokens, images)
    turns.read(0, 5)
    turns.read(5, 12)
    turns.cache.crop(keep - 12)
    other = torch.cat((tokens[:, :keep], text("q#rs", "r##s")), 1)
    kept = int((tokens[0, :keep] == MEDIA_TOKEN).sum())
    fresh = media(2, 6)[:, -2:]
    mask = torch.tensor([[True] * (kept + 1) + [False], [True] * (kept + 2)])
    again = torch.cat((images[:, :kept], fresh), 1)
    part = logits(model, other[:, keep:], fresh, media_mask=mask[:, kept:], past_key_values=turns.cache, use_cache=True)
    assert_close(part, logits(model, other, again, media_mask=mask)[:, keep:], 1e-5)


def test_a_prompt_read_once_and_continued_in_several_ways(model: Flamingo) -> None:
    tokens, images = text(*ROWS), media(2, 5)[:, :4]
    turns = Turns(model, tokens[:, :6], images)
    turns.read(0, 6)
    turns.cache.batch_repeat_interleave(2)
    turns.cache.batch_select_indices(torch.tensor([3, 0, 2]))
    ends, fresh = text("q#r", "st#", "#uv"), media(3, 2)[:, 1:]
    ours = logits(model, ends, fresh, past_key_values=turns.cache, use_cache=True)
    for row, (end, source) in enumerate(zip(ends, (1, 0, 1), strict=True)):
        alone = torch.cat((tokens[source, :6], end))[None]
        count = int((tokens[source, :6] == MEDIA_TOKEN).sum())
        of_alone = torch.cat((images[source : source + 1, :count], fresh[row : row + 1]), 1)
        assert_close(ours[row : row + 1], logits(model, alone, of_alone)[:, 6:], 1e-5)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beams_of_a_second_turn(model: Flamingo, options: dict[str, int]) -> None:
    tokens, images = text(*ROWS), media(2, 5)
    mask = torch.tensor([[True, True, True, True, False], [True, True, True, True, True]])
    options = {**options, "max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    whole = model.generate(tokens, media=images, media_mask=mask, use_cache=False, **options)
    assert torch.equal(model.generate(tokens, media=images, media_mask=mask, **options), whole)
    turns = Turns(model, tokens, images)
    turns.read(0, 7)
    turns.cache.batch_repeat_interleave(options["num_beams"])
    rest = torch.tensor([[True, True], [True, True]])
    new = torch.stack((images[0, 2:4], images[1, 3:5]))
    assert (tokens[:, 7:] == MEDIA_TOKEN).sum(1).tolist() == [2, 2]
    second = model.generate(tokens, media=new, media_mask=rest, past_key_values=turns.cache, **options)
    assert torch.equal(second, whole)


def test_samples_share_what_was_encoded(last_medium: Flamingo) -> None:
    seen = []
    hook = last_medium.resampler.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    keys = []
    more = [b.attn.to_kv.register_forward_hook(lambda m, a, output: keys.append(len(a[0]))) for b in last_medium.blocks]
    tokens, images = text("ab#cd#", "x#yz#w"), media(2, 2)
    torch.manual_seed(3)
    sequences = last_medium.generate(tokens, media=images, do_sample=True, num_return_sequences=3, max_new_tokens=4)
    for handle in (hook, *more):
        handle.remove()
    assert seen == [4]  # four media, each once
    assert keys == [2, 2]  # once for each block, for two prompts rather than six rows
    assert sequences.shape == (6, 10)
    torch.manual_seed(3)
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 4, "use_cache": False}
    assert torch.equal(sequences, last_medium.generate(tokens, media=images, **options))


@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_assisted_generation_with_rejected_drafts(model: Flamingo, how: str) -> None:
    """Assisted decoding reads what it drafts, and cuts back the cache to where a draft went wrong."""
    lm = model.language_model
    assistant = copy.deepcopy(language_model("llama", num_hidden_layers=1))
    tokens, images = text("ab#cdab#cdabcd"), media(1, 2)
    options = {"media": images, "max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    plain = model.generate(tokens, **options)
    crops = []
    crop = MediaCacheLayer.crop

    def counted(self: MediaCacheLayer, tokens_to_remove: int) -> None:
        crops.append(tokens_to_remove)
        crop(self, tokens_to_remove)

    MediaCacheLayer.crop = counted
    try:
        drafts = {"assistant_model": assistant} if how == "assistant" else {"prompt_lookup_num_tokens": 3}
        drafted = model.generate(tokens, **options, **drafts)
    finally:
        MediaCacheLayer.crop = crop
    assert torch.equal(drafted, plain)
    assert min(crops) < 0
    assert lm.training is False


def test_only_the_last_medium_is_kept_and_projected_once(last_medium: Flamingo) -> None:
    tokens, images = text("a#b#c#d#ef", "abcdef#ghi"), media(2, 4)
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    turns = Turns(last_medium, tokens, images)
    with torch.no_grad():
        last_medium(tokens, media=images, media_mask=mask, past_key_values=turns.cache, use_cache=True)
    counts = []
    hooks = [b.attn.to_kv.register_forward_hook(lambda *_: counts.append(1)) for b in last_medium.blocks]
    for _ in range(3):
        memory = read_memory(turns.cache, last_medium._hooks.key)
        assert [kept.key.shape for kept in memory.keys_values] == 2 * [(2, 1, 3, 2, 8)]
        assert memory.dropped.tolist() == [3, 0]
        logits(last_medium, text("z", "z"), None, past_key_values=turns.cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    assert not counts


def test_text_in_a_cache_of_the_bare_language_model_has_no_media(last_medium: Flamingo) -> None:
    tokens, images = text("abcd#ef#gh"), media(1, 2)
    cache = DynamicCache(config=last_medium.language_model.config)
    with torch.no_grad():
        last_medium.language_model(input_ids=tokens[:, :4], past_key_values=cache, use_cache=True)
    logits(last_medium, tokens[:, 4:], images, past_key_values=cache, use_cache=True)
    assert read_memory(cache, last_medium._hooks.key).locations.tolist() == [
        [False] * 4 + [True, False, False, True, False, False]
    ]


def test_reset_forgets_the_media(last_medium: Flamingo) -> None:
    tokens, images = text("ab#cd#"), media(1, 2)
    cache = StaticCache(config=last_medium.language_model.config, max_cache_len=8)
    first = logits(last_medium, tokens, images, past_key_values=cache, use_cache=True)
    cache.reset()
    assert_close(logits(last_medium, tokens, images, past_key_values=cache, use_cache=True), first, 1e-6)


def test_a_media_token_that_the_model_writes_is_text(last_medium: Flamingo) -> None:
    tokens, images = text("ab#cd"), media(1, 1)
    only = {"sequence_bias": {(MEDIA_TOKEN,): 100.0}, "max_new_tokens": 3, "do_sample": False}
    written = last_medium.generate(tokens, media=images, return_dict_in_generate=True, output_logits=True, **only)
    assert (written.sequences[:, 5:] == MEDIA_TOKEN).all()
    locations = torch.zeros(1, 8, dtype=torch.bool)
    locations[0, 2] = True
    again = logits(last_medium, written.sequences, images, media_locations=locations)
    assert_close(torch.stack(written.logits, 1), again[:, 4:-1], 1e-5)


def test_reading_with_gradients_then_without(model: Flamingo) -> None:
    tokens, images = text(*ROWS), media(2, 5)
    mask = torch.tensor([[True, True, True, True, False], [True, True, True, True, True]])
    whole = logits(model, tokens, images, media_mask=mask)
    turns = Turns(model, tokens, images)
    first = model(tokens[:, :3], media=images[:, :1], past_key_values=turns.cache, use_cache=True).logits
    assert first.requires_grad
    assert_close(torch.cat((first, turns.read(3, 8), turns.read(8, 12)), 1), whole, 1e-5)
