"""The state of a call reaches what runs the language model: recomputation, other threads, compilers."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from narrows.adapters.flamingo import Flamingo
from narrows.errors import InvalidArgument, NarrowsError
from tests.adapters.flamingo.hosts import flamingo, language_model, media, text
from tests.support import assert_close

PROMPT = ("ab#cde#fgh", "#xyzuvw#st")


def gradients(model: Flamingo, backward: Callable[[Tensor], None] = Tensor.backward) -> list[Tensor]:
    model.zero_grad()
    backward(model(text(*PROMPT), media=media(2, 2), labels=text(*PROMPT), use_cache=False).loss)
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("impl", CheckpointImpl)
@pytest.mark.parametrize("order", ["wrapped before", "wrapped after"])
@pytest.mark.parametrize("placement", ["before", "after"])
def test_torchs_activation_checkpointing_changes_no_gradient(impl: CheckpointImpl, order: str, placement: str) -> None:
    expected = gradients(flamingo(language_model("llama"), placement=placement))
    assert all((gradient != 0).any() for gradient in expected)
    lm = language_model("llama")
    if impl is CheckpointImpl.REENTRANT:  # needs an input with a gradient, whatever the model
        lm.enable_input_require_grads()
    model = flamingo(lm, placement=placement) if order == "wrapped after" else None
    for number, layer in enumerate(lm.model.layers):
        lm.model.layers[number] = checkpoint_wrapper(layer, checkpoint_impl=impl)
    model = flamingo(lm, placement=placement) if model is None else model
    runs = []
    lm.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    for ours, theirs in zip(gradients(model), expected, strict=True):
        assert_close(ours, theirs, 1e-5)
    assert len(runs) == 2  # once more on the way back
    again = gradients(model)
    assert_close(again[0], expected[0], 1e-5)


@pytest.mark.parametrize("placement", ["before", "after"])
def test_a_block_inside_of_what_is_recomputed_finds_its_pass(placement: str) -> None:
    """In the backward pass of several calls at once, run in another thread as autograd runs that of a GPU."""
    model = flamingo(language_model("llama"), placement=placement)
    batches = [(text("ab#c#de"), media(1, 2)), (text("#fgh#ij"), media(1, 2).flip(1)), (text("abcdefg"), None)]

    def both() -> list[Tensor]:
        model.zero_grad()
        outputs = [model(tokens, media=images, labels=tokens, use_cache=False) for tokens, images in batches]
        loss = outputs[0].loss + 2 * outputs[1].loss + 3 * outputs[2].loss
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    plain = both()
    layers, counts = model.language_model.model.layers, []
    original = type(layers[0]).__call__

    def called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        counts.append(self)
        return checkpoint(original, self, *args, use_reentrant=False, **kwargs)

    type(layers[0]).__call__ = called
    try:
        recomputed = both()
    finally:
        type(layers[0]).__call__ = original
    assert len(counts) == 3 * len(layers)
    for ours, theirs in zip(recomputed, plain, strict=True):
        assert_close(ours, theirs, 1e-5)


def test_reentrant_checkpointing_around_a_block_is_an_error_not_a_lost_gradient() -> None:
    model = flamingo(language_model("llama"))
    model.language_model.enable_input_require_grads()
    kind = type(model.language_model.model.layers[0])
    original = kind.__call__
    kind.__call__ = lambda self, h, **kwargs: checkpoint(lambda x: original(self, x, **kwargs), h, use_reentrant=True)
    try:
        with pytest.raises(
            InvalidArgument, match="reentrant checkpointing inside of which LlamaDecoderLayer is called"
        ):
            gradients(model)
    finally:
        kind.__call__ = original


@pytest.mark.compiled
def test_one_graph_of_the_whole_model() -> None:
    """With masked media, whose number a graph cannot know, and NaN in them."""
    model, prompt = flamingo(language_model("llama")), text(*PROMPT)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    images = media(2, 3)
    images[~mask] = torch.nan

    def both(of: nn.Module) -> list[Tensor]:
        model.zero_grad()
        output = of(prompt, media=images, media_mask=mask, labels=prompt, use_cache=False)
        output.loss.backward()
        return [output.logits, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]

    expected = both(model)
    torch._dynamo.reset()
    for ours, theirs in zip(both(torch.compile(model, fullgraph=True, backend="aot_eager")), expected, strict=True):
        assert_close(ours, theirs, 1e-5)
    assert torch.equal(both(model)[0], expected[0])


@pytest.mark.compiled
def test_a_compiled_language_model_reads_the_media_of_each_call() -> None:
    model, prompt = flamingo(language_model("llama")), text(*PROMPT)
    lm = model.language_model
    several = (media(2, 2), media(2, 2).flip(1))
    with torch.no_grad():
        expected, bare = [model(prompt, media=one).logits for one in several], lm(input_ids=prompt).logits
        torch._dynamo.reset()
        lm.forward = torch.compile(lm.forward, backend="eager")
        for one, logits in zip(several, expected, strict=True):
            assert_close(model(prompt, media=one).logits, logits, 1e-5)
        assert_close(lm(input_ids=prompt).logits, bare, 1e-5)


class Elsewhere(nn.Module):
    """Runs a language model in a thread of its own."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, **kwargs: Any) -> Any:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(self.lm(**kwargs)))
        thread.start()
        thread.join()
        return found[0]


class Past(nn.Module):
    """Runs a language model past its hooks, as peft did before 0.21."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, **kwargs: Any) -> Any:
        return self.lm.forward(**kwargs)


@pytest.mark.parametrize("wrapper", [Elsewhere, Past])
def test_a_language_model_that_runs_where_it_cannot_see_its_media_is_an_error(wrapper: type[nn.Module]) -> None:
    model = flamingo(wrapper(language_model("llama")))
    with pytest.raises(NarrowsError, match=r"ran in another thread .* past its hooks, as peft before 0\.21 does"):
        model(text(*PROMPT), media=media(2, 2))
