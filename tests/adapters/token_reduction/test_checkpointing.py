"""Activation checkpointing around blocks and around the whole vision transformer: what is kept is computed again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.config import set_reentrant_ckpt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from narrows.adapters.token_reduction import METHODS, reduce_tokens
from narrows.errors import InvalidArgument
from tests.adapters.token_reduction.hosts import HOSTS, inputs, outputs
from tests.support import assert_close

every_method = pytest.mark.parametrize("method", METHODS)


class Around(nn.Module):
    """A model all of whose activations are computed again.

    Args:
        model: of timm or transformers.
        reentrant: the way to checkpoint; None for none.
    """

    def __init__(self, model: nn.Module, reentrant: bool | None = None) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, **arguments: Tensor) -> list[Tensor]:
        """What the model returns."""
        if self.reentrant is None:
            return outputs(self.model, arguments)

        def call(*given: Tensor) -> tuple[Tensor, ...]:  # reentrant checkpointing takes and gives tensors alone
            return tuple(outputs(self.model, dict(zip(arguments, given, strict=True))))

        return list(checkpoint(call, *arguments.values(), use_reentrant=self.reentrant))  # pyright: ignore


def around_blocks(model: Any, *, reentrant: bool = False) -> None:
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    else:
        set_reentrant_ckpt(reentrant)
        model.set_grad_checkpointing(True)


@pytest.fixture(autouse=True)
def _as_timm_does_by_default() -> Any:
    yield
    set_reentrant_ckpt(False)


def gradients(model: nn.Module, arguments: dict[str, Tensor]) -> list[Tensor | None]:
    """Of two calls and one backward pass."""
    torch.manual_seed(0)
    calls = [arguments, {name: value.flip(0) for name, value in arguments.items()}]
    torch.stack([tensor.square().mean() for call in calls for tensor in model(**call)]).sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return found


AROUND: dict[str, Callable[[Around], None]] = {
    "blocks": lambda whole: around_blocks(whole.model),
    "the model": lambda whole: setattr(whole, "reentrant", False),
    "the model, reentrant": lambda whole: setattr(whole, "reentrant", True),
}


def case(name: str) -> tuple[Around, dict[str, Tensor]]:
    arguments = inputs(HOSTS[name](), 2)
    # Reentrant checkpointing has gradients only where an input has.
    return Around(HOSTS[name]().train()), {key: value.requires_grad_() for key, value in arguments.items()}


@pytest.mark.filterwarnings("ignore:.*requires_grad")
@pytest.mark.parametrize("around", AROUND)
@every_method
@pytest.mark.parametrize("name", ["timm vit", "timm dinov3", "transformers dinov2", "transformers siglip", "open_clip"])
def test_checkpointing_changes_no_gradient(name: str, method: str, around: str) -> None:
    whole, arguments = case(name)
    calls: list[None] = []
    # A generator that is not drawn from is no hindrance.
    generator = None if method == "random" else torch.Generator()
    with reduce_tokens(whole.model, method=method, budget={1: 0.7, 3: 0.4}, generator=generator) as reduction:
        linear = [part for part in reduction.host.blocks[2].modules() if isinstance(part, nn.Linear)][-1]
        linear.register_forward_pre_hook(lambda *_: calls.append(None))
        plain = gradients(whole, arguments)
        assert len(calls) == 2
        AROUND[around](whole)
        checkpointed = gradients(whole, arguments)
        assert len(calls) == 2 + 4  # each call computes again
    assert sum(gradient is not None and bool(gradient.any()) for gradient in plain) > 0.8 * len(plain)
    for ours, theirs in zip(checkpointed, plain, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert_close(ours, theirs, 1e-6)


@every_method
@pytest.mark.parametrize("budget", [{0: 0.6}, {1: 0.6, 2: 0.5}, {3: 0.5}])
@pytest.mark.parametrize("name", ["timm vit", "transformers dinov2"])
def test_reentrant_checkpointing_around_blocks_is_refused_before_the_backward_pass(
    name: str, budget: dict[int, float], method: str
) -> None:
    whole, arguments = case(name)
    with reduce_tokens(whole.model, method=method, budget=budget):
        around_blocks(whole.model, reentrant=True)
        message = rf"reentrant checkpointing around block {min(budget)}\. Use use_reentrant=False"
        with pytest.raises(InvalidArgument, match=message):
            whole(**arguments)
        around_blocks(whole.model, reentrant=False)
        assert any(gradient is not None for gradient in gradients(whole, arguments))
        with torch.no_grad():
            whole(**arguments)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", ["timm vit", "transformers dinov2"])
def test_a_generator_that_checkpointing_does_not_restore_is_refused(name: str, around: str) -> None:
    """The second forward would keep other tokens than the first, and gradients would be those of neither."""
    whole, arguments = case(name)
    with reduce_tokens(whole.model, method="random", generator=torch.Generator()):
        gradients(whole, arguments)
        AROUND[around](whole)
        with pytest.raises(
            InvalidArgument, match=r"generator: expected None under .* Seed Random by torch.manual_seed"
        ):
            gradients(whole, arguments)
