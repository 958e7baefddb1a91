"""The public face: what is refused, what is recorded, what is undone."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.diff_attention import DiffAttention
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from torch import Tensor, nn

import narrows
from narrows.adapters.token_reduction import Merge, Merging, Pruning, Reduction, Signals, reduce_tokens, self_test
from narrows.adapters.token_reduction.hosts import timm as timm_host
from narrows.errors import InvalidArgument, InvalidType, NarrowsError
from narrows.ops.token_sampling import TokenSample
from tests.adapters.token_reduction.families import images, vit
from tests.support import assert_close


def state(model: nn.Module) -> dict[str, list[str]]:
    """Everything a reduction could leave behind."""
    return {
        name: [str(module.training), *sorted(vars(module)), *map(str, module._forward_pre_hooks.values())]
        for name, module in model.named_modules()
    }


REFUSED: dict[str, tuple[type[NarrowsError], str, dict[str, Any]]] = {
    "budget 0": (InvalidArgument, "count of 1 to 64", {"budget": 0}),
    "budget 0.0": (InvalidArgument, "above 0 and at most 1", {"budget": 0.0}),
    "a ratio above 1": (InvalidArgument, "above 0 and at most 1", {"budget": 1.5}),
    "more than N": (InvalidArgument, "count of 1 to 64", {"budget": 65}),
    "no number": (InvalidType, "a count, a share", {"budget": True}),
    "not a number": (InvalidArgument, "above 0", {"budget": float("nan")}),
    "a short schedule": (InvalidArgument, "one entry for each of the 4 blocks", {"budget": [0.5, 0.5]}),
    "an unknown block": (InvalidArgument, "numbers of blocks from 0 to 3", {"budget": {4: 0.5}}),
    "a schedule that grows": (InvalidArgument, "tokens do not come back", {"budget": {1: 0.5, 2: 0.7}}),
    "a schedule of nothing": (InvalidArgument, "not None", {"budget": [None] * 4}),
    "steps that ToMe cannot make": (InvalidArgument, "at most 50%", {"budget": {1: 0.2}, "method": "tome"}),
    "a budget that ToMe cannot reach": (InvalidArgument, "in the 3 blocks", {"budget": 1, "method": "tome"}),
    "an unknown method": (InvalidArgument, "'ats', 'topk'", {"method": "best"}),
    "an unknown execution": (InvalidArgument, "'ragged'", {"execution": "fast"}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_and_leave_the_model_alone(case: str) -> None:
    error, message, arguments = REFUSED[case]
    model = vit()
    before, untouched = state(model), model(images())
    with pytest.raises(error, match=message):
        reduce_tokens(model, **arguments)
    assert state(model) == before
    assert torch.equal(model(images()), untouched)


@pytest.mark.compiled  # jaxtyping would speak first
@pytest.mark.parametrize("arguments", [{"budget": "half"}, {"budget": [0.5, "all", None, None]}, {"method": Pruning}])
def test_arguments_of_another_kind_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidType, match=r"a count, a share|an instance of Pruning or Merging"):
        reduce_tokens(vit(), **arguments)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: vit(block_fn=ParallelScalingBlock), "ParallelScalingBlock"),
        (lambda: vit(block_fn=ParallelThingsBlock), "ParallelThingsBlock"),
        (lambda: vit(attn_layer=DiffAttention), "DiffAttention"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), "Sequential"),
    ],
)
def test_unsupported_models_are_refused_by_name(make: Callable[[], nn.Module], name: str) -> None:
    model = make()
    before = state(model)
    with pytest.raises(InvalidType, match=name):
        reduce_tokens(model)
    assert state(model) == before


def test_a_model_that_is_reduced_is_not_reduced_again() -> None:
    model = vit()
    with reduce_tokens(model) as reduction:
        with pytest.raises(InvalidArgument, match="reduced one"):
            reduce_tokens(model)
        assert reduction.attached
    reduce_tokens(model).remove()


def test_a_state_that_cannot_be_handled_is_refused() -> None:
    model = vit()
    model.blocks[2].forward = lambda x: x
    with pytest.raises(InvalidArgument, match="block 2 with"):
        reduce_tokens(model)
    with pytest.raises(InvalidArgument, match="meta"):
        reduce_tokens(vit().to("meta"))
    with pytest.raises(InvalidArgument, match=r"before torch\.compile"):
        reduce_tokens(torch.compile(vit()))  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidArgument, match="one vision transformer"):
        reduce_tokens(nn.ModuleList([vit(), vit()]))


@pytest.mark.parametrize("piece", ["attention_update", "feed_forward_update", "normed", "query_key_value"])
def test_the_self_test_finds_a_wrong_step(piece: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one in a hundred, in a model whose layer scale makes updates small beside the tokens."""
    model = vit(init_values=1.0)
    with torch.no_grad():
        for block in model.blocks:
            block.ls1.gamma.mul_(1e-3)
            block.ls2.gamma.mul_(1e-3)
    right = getattr(timm_host.TimmBlock, piece)

    def wrong(self: Any, *args: Tensor) -> Any:
        result = right(self, *args)
        return type(result)(result[0] * 1.01, *result[1:]) if isinstance(result, tuple) else result * 1.01

    before = state(model)
    reduce_tokens(model).remove()
    monkeypatch.setattr(timm_host.TimmBlock, piece, wrong)
    with pytest.raises(NarrowsError, match=r"self-test: .*block 1 \(Block\)"):
        reduce_tokens(model)
    assert state(model) == before


def test_the_self_test_leaves_no_trace() -> None:
    model = vit(drop_rate=0.5, drop_path_rate=0.5).train()
    model.blocks[2].eval()
    before, seed = state(model), torch.get_rng_state()
    precision = torch.get_float32_matmul_precision()
    reduce_tokens(model).remove()
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), seed)
    assert torch.get_float32_matmul_precision() == precision


class Broken(Pruning):
    def choose(self, signals: Signals, count: int) -> TokenSample:
        raise RuntimeError("no choice")


def test_a_method_that_fails_leaves_the_model_alone() -> None:
    model = vit()
    before = state(model)
    with pytest.raises(RuntimeError, match="no choice"):
        reduce_tokens(model, method=Broken())
    assert state(model) == before


class FirstOnes(Pruning):
    """A method as a user writes it."""

    def choose(self, signals: Signals, count: int) -> TokenSample:
        """The first in raster order."""
        ids = torch.arange(count).expand(signals.tokens.shape[0], -1)
        return TokenSample(ids, torch.ones_like(ids, dtype=torch.bool))


class Halves(Merging):
    """Neighbours become their mean."""

    def merge(self, signals: Signals, count: int) -> Merge:
        """In pairs, the prefix alone."""
        batch, width = signals.tokens.shape[:2]
        into = torch.cat((torch.arange(signals.prefix), torch.arange(width - signals.prefix) // 2 + signals.prefix))
        share = torch.where(torch.arange(width) < signals.prefix, 1.0, 0.5)
        ids = torch.cat((torch.arange(signals.prefix), torch.arange(signals.prefix, width, 2)))
        return Merge(into.expand(batch, -1), share.expand(batch, -1), ids.expand(batch, -1))


def test_a_method_of_ones_own_is_passed_in() -> None:
    model = vit()
    with reduce_tokens(model, method=FirstOnes(), budget=10) as reduction:
        model(images())
        (routing,) = reduction.routing
        assert torch.equal(routing.weights[:, 0].argmax(-1), torch.arange(11).expand(4, -1))
    with reduce_tokens(model, method=Halves(), budget=0.5) as reduction:
        model(images())
        assert reduction.routing[0].weights.sum(-1).tolist() == [[[1.0, *[2.0] * 32]]] * 4


def test_routing_says_which_tokens_each_block_kept() -> None:
    model = vit()
    with reduce_tokens(model, method="topk", budget={1: 0.5, 3: 9}) as reduction:
        assert reduction.routing == ()
        model(images())
        first, second = reduction.routing
        assert (first.name, second.name) == ("blocks.1", "blocks.3")
        assert (first.grid, first.prefix, first.carriers) == ((8, 8), 1, "kept tokens")
        assert (first.num_carriers, second.num_carriers) == (33, 10)
        assert first.weights.sum((1, 2, 3)).tolist() == [33] * 4
        assert (second.weights.sum((1, 2)) <= first.weights.sum((1, 2))).all()  # a subset
        assert second.maps().shape == (4, 10, 8, 8)
        model(images(2))
        assert reduction.routing[0].weights.shape[0] == 2


def test_the_handle_says_what_was_done() -> None:
    model = vit()
    with reduce_tokens(model, method="ats", budget={1: 0.5, 3: 9}, execution="static") as reduction:
        text = str(reduction)
    for part in ("VisionTransformer", "ATS", "64", "at most 32 after block 1, 9 after block 3", "static", "self-test"):
        assert part in text
    assert "removed" in str(reduction)
    reduction.remove()  # a second time does nothing


def test_a_copy_is_reduced_and_has_its_own_handle() -> None:
    model = vit()
    untouched = model(images())
    with reduce_tokens(model) as reduction:
        reduced = model(images())
        twin = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
    buffer.seek(0)
    for other in (twin, torch.load(buffer, weights_only=False)):
        assert torch.equal(other(images()), reduced)
        handle = Reduction.of(other)
        assert handle is not None
        assert handle is not reduction
        handle.remove()
        assert torch.equal(other(images()), untouched)
    assert torch.equal(model(images()), untouched)
    assert Reduction.of(model) is None


def test_an_exception_inside_a_call_leaves_no_state() -> None:
    model = vit()
    with reduce_tokens(model):
        reduced = model(images())
        handle = model.blocks[3].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(images(2))
        handle.remove()
        assert torch.equal(model(images()), reduced)


def test_tokens_replaced_between_blocks_are_noticed() -> None:
    """Unless they are as many: the same tokens, changed."""
    model = vit()
    with reduce_tokens(model, method="topk", budget=0.5):
        expected = model(images())
        handle = model.blocks[2].register_forward_hook(lambda module, args, output: output[:, :-1])
        with pytest.raises(NarrowsError, match=r"block 3 .* replaced the tokens"):
            model(images())
        handle.remove()
        handle = model.blocks[2].register_forward_hook(lambda module, args, output: output * 1.0)
        assert torch.equal(model(images()), expected)
        handle.remove()
        for index in (1, 3):  # after the last block that reduces as well
            prompt = model.blocks[index].register_forward_pre_hook(lambda _, args: (torch.cat((args[0],) * 2, 1),))
            with pytest.raises(NarrowsError, match=r"replaced the tokens|got 74 tokens|special ones and a grid"):
                model(images())
            prompt.remove()
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images())))
        with pytest.raises(NarrowsError, match="call of one block alone"):
            model.blocks[3](tokens)


def test_hooks_and_adapters_inside_a_block_are_honoured() -> None:
    class Adapted(nn.Module):
        """A projection with a low-rank update beside it."""

        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.update = base, nn.Linear(base.in_features, base.out_features, bias=False)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.base(tokens) + self.update(tokens)

    torch.manual_seed(0)
    model = vit()
    before = model(images())
    for block in model.blocks:
        block.attn.qkv = Adapted(block.attn.qkv)
        block.mlp.fc1.register_forward_hook(lambda module, args, output: 2 * output)
    adapted = model(images())
    assert not torch.allclose(adapted, before, atol=1e-2)
    with reduce_tokens(model, method=self_test.KeepAll(), budget=1.0):
        assert_close(model(images()), adapted)


def test_measure_counts_the_tokens_that_were_kept() -> None:
    """By arithmetic: a block is 12 D^2 for each token and 2 D for each pair, a dropped token costs its projections."""
    model = vit(num_classes=0)
    dim, depth, hidden = 48, 4, 4 * 48
    stem = 64 * 8 * 8 * 3 * dim

    def block(read: int, kept: int) -> int:
        projections = 3 * dim * dim * read + dim * dim * kept
        return projections + 2 * dim * read * kept + 2 * dim * hidden * kept

    assert narrows.measure(model, images(2), repeats=1).macs == stem + depth * block(65, 65)
    # The row of attention for the scores is a sum of products and counts nothing.
    for execution in ("static", "ragged"):
        with reduce_tokens(model, method="topk", budget={1: 20, 3: 10}, execution=execution):
            expected = stem + block(65, 65) + block(65, 21) + block(21, 21) + block(21, 11)
            assert narrows.measure(model, images(2), repeats=1).macs == expected
        with reduce_tokens(model, method="ats", budget={1: 40}, execution=execution) as reduction:
            model(images(2))
            counts = reduction.routing[0].weights.sum((1, 2, 3)).int().tolist()
            assert counts[0] != counts[1]
            each = [stem + block(65, 65) + block(65, kept) + 2 * block(kept, kept) for kept in counts]
            assert narrows.measure(model, images(2), repeats=1).macs == sum(each) / 2


class Reads(nn.Module):
    """Somebody's head on a tower.

    Args:
        how: it reads the tokens.
        more: its forward takes something beside images.
    """

    def __init__(self, how: str, more: bool = False) -> None:
        super().__init__()
        self.tower, self.how, self.more = vit(), how, more
        self.maps = nn.Conv2d(48, 4, 3, padding=1)

    def forward(self, images: Tensor, times: Tensor | None = None) -> Tensor:
        """Something of each image."""
        if self.more:
            assert times is not None
            images = images * times
        tokens = self.tower.forward_features(images)
        maps = tokens[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
        return {
            "mean": lambda: tokens[:, 1:].mean(1),
            "maximum": lambda: tokens.amax(1),
            "attention": lambda: (tokens.softmax(1) * tokens).sum(1),
            "class token": lambda: tokens[:, 0],
            "grid": lambda: self.maps(maps),
            "mean of maps": lambda: self.maps(maps).relu().mean((2, 3)),
            "logits": lambda: self.tower.forward_head(tokens),
        }[self.how]()


POOLS = ("mean", "maximum", "attention")
OTHERS = ("class token", "grid", "mean of maps", "logits")


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("how", [*POOLS, *OTHERS])
def test_a_wrapper_that_pools_dropped_tokens_is_named(how: str, more: bool, recwarn: Any) -> None:
    model = Reads(how, more).eval()
    drawn = torch.get_rng_state()
    example = {"images": images(2), "times": torch.ones(())} if more else None
    with reduce_tokens(model, method="topk", budget=0.5, example=example) as reduction:
        assert not reduction.routing, "the trial is not the last call"
    told = [str(warning.message) for warning in recwarn if "may average" in str(warning.message)]
    assert len(told) == (how in POOLS)
    assert all(message.startswith("Reads may average over tokens") for message in told)
    assert torch.equal(torch.get_rng_state(), drawn)
    recwarn.clear()
    with reduce_tokens(model, method="tome", budget=0.5, example=example):  # merged tokens stand everywhere
        assert not [warning for warning in recwarn if "may average" in str(warning.message)]


def test_a_wrapper_that_needs_more_than_images_is_not_called_without_an_example(recwarn: Any) -> None:
    with reduce_tokens(Reads("mean", more=True).eval(), method="topk", budget=0.5):
        assert not [warning for warning in recwarn if "may average" in str(warning.message)]


@pytest.mark.filterwarnings("error:.*may average")
def test_a_warning_that_is_an_error_leaves_the_model_as_it_was() -> None:
    model = Reads("mean").eval()
    before = state(model)
    with pytest.raises(UserWarning, match="Reads may average"):
        reduce_tokens(model, method="topk", budget=0.5)
    assert state(model) == before
