"""Targets: the most tokens that a cost allows, and a clear word where it allows none."""

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import transformers

import narrows
from narrows.adapters.token_reduction import CostTarget, Reduction, targets
from narrows.adapters.token_reduction.budget import count_of
from narrows.costs import Timing, count_macs, macs_per_sample
from narrows.errors import InvalidArgument, InvalidType
from narrows.models import ImageClassifier, create_model
from tests.adapters.token_reduction.hosts import HOSTS, inputs

METHODS = ("ats", "topk", "evit", "tome", "random")
SIDE, DEPTH, TOKENS, DIM, MLP = 16, 4, 16, 32, 64


def build() -> ImageClassifier:
    torch.manual_seed(0)
    shape = {
        "dim": DIM,
        "depth": DEPTH,
        "heads": 2,
        "mlp_dim": MLP,
        "image_size": SIDE,
        "global_pool": "token",
        "stem": "patch",
    }
    return create_model("vit_mini", channels=1, **shape).eval()


@pytest.fixture
def model() -> ImageClassifier:
    return build()


def images(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def macs_by_hand(kept: int) -> int:
    """Of one image under topk: block 0 whole, block 1 reads all and carries `kept`, blocks 2 and 3 carry `kept`."""

    def block(queries: int, keys: int) -> int:
        projections = 3 * keys * DIM**2 + queries * DIM**2
        return projections + 2 * queries * keys * DIM + 2 * queries * DIM * MLP

    everything, left = TOKENS + 1, kept + 1
    stem, head = TOKENS * 16 * DIM, DIM * 10
    return stem + block(everything, everything) + block(left, everything) + 2 * block(left, left) + head


@pytest.mark.parametrize("method", METHODS)
def test_macs_are_met_with_as_many_tokens_as_they_allow(model: ImageClassifier, method: str) -> None:
    whole = macs_per_sample(model, images(), batch=3)
    goal = 0.8 * whole
    reduction = narrows.reduce_tokens(model, method=method, budget=narrows.TargetMACs(goal, images()))
    assert macs_per_sample(model, images(), batch=3) <= goal
    assert "asked" in str(reduction)
    count = reduction.schedule[-1] or next(entry for entry in reversed(reduction.schedule) if entry)
    assert isinstance(count, int)
    assert f"reached with {count} of {TOKENS} tokens" in str(reduction)
    reduction.remove()
    with narrows.reduce_tokens(model, method=method, budget=count + 1):
        assert macs_per_sample(model, images(), batch=3) > goal, "one more token would have fitted"


@pytest.mark.parametrize("method", METHODS)
def test_a_target_costs_five_forwards_of_its_calibration_batch_at_most(method: str) -> None:
    """The test of the reduction among them. As deep as DeiT-S, with as many tokens, and narrow."""
    model = timm.create_model("deit_small_patch16_224", embed_dim=48, num_heads=3, num_classes=9).eval()
    whole = macs_per_sample(model, torch.zeros(1, 3, 224, 224), batch=1)
    spent = count_macs(partial(narrows.reduce_tokens, model, method=method, budget=narrows.TargetMACs(0.7 * whole)))
    assert spent <= 5 * narrows.TargetMACs.batch * whole


@pytest.mark.parametrize("method", ["topk", "tome"])
def test_macs_are_met_on_images_of_another_size(model: ImageClassifier, method: str) -> None:
    """In shares of the tokens of these images: a count of those of the model's own could not reach so many."""
    larger = torch.randn(2, 1, 2 * SIDE, 2 * SIDE, generator=torch.Generator().manual_seed(1))
    goal = 0.7 * macs_per_sample(model, larger, batch=2)
    with narrows.reduce_tokens(model, method=method, budget=narrows.TargetMACs(goal, larger)) as reduction:
        assert 0.95 * goal <= macs_per_sample(model, larger, batch=2) <= goal
        assert f"of {4 * TOKENS} tokens" in str(reduction)


@torch.no_grad()
def test_macs_of_a_tower_and_of_the_model_that_holds_it() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    text = {**sizes, "vocab_size": 40, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()
    example = {"input_ids": torch.tensor([[1, 5, 7, 2]]), "pixel_values": torch.randn(1, 3, 32, 32)}
    calls = {
        "tower": lambda: model.vision_model(pixel_values=example["pixel_values"]),
        "whole": lambda: model(**example),
    }
    for name, call in calls.items():
        goal = 0.8 * count_macs(call)
        given = example if name == "whole" else None
        with narrows.reduce_tokens(model, method="topk", budget=narrows.TargetMACs(goal), example=given):
            assert 0.9 * goal <= count_macs(call) <= goal


@torch.no_grad()
@pytest.mark.parametrize("given", [False, True], ids=["tower", "whole"])
def test_macs_of_llava(given: bool) -> None:
    """Its projector reads the grid, so that reducing the tower saves what the tower costs, at most."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8),
        text_config=transformers.LlamaConfig(**sizes, vocab_size=40, num_key_value_heads=2),
        image_token_index=39,
        image_seq_length=16,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    example = {"input_ids": torch.tensor([[1, *[39] * 16, 5, 7]]), "pixel_values": torch.randn(1, 3, 32, 32)}
    tower = next(module for module in model.modules() if isinstance(module, transformers.CLIPVisionModel))
    calls = (lambda: tower(pixel_values=example["pixel_values"]), lambda: model(**example))
    goal = 0.85 * count_macs(calls[given])
    budget = narrows.TargetMACs(goal)
    with narrows.reduce_tokens(model, method="topk", budget=budget, example=example if given else None):
        assert 0.9 * goal <= count_macs(calls[given]) <= goal


@torch.no_grad()
def test_macs_of_a_model_that_takes_more_than_images() -> None:
    model = HOSTS["transformers siglip2"]()
    goal = 0.7 * count_macs(lambda: model(**inputs(model, 1)))
    for images in (None, inputs(model, 2)):
        with narrows.reduce_tokens(model, method="ats", budget=narrows.TargetMACs(goal, images)):
            assert count_macs(lambda: model(**inputs(model, 1))) <= 1.1 * goal


@pytest.mark.parametrize("kept", [1, 6, 15])
def test_macs_are_those_of_arithmetic_by_hand(model: ImageClassifier, kept: int) -> None:
    goal = macs_by_hand(kept)
    reduction = narrows.reduce_tokens(model, method="topk", budget=narrows.TargetMACs(goal))
    assert macs_per_sample(model, images(), batch=3) == goal
    assert reduction.schedule == (None, kept, None, None)


def test_a_target_that_everything_meets_keeps_everything(model: ImageClassifier) -> None:
    untouched = model(images())
    reduction = narrows.reduce_tokens(model, method="topk", budget=narrows.TargetMACs(1e12))
    assert f"with {TOKENS} of {TOKENS} tokens" in str(reduction)
    assert torch.allclose(model(images()), untouched, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_target_out_of_reach_names_the_least_that_can_be_reached(model: ImageClassifier, method: str) -> None:
    untouched = model(images())
    with pytest.raises(InvalidArgument, match=r"budget: expected a target of at least [\d.]+ kMACs.*got 10 kMACs"):
        narrows.reduce_tokens(model, method=method, budget=narrows.TargetMACs(1e4))
    assert torch.equal(model(images()), untouched), "the model is left as it was"
    narrows.reduce_tokens(model, method=method).remove()


def test_the_least_that_is_named_can_be_reached(model: ImageClassifier) -> None:
    with pytest.raises(InvalidArgument) as failure:
        narrows.reduce_tokens(model, method="topk", budget=narrows.TargetMACs(macs_by_hand(1) - 1))
    assert f"1 of {TOKENS} tokens" in str(failure.value)
    narrows.reduce_tokens(model, method="topk", budget=narrows.TargetMACs(macs_by_hand(1)))


def test_latency_is_measured_on_the_calibration_batch_and_met(
    model: ImageClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that charges a millisecond for each token, so that nothing depends on noise."""

    def timed(contenders: dict[str, Callable[[], torch.Tensor]], **options: object) -> dict[str, Timing]:
        contenders[""]()
        (entry,) = {entry for entry in seconds.schedule if entry is not None}
        return {"": Timing((count_of(entry, TOKENS) / 1e3,))}

    class Watching(narrows.TargetLatency):
        def cost(self, reduction: Reduction, images: torch.Tensor) -> float:
            nonlocal seconds
            seconds = reduction
            assert images.shape == (3, 1, SIDE, SIDE)
            return super().cost(reduction, images)

    seconds: Reduction
    monkeypatch.setattr(targets, "compare_speed", timed)
    reduction = narrows.reduce_tokens(model, method="topk", budget=Watching(0.0105, images()))
    assert reduction.schedule == (None, 10, None, None)
    assert "at most 10.5 ms asked, 10 ms reached with 10 of 16 tokens" in str(reduction)


def test_latency_on_this_machine(model: ImageClassifier) -> None:
    reduction = narrows.reduce_tokens(model, budget=narrows.TargetLatency(60.0))
    assert "60000 ms asked" in str(reduction).replace("6e+04", "60000")
    reduction.remove()
    with pytest.raises(InvalidArgument, match=r"expected a target of at least [\d.]+ ms, which \d+ of 16 tokens cost"):
        narrows.reduce_tokens(model, budget=narrows.TargetLatency(1e-6))


@pytest.mark.parametrize("target", [narrows.TargetMACs, narrows.TargetLatency])
@pytest.mark.parametrize("goal", [0, -1.0, float("nan"), float("inf")])
def test_a_goal_is_a_positive_number(target: type[CostTarget], goal: float) -> None:
    with pytest.raises(InvalidArgument, match="expected a finite number above 0"):
        target(goal)


def test_a_goal_is_a_number_and_images_are_a_batch() -> None:
    with pytest.raises(InvalidType, match="TargetMACs: expected a number"):
        narrows.TargetMACs(True)
    with pytest.raises(InvalidArgument, match="images: expected a batch"):
        narrows.TargetMACs(1e9, torch.zeros(3, 32, 32))
