"""Multiply-accumulates: of a function, and of one sample without padding."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# `torch.utils.flop_counter` imports Triton, so it is imported where something is counted.

Shape = tuple[int, ...]
aten = torch.ops.aten


@runtime_checkable
class CarriesPadding(Protocol):
    """A model that pads because its shapes are static while samples keep different numbers of tokens."""

    def without_padding(self, *inputs: Any, **keywords: Any) -> Iterable[Callable[[], object]]:
        """For each sample of the batch, a call that runs it alone without padding.

        Only the shapes in the call have to be right; its values are not used.
        """
        ...


def count_macs(function: Callable[[], object]) -> int:
    """Multiply-accumulates of the matrix products, convolutions and attentions that `function` executes.

    A product of `[m, k]` and `[k, n]` counts m k n; additions, softmaxes and other elementwise work count nothing.
    Backward passes count if `function` runs them. Compiled modules are counted as they run eagerly.

    Warns:
        UserWarning: an operation outside of PyTorch has no formula and counted as 0. Give it one with
            `torch.utils.flop_counter.register_flop_formula`.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    counter.mod_tracker = _NoModules()  # pyright: ignore[reportAttributeAccessIssue]
    with _decomposed(), counter, _Uncounted(counter.flop_registry) as uncounted:
        function()
    for name in sorted(uncounted.names):
        warnings.warn(
            f"{name} has no formula and counted as 0 MACs; give it one with "
            "torch.utils.flop_counter.register_flop_formula",
            stacklevel=2,
        )
    return counter.get_total_flops() // 2


def macs_per_sample(model: nn.Module, *inputs: Any, batch: int, **keywords: Any) -> float:
    """Mean multiply-accumulates for one of the `batch` samples of `inputs`, without padding.

    A model with `CarriesPadding.without_padding` is counted sample by sample without padding; of any other model
    everything that it executes counts.
    """
    if isinstance(model, CarriesPadding):
        return sum(count_macs(call) for call in model.without_padding(*inputs, **keywords)) / batch
    return count_macs(lambda: model(*inputs, **keywords)) / batch


class _NoModules:
    """Replaces the counter's module tracker, which a total does not need.

    The tracker hooks every module and fails on one that is called with a view of a parameter made without gradients,
    such as latents expanded to the batch (torch 2.15).
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


class _Uncounted(TorchDispatchMode):
    """Collects the names of operations outside of PyTorch that have no formula."""

    supports_higher_order_operators = True

    def __init__(self, formulas: dict[Any, Any]) -> None:
        super().__init__()
        self.formulas = formulas
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "_overloadpacket", func)
        if func.namespace not in ("aten", "prim", "prims", "higher_order") and packet not in self.formulas:
            self.names.add(str(packet))
        return func(*args, **(kwargs or {}))


@contextmanager
def _decomposed() -> Iterator[None]:
    """Run eagerly and without the fused transformer layers of `torch.nn`, which have no formula."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _matrix_vector(matrix: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


def _added_matrix_vector(_added: Shape, matrix: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


def _added_product(_added: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(left) * right[-1]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    from torch.utils.flop_counter import sdpa_flop_count

    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    from torch.utils.flop_counter import sdpa_backward_flop_count

    return sdpa_backward_flop_count(gradient, query, key, value)


def _recurrent(steps: Shape, *weights: Any, **__: Any) -> int:
    """Every step multiplies with every matrix; `weights` holds them one by one or in a list, among other arguments."""
    matrices = weights[0] if isinstance(weights[0], list) else weights[:2]
    return 2 * prod(steps[:-1]) * sum(prod(matrix) for matrix in matrices if len(matrix) == 2)


# Flops of operations without a formula in `torch.utils.flop_counter` (of attention on the CPU in its older releases),
# which would count as free.
_FORMULAS: dict[Any, Callable[..., int]] = {
    aten.mv: _matrix_vector,
    aten.dot: _matrix_vector,
    aten.vdot: _matrix_vector,
    aten.addmv: _added_matrix_vector,
    aten.addbmm: _added_product,
    aten._addmm_activation: _added_product,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.mkldnn_rnn_layer: _recurrent,
    aten._cudnn_rnn: _recurrent,
}
