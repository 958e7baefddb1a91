"""What a reduction promises, whatever the model: over one small model of each family."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrows.adapters.token_reduction import Pruning, Reduction, Signals, reduce_tokens
from narrows.ops.token_sampling import TokenSample
from tests.adapters.token_reduction.hosts import HOSTS, inputs, of_image, outputs
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
