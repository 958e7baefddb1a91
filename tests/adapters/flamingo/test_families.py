"""Every family of language models: reading media with the cache on is what the whole text without a cache gives."""

from typing import Any

import pytest
import torch
from torch import Tensor

from narrows.adapters.flamingo import Flamingo
from tests.adapters.flamingo.hosts import FAMILIES, MEDIA_TOKEN, flamingo, language_model, media, text
from tests.support import assert_close

PROMPT = ("ab#cde#fgh", "#xyzuvw#st")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Flamingo:
    return flamingo(language_model(request.param))


def written(model: Flamingo, prompt: Tensor, **kwargs: Any) -> Any:
    """Five tokens, the likeliest each time, and their logits."""
    # transformers takes a padding token that the model wrote itself for padding, where no mask says otherwise.
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 5, **kwargs}
    return model.generate(prompt, return_dict_in_generate=True, output_logits=True, **options)


def whole(model: Flamingo, sequences: Tensor, prompt: Tensor, images: Tensor, **kwargs: Any) -> Tensor:
    """Logits of the whole text in one pass, without a cache; what stands after the prompt is text."""
    locations = torch.zeros_like(sequences, dtype=torch.bool)
    locations[:, : prompt.shape[1]] = prompt == MEDIA_TOKEN
    with torch.no_grad():
        return model(sequences, media=images, media_locations=locations, use_cache=False, **kwargs).logits


def assert_recomputed(model: Flamingo, generated: Any, prompt: Tensor, images: Tensor) -> None:
    logits = torch.stack(generated.logits, 1)
    again = whole(model, generated.sequences, prompt, images)[:, -1 - logits.shape[1] : -1]
    assert_close(logits, again, 1e-5)
    changed = whole(model, generated.sequences, prompt, images.flip(-1))[:, -1 - logits.shape[1] : -1]
    assert (again - changed).abs().amax((1, 2)).min() > 1e-3  # else any cache would do


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_gates_change_no_bit_and_neither_does_having_been_there(family: str) -> None:
    lm, prompt = language_model(family), text(*PROMPT)
    bare, kind, keys = lm(input_ids=prompt).logits, type(lm), list(lm.state_dict())
    trainable = [parameter.requires_grad for parameter in lm.parameters()]
    wrapped = flamingo(lm, opened=False)
    assert torch.equal(wrapped(prompt, media=media(2, 2)).logits, bare)
    opened = flamingo(lm)
    assert not torch.equal(opened(prompt, media=media(2, 2)).logits, bare)
    assert torch.equal(lm(input_ids=prompt).logits, bare)
    assert type(lm) is kind
    assert list(lm.state_dict()) == keys
    opened.remove()
    assert wrapped.remove() is lm
    assert torch.equal(lm(input_ids=prompt).logits, bare)
    assert [parameter.requires_grad for parameter in lm.parameters()] == trainable


def test_cached_generation_is_full_recomputation(model: Flamingo) -> None:
    prompt, images = text(*PROMPT), media(2, 2)
    assert_recomputed(model, written(model, prompt, media=images), prompt, images)


def test_a_second_turn_with_a_new_image(model: Flamingo) -> None:
    prompt, images = text(*PROMPT), media(2, 3)
    first = written(model, prompt, media=images[:, :2])
    locations = torch.cat((prompt == MEDIA_TOKEN, torch.zeros(2, 5, dtype=torch.bool)), 1)
    both = torch.cat((first.sequences, text("hi#jk", "#lmno")), 1)
    locations = torch.cat((locations, text("hi#jk", "#lmno") == MEDIA_TOKEN), 1)
    second = written(model, both, media=images[:, 2:], media_locations=locations, past_key_values=first.past_key_values)
    logits = torch.stack(second.logits, 1)
    locations = torch.cat((locations, torch.zeros(2, 5, dtype=torch.bool)), 1)
    with torch.no_grad():
        again = model(second.sequences, media=images, media_locations=locations, use_cache=False).logits
    assert_close(logits, again[:, -6:-1], 1e-5)


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_prompt_read_in_chunks(model: Flamingo, chunk: int) -> None:
    prompt, images = text(*PROMPT), media(2, 2)
    assert_recomputed(model, written(model, prompt, media=images, prefill_chunk_size=chunk), prompt, images)


def test_beams_read_as_without_a_cache(model: Flamingo) -> None:
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 5, "media": media(2, 2)}
    prompt = text(*PROMPT)
    cached = model.generate(prompt, **options)
    assert cached.shape == (6, 15)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))


def test_rows_padded_on_the_left_are_as_alone(model: Flamingo) -> None:
    images, rows = media(2, 2), ("ab#cde#fgh", "#xyz")
    mask = torch.tensor([[True, True], [True, False]])
    padded = text(rows[0], 6 * "." + rows[1])
    batch = written(model, padded, media=images, media_mask=mask, attention_mask=(padded != 0).long())
    for row, prompt in enumerate(rows):
        alone = written(model, text(prompt), media=images[row : row + 1, : prompt.count("#")])
        assert_close(torch.stack(batch.logits, 1)[row], torch.stack(alone.logits, 1)[0], 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(model: Flamingo, reentrant: bool) -> None:
    prompt, images = text(*PROMPT), media(2, 2)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(prompt, media=images, labels=prompt, use_cache=False).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    plain = gradients()
    assert all((gradient != 0).any() for gradient in plain)
    model.language_model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hook = model.blocks[1].attn.register_forward_pre_hook(count)
    checkpointed = gradients()
    model.language_model.activation_checkpointing_disable()
    model.eval()
    hook.remove()
    assert calls == 2  # once more on the way back
    for ours, theirs in zip(checkpointed, plain, strict=True):
        assert_close(ours, theirs, 1e-5)
