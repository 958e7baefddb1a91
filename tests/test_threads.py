"""Eight threads over one shared model see what one thread sees, and leave the process as it was."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.models.base import ImageClassifier
from tests.adapters.flamingo.hosts import flamingo, language_model, media, text

THREADS, CALLS = 8, 24


def _state() -> tuple[object, ...]:
    """What of the process a call might leave changed."""
    return (
        sys.stdout,
        sys.stderr,
        torch.get_float32_matmul_precision(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
        torch.backends.mha.get_fastpath_enabled(),
    )


def _run(work: Callable[[int], bool]) -> None:
    """Every call is right, from threads that switch as often as they can."""
    before, interval = _state(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            assert all(pool.map(work, range(CALLS)))
    finally:
        sys.setswitchinterval(interval)
    assert _state() == before


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize(
    "name", ["slot_vit_mini", "soft_moe_vit_mini", "resampler_vit_mini", "ats_vit_mini", "sepvit_mini"]
)
def test_forward_and_routing_of_a_shared_model(name: str) -> None:
    torch.manual_seed(0)
    model = narrows.create_model(name, channels=1).eval()
    images = [torch.randn(1, 1, 32, 32) for _ in range(4)]

    def forward(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return model(batch)

    logits, routings = [forward(batch) for batch in images], [model.routing(batch) for batch in images]

    def work(number: int) -> bool:
        index = number % len(images)
        if number % 3:
            return torch.equal(forward(images[index]), logits[index])
        found = model.routing(images[index])
        return len(found) == len(routings[index]) and all(
            one.name == other.name and torch.equal(one.weights, other.weights)
            for one, other in zip(found, routings[index], strict=True)
        )

    stream = torch.get_rng_state()
    _run(work)
    assert _hooks(model) == 0
    if name != "slot_vit_mini":  # whose first slots are drawn
        assert torch.equal(torch.get_rng_state(), stream)


def test_loading_and_reducing(tmp_path: Path) -> None:
    model = narrows.create_model("vit_mini", channels=1).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 1, 32, 32)
    with narrows.reduce_tokens(model, method="topk", budget=0.5), torch.no_grad():
        expected = model(images)

    def work(_: int) -> bool:
        loaded: ImageClassifier = narrows.load_model(tmp_path)
        with narrows.reduce_tokens(loaded, method="topk", budget=0.5), torch.no_grad():
            return torch.equal(loaded(images), expected)

    _run(work)


def test_a_shared_language_model_with_several_flamingos() -> None:
    host = language_model("llama").requires_grad_(False)
    ids, seen = text("a#bc#d", "#efg#h"), media(2, 2)
    with torch.no_grad():
        plain = host(ids).logits
        shared = flamingo(host)
        expected = shared(ids, media=seen).logits
    assert not torch.equal(plain, expected)
    hooks = _hooks(host)

    @torch.no_grad()
    def work(number: int) -> bool:
        if number % 3:
            return torch.equal(shared(ids, media=seen).logits, expected)
        other = flamingo(host, opened=False)  # whose closed gates change nothing
        same = torch.equal(other(ids, media=seen).logits, plain)
        other.remove()
        return same and torch.equal(host(ids).logits, plain)

    _run(work)
    assert _hooks(host) == hooks
    shared.remove()
    assert _hooks(host) == 0
    assert torch.equal(host(ids).logits, plain)
