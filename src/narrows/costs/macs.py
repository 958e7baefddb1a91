"""Multiply-accumulates: of a function, and of one sample without padding."""

import re
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
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
        UserWarning: an operation that may hold products has no formula and counted as 0: one that is not PyTorch's, one
            of PyTorch's whose name says so, or a loop whose steps are not seen. Give it a formula with
            `torch.utils.flop_counter.register_flop_formula`.
    """
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    counter.mod_tracker = _NoModules()  # pyright: ignore[reportAttributeAccessIssue]
    # Operators may be registered by the call itself, as kernels are that nobody has used before.
    counter.flop_registry = ChainMap(counter.flop_registry, flop_registry)  # pyright: ignore[reportAttributeAccessIssue]
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


_PRODUCTS = re.compile(r"(?<!co)mm|matmul|conv|linear|attention|lstm|gru|rnn|dot|_dist|linalg|cholesky|solve|fft")
_FREE = re.compile(r"upsample|_thnn_fused|linalg_(vector|matrix)_norm|linalg_check|linalg_cross|fftshift|aten.convert")
_SEEN_INSIDE = ("cond", "flex_attention", "flex_attention_backward")
"""Higher-order operations that `torch.utils.flop_counter` counts."""


class _Uncounted(TorchDispatchMode):
    """Collects the names of operations that may hold products and have no formula."""

    supports_higher_order_operators = True

    def __init__(self, formulas: Mapping[Any, Any]) -> None:
        super().__init__()
        self.formulas = formulas
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "_overloadpacket", func)
        if torch.is_inference_mode_enabled() and func.namespace != "higher_order" and packet not in self.formulas:
            with self:  # in inference mode composite operations are not decomposed
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        if packet not in self.formulas and not getattr(func, "is_view", False) and _may_multiply(func, str(packet)):
            self.names.add(str(packet))
        return func(*args, **(kwargs or {}))


def _may_multiply(func: Any, name: str) -> bool:
    if func.namespace == "higher_order":
        return func.name() not in _SEEN_INSIDE
    if func.namespace in ("prim", "prims"):
        return False
    return func.namespace != "aten" or (_PRODUCTS.search(name) is not None and _FREE.search(name) is None)


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


def _product(left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    """Of matrices, of batches of them, or of rows in groups that each have a matrix; rows beyond the groups count."""
    groups = left[0] if len(left) == 3 and len(right) == 2 else 1
    return 2 * prod(left) * right[-1] // groups


def _product_of_rows(left: Shape, _right: Shape, *_: Any, out_shape: Any, **__: Any) -> int:
    """With packed weights, whose shape says little."""
    return 2 * prod(left) * out_shape[-1]


def _trilinear(*shapes_and_axes: Any, **__: Any) -> int:
    """Σ over `sumdim` of a product of three tensors that are unsqueezed along the axes that follow them."""
    shapes, expanded = shapes_and_axes[:3], shapes_and_axes[3:6]
    sizes: list[list[int]] = []
    for shape, axes in zip(shapes, expanded, strict=True):
        size = list(shape)
        for axis in sorted(axes):
            size.insert(axis, 1)
        sizes.append(size)
    return 2 * prod(map(max, *sizes))


def _convolution_of_steps(_steps: Shape, weight: Shape, *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * prod(out_shape) * weight[0] * weight[1]


def _convolution_of_steps_backward(gradient: Shape, _steps: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 4 * prod(gradient) * weight[0] * weight[1]


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
    aten.addmv_: _added_matrix_vector,
    aten.addbmm: _added_product,
    aten.addbmm_: _added_product,
    aten.addmm_: _added_product,
    aten.baddbmm_: _added_product,
    aten._sparse_addmm: _added_product,
    aten._grouped_mm: _product,
    aten._int_mm: _product,
    aten._weight_int8pack_mm: _product_of_rows,
    aten._weight_int4pack_mm: _product_of_rows,
    aten._weight_int4pack_mm_for_cpu: _product_of_rows,
    aten._trilinear: _trilinear,
    aten.conv_tbc: _convolution_of_steps,
    aten.conv_tbc_backward: _convolution_of_steps_backward,
    aten._addmm_activation: _added_product,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.mkldnn_rnn_layer: _recurrent,
    aten._cudnn_rnn: _recurrent,
}
