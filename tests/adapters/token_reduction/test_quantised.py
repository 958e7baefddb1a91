"""Models whose linear maps are quantised, before they are reduced or after."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrows.adapters.token_reduction import METHODS, reduce_tokens, self_test
from narrows.adapters.token_reduction.hosts.parts import PartsBlock
from narrows.errors import NarrowsError
from tests.adapters.token_reduction.hosts import HOSTS, inputs, outputs
from tests.adapters.token_reduction.test_every_host import Everything, assert_all_close, run
from tests.support import assert_close

every_method = pytest.mark.parametrize("method", METHODS)
every_quantisation = pytest.mark.parametrize("kind", ["dynamic", "weights", "activations"])
some_hosts = pytest.mark.parametrize(
    "name",
    [
        "timm vit",
        "timm siglip",
        "timm eva_grouped_queries",
        "transformers dinov2, gated",
        "transformers data2vec",
        "transformers v-jepa 2",
        "open_clip",
        "torchvision",
        "hub dinov3",
        "narrows vit",
    ],
)


def quantised(model: nn.Module, kind: str) -> nn.Module:
    """The model with linear maps in int8: by PyTorch ("dynamic"), or by torchao, with activations or without."""
    if kind == "dynamic":
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    torchao = pytest.importorskip("torchao.quantization")
    of_kind = {"weights": "Int8WeightOnlyConfig", "activations": "Int8DynamicActivationInt8WeightConfig"}[kind]
    torchao.quantize_(model, getattr(torchao, of_kind)())
    return model


def dequantised(model: nn.Module) -> nn.Module:
    """A copy whose weights are numbers again, those that int8 can say."""
    twin = copy.deepcopy(model)
    linear = [part for part in twin.modules() if isinstance(part, nn.Linear) and type(part.weight.data) is not Tensor]
    assert linear, "nothing was quantised"
    for part in linear:
        part.weight = nn.Parameter(part.weight.dequantize())
    return twin


# PyTorch's own is deprecated in favour of torchao, and people have it.
pytestmark = [pytest.mark.filterwarnings("ignore")]


@every_quantisation
@some_hosts
def test_a_quantised_model_with_every_token_kept_is_itself(name: str, kind: str) -> None:
    model = quantised(HOSTS[name](), kind)
    arguments = inputs(model, 2)
    untouched = run(model, arguments)
    for method in (Everything(), "tome"):
        with reduce_tokens(model, method=method, budget={1: 1.0, 2: 1.0}, execution="static"):
            if kind == "weights" or name not in ("open_clip", "torchvision"):  # else rounded otherwise, by whole steps
                assert_all_close(run(model, arguments), untouched)
    assert all(map(torch.equal, run(model, arguments), untouched))


@every_method
@every_quantisation
@some_hosts
def test_quantised_before_and_after_it_is_the_same(name: str, kind: str, method: str) -> None:
    before, after = quantised(HOSTS[name](), kind), HOSTS[name]()
    arguments = inputs(after, 2)
    with reduce_tokens(after, method=method, budget=0.5):
        in_float = run(after, arguments)
        after = quantised(after, kind)
        expected = run(after, arguments)
        with reduce_tokens(before, method=method, budget=0.5):
            assert all(map(torch.equal, run(before, arguments), expected))
    assert not torch.equal(expected[0], in_float[0])


@every_method
@some_hosts
@torch.no_grad()
def test_quantised_weights_are_the_numbers_they_stand_for(name: str, method: str) -> None:
    model = quantised(HOSTS[name](), "weights")
    twin, arguments = dequantised(model), inputs(model, 2)
    with reduce_tokens(model, method=method, budget=0.5), reduce_tokens(twin, method=method, budget=0.5):
        for ours, theirs in zip(outputs(model, arguments), outputs(twin, arguments), strict=True):
            assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("name", ["torchvision", "narrows vit"])
def test_the_self_test_finds_a_wrong_step_among_quantised_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole steps of activations, which roundings make, are no fault; a projection that is wrong is one."""
    model = quantised(HOSTS[name](), "activations")
    reduction = reduce_tokens(model, method=self_test.KeepAll(), budget=1.0)
    reduction.remove()
    right: Callable[..., Any] = PartsBlock.attention_update
    monkeypatch.setattr(PartsBlock, "attention_update", lambda self, *args: 1.2 * right(self, *args))
    with pytest.raises(NarrowsError, match=r"self-test: .*block [01] "):
        reduce_tokens(model)
