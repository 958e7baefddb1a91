"""What is particular to the models of narrows."""

import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.adapters.token_reduction import Signals, reduce_tokens
from narrows.adapters.token_reduction.methods import TopK
from narrows.errors import InvalidType
from narrows.ops.token_sampling import TokenSample
from tests.adapters.token_reduction.hosts import HOSTS, inputs
from tests.adapters.token_reduction.test_every_host import assert_all_close, run
from tests.support import assert_close

BOTTLENECKS = {
    "ats_vit_mini": "blocks.0: expected a plain transformer block, got .*ATSBlock",
    "resampler_vit_mini": "blocks.2: expected a plain transformer block, got .*",
    "sepvit_mini": "model: expected a plain vision transformer, .*, got .*SepViT",
    "slot_vit_mini": "blocks.2: expected a plain transformer block, got .*SlotBottleneck",
    "soft_moe_vit_mini": r"blocks.1.feed_forward: expected a plain feed-forward.*, got .*SoftMoE",
}


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_a_model_with_a_bottleneck_of_its_own_is_refused_by_name(name: str) -> None:
    model = narrows.create_model(name)
    with pytest.raises(InvalidType, match=BOTTLENECKS[name]):
        reduce_tokens(model, budget={0: 0.5})
    assert all("forward" not in vars(module) for module in model.modules())


def test_inside_another_module_it_is_found_and_its_blocks_have_their_names() -> None:
    model = nn.Sequential(HOSTS["narrows vit"](), nn.Softmax(-1))
    with reduce_tokens(model, budget={1: 0.5}) as reduction:
        model(torch.randn(2, 3, 32, 32))
        (routing,) = reduction.routing
    assert routing.name == "0.blocks.1"
    assert routing.grid == (8, 8)


POOLS = {"narrows vit": lambda tokens: tokens.mean(0), "narrows vit, greatest pooled": lambda tokens: tokens.amax(0)}


@pytest.mark.parametrize("name", POOLS)
def test_pooling_uses_kept_tokens_only(name: str) -> None:
    model = HOSTS[name]()
    seen: list[Tensor] = []
    model.blocks[-1].register_forward_hook(lambda _, __, output: seen.append(output))
    with reduce_tokens(model, budget=0.5) as reduction, torch.no_grad():
        (logits,) = run(model, inputs(model, 2))
        (routing,) = reduction.routing
    carried = routing.weights[:, 0].sum(1) > 0
    features = [POOLS[name](model.norm(tokens[keep])) for tokens, keep in zip(seen[-1], carried, strict=True)]
    assert_close(logits, model.head(torch.stack(features)), 1e-5)


class Listener(TopK):
    """Notes the attention it was shown."""

    def choose(self, signals: Signals, count: int) -> TokenSample:
        self.attention = signals.attention
        return super().choose(signals, count)


def test_max_pooling_scores_tokens_by_every_channel() -> None:
    model, listener = HOSTS["narrows vit, greatest pooled"](), Listener()
    arguments = inputs(model, 2)
    with torch.no_grad():
        tokens = model.norm(model.blocks[0](model.embedding(**arguments)))
        with reduce_tokens(model, method=listener, budget={1: 0.5}):
            run(model, arguments)
    shares = torch.stack([tokens[..., channel].softmax(1) for channel in range(tokens.shape[-1])])
    assert_close(listener.attention, shares.mean(0)[:, None], 1e-5)


def test_a_projection_is_called_once_as_in_the_untouched_block() -> None:
    model = HOSTS["narrows vit"]()
    arguments = inputs(model, 2)
    widths: list[int] = []
    with reduce_tokens(model, budget={1: 0.5}):
        expected = run(model, arguments)
        model.blocks[1].attention.qkv.register_forward_hook(lambda _, __, output: widths.append(output.shape[-1]))
        assert_all_close(run(model, arguments), expected)
    assert widths == [3 * 64]


def test_training_draws_what_the_untouched_model_draws() -> None:
    model = narrows.create_model("vit_mini", dropout=0.3).train()
    arguments = inputs(model, 4)
    torch.manual_seed(0)
    untouched = run(model, arguments)
    with reduce_tokens(model, method="topk", budget=1.0):
        torch.manual_seed(0)
        assert_all_close(run(model, arguments), untouched)


def test_images_of_another_size() -> None:
    model = HOSTS["narrows vit"]()
    arguments = inputs(model, 2, side=48)
    results = []
    for execution in ("static", "ragged"):
        with reduce_tokens(model, budget=0.5, execution=execution) as reduction:
            results.append(run(model, arguments))
            assert reduction.routing[0].grid == (12, 12)
    assert_all_close(*results)
