"""What a reduction promises, whatever the model: over one small model of each family."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrows.adapters.token_reduction import Pruning, Reduction, Signals, reduce_tokens
from narrows.adapters.token_reduction.block import in_order
from narrows.adapters.token_reduction.hosts import recognise
from narrows.errors import InvalidArgument
from narrows.ops.token_sampling import TokenSample
from tests.adapters.token_reduction.hosts import HOSTS, PATCH, SIDE, inputs, of_image, outputs
from tests.support import assert_close

every_host = pytest.mark.parametrize("name", HOSTS)
BUDGETS = (0.75, 0.5, 0.2)


class Everything(Pruning):
    """Chooses, and chooses all; `adaptive`, so that rows are masked or packed."""

    adaptive = True

    def choose(self, signals: Signals, count: int) -> TokenSample:
        significance = signals.significance
        ids = torch.arange(significance.shape[1]).expand(significance.shape)
        return TokenSample(ids, torch.ones_like(ids, dtype=torch.bool))


@torch.no_grad()
def run(model: nn.Module, arguments: dict[str, Any], **kwargs: object) -> list[Tensor]:
    return outputs(model, arguments, **kwargs)


def kept(reduction: Reduction) -> list[Tensor]:
    """`[B, N]`, which positions each block that reduces carries on."""
    return [routing.weights[:, 0].sum(1) > 0 for routing in reduction.routing]


def assert_all_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs, 1e-5)


def rows_as_packed(name: str) -> str:
    """The execution that packs rows, where attention adds nothing by position."""
    return "static" if "beit" in name or "data2vec" in name else "ragged"


@every_host
def test_with_every_token_kept_it_is_the_untouched_model(name: str) -> None:
    model = HOSTS[name]()
    arguments = inputs(model, 2)
    untouched = run(model, arguments)
    for method, execution in (("tome", "static"), (Everything(), "static"), (Everything(), rows_as_packed(name))):
        with reduce_tokens(model, method=method, budget={1: 1.0, 2: 1.0}, execution=execution):
            assert_all_close(run(model, arguments), untouched)


@every_host
def test_reduced_it_is_another_and_removed_it_is_the_same_bit_for_bit(name: str) -> None:
    model = HOSTS[name]()
    arguments = inputs(model, 2)
    untouched, state = run(model, arguments), copy.deepcopy(model.state_dict())
    attributes = {path: sorted(vars(module)) for path, module in model.named_modules()}
    with reduce_tokens(model, budget=0.5) as reduction:
        reduced = run(model, arguments)
        assert [tensor.shape for tensor in reduced] == [tensor.shape for tensor in untouched]
        assert any(not torch.equal(ours, theirs) for ours, theirs in zip(reduced, untouched, strict=True))
        assert model.state_dict().keys() == state.keys()
        prefix, budget = reduction.host.prefix, reduction.host.num_tokens // 2
        assert all((positions.sum(1) <= prefix + budget).all() for positions in kept(reduction))
        assert all(positions[:, :prefix].all() for positions in kept(reduction))
    assert all(map(torch.equal, run(model, arguments), untouched))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {path: sorted(vars(module)) for path, module in model.named_modules()} == attributes


def rows_of(tokens: Tensor, ids: Tensor) -> Tensor:
    return torch.stack([row[chosen] for row, chosen in zip(tokens, ids, strict=True)])


def with_left_tokens_only(block: Any, tokens: Tensor, ids: Tensor, args: Any, kwargs: Any) -> Tensor | None:
    """The block's own forward of the tokens at `ids` [B, K] and of no others; None for one that must be told where."""
    kind = f"{type(block).__module__}.{type(block).__name__}".lower()
    if "beit" in kind or "data2vec" in kind:  # relative positions: the others are there, and nobody reads them
        name = "attention_mask" if "beitlayer" in kind else "relative_position_bias"
        name = "shared_rel_pos_bias" if "timm" in kind else name
        width = 65 if "timm" in kind else 1 + (SIDE // PATCH) ** 2
        grid = tokens.new_zeros(len(tokens), width, tokens.shape[-1])
        mask = tokens.new_full((len(tokens), 1, 1, width), -torch.inf)
        for row, chosen, left, read in zip(grid, ids, tokens, mask, strict=True):
            row[chosen], read[..., chosen] = left, 0.0
        mask = mask + kwargs.get(name, torch.zeros(1, 1, width, 1))
        results = [
            block(grid[[i]], *args, **{**kwargs, name: mask[[i]]}) for i in range(len(grid))
        ]  # one adds in place
        return rows_of(torch.cat([each[0] if isinstance(each, tuple) else each for each in results]), ids)
    if "vjepa2" in kind:
        return block(tokens, ids)[0]
    if any(isinstance(value, Tensor | tuple | list) for value in (*args, *kwargs.values())):
        return None
    return block(tokens, *args, **kwargs)


@every_host
@torch.no_grad()
def test_a_reduced_host_is_plain_code_that_drops_rows(name: str) -> None:
    """A block that reduces is its own forward, of which rows are dropped; the next one has the others and no more.

    What hooks of the next block see is what it did, or they are refused with the reason.
    """
    model = HOSTS[name]()
    arguments, host = inputs(model, 2), recognise(model)
    parts = {index: host.block(index) for index in (1, 2)}
    calls: dict[int, Any] = {}

    def record(index: int, args: Any, kwargs: Any, output: Any) -> None:
        part = parts[index]
        given = part.tokens(args[0] if args else next(iter(kwargs.values())))
        calls[index] = in_order(part, given), in_order(part, part.tokens(output)), args[1:], kwargs

    def recorded() -> dict[int, Any]:
        calls.clear()
        hooks = [
            host.blocks[index].register_forward_hook(
                lambda _, args, kwargs, output, index=index: record(index, args, kwargs, output), with_kwargs=True
            )
            for index in parts
        ]
        run(model, arguments)
        for hook in hooks:
            hook.remove()
        return dict(calls)

    untouched = recorded()
    with reduce_tokens(model, method="topk", budget={1: 0.5}) as reduction:
        reduced = recorded()
        ids = reduction.routing[0].weights[:, 0].argmax(-1)
        seen: list[int] = []
        hook = parts[2].bypassed[0].register_forward_hook(lambda *_: seen.append(1))
        if parts[2].takes_positions:
            run(model, arguments)
            assert seen == [1]
        else:
            with pytest.raises(InvalidArgument, match="expected nothing on the"):
                run(model, arguments)
        hook.remove()
    ours = {}
    for index in parts:  # what is read block by block is on the grid
        result = reduced[index][1]
        ours[index] = result if result.shape[1] == ids.shape[1] else rows_of(result, ids)
    assert_close(ours[1], rows_of(untouched[1][1], ids), 1e-5)
    args, kwargs = untouched[2][2:]
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    given = in_order(parts[2], rows_of(untouched[1][1], ids))
    expected = with_left_tokens_only(host.blocks[2], given, ids, args, kwargs)
    if expected is not None:
        assert_close(ours[2], in_order(parts[2], expected), 1e-5)


@every_host
def test_inside_autocast_it_computes_in_bfloat16_as_the_untouched_model_does(name: str) -> None:
    model = HOSTS[name]()
    arguments = inputs(model, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        untouched = run(model, arguments)
        for method in ("tome", "ats"):
            with reduce_tokens(model, method=method, budget={1: 0.5}):
                reduced = run(model, arguments)
            assert [tensor.dtype for tensor in reduced] == [tensor.dtype for tensor in untouched]
            assert all(torch.isfinite(tensor).all() for tensor in reduced)


@every_host
def test_masked_rows_packed_rows_and_an_image_alone_are_the_same(name: str) -> None:
    model = HOSTS[name]()
    arguments = inputs(model, 3)
    for budget in BUDGETS:
        with reduce_tokens(model, method="ats", budget=budget, execution="static") as reduction:
            masked, positions = run(model, arguments), kept(reduction)
            assert all(map(torch.equal, run(model, arguments), masked))  # deterministic
        with reduce_tokens(model, method="ats", budget=budget, execution=rows_as_packed(name)) as reduction:
            assert_all_close(run(model, arguments), masked)
            assert all(map(torch.equal, kept(reduction), positions))
            alone = run(model, of_image(arguments, 1))
            assert_all_close(alone, [tensor[1:2] for tensor in masked])
            assert all(map(torch.equal, kept(reduction), [of_batch[1:2] for of_batch in positions]))


@every_host
@pytest.mark.parametrize("method", ["topk", "tome"])
def test_methods_with_fixed_counts_do_not_depend_on_the_batch(name: str, method: str) -> None:
    model = HOSTS[name]()
    arguments = inputs(model, 2)
    with reduce_tokens(model, method=method, budget=0.5):
        together = run(model, arguments)
        assert_all_close(run(model, of_image(arguments, 1)), [tensor[1:2] for tensor in together])


@every_host
def test_gradients_flow_through_tokens_that_are_kept(name: str) -> None:
    """And are the same for masked and for packed rows."""
    model = HOSTS[name]()
    arguments = inputs(model, 2)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = {}
    for execution in dict.fromkeys(("static", rows_as_packed(name))):
        with reduce_tokens(model, budget=0.5, execution=execution):
            total = sum(tensor.square().mean() for tensor in outputs(model, arguments))
            assert isinstance(total, Tensor)
            gradients[execution] = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    used = 0
    for static, ragged in zip(gradients["static"], gradients[rows_as_packed(name)], strict=True):
        assert (static is None) == (ragged is None)
        if static is not None and ragged is not None:
            used += bool(static.any())
            assert_close(static, ragged, 1e-4)
    assert used > 0.8 * len(parameters)
