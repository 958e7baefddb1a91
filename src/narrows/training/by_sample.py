"""Random numbers of a model drawn sample by sample: several processes draw together what one draws.

Torch's generators draw for a whole batch, in an order that depends on its size. Here what is drawn for a sample is a
hash of the seed, the batch, and the place of the sample among those of all processes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from narrows.data.positions import keys, uniforms
from narrows.layers.initial_slots import GaussianSlots
from narrows.layers.slot_gate import SlotGate
from narrows.layers.slot_preheat import SlotPreheat
from narrows.layers.slot_transition import SlotTransition
from narrows.layers.token_sampling import AdaptiveTokenSampler
from narrows.models.sepvit import DropPath
from narrows.ops.token_sampling import TokenSample


class DrawnBySample:
    """Hooks on the modules of a model that draw for each sample: initial slots, gates, Gumbel noise, stochastic depth.

    Dropout and mixing are drawn by process: a mask has as many numbers as a feature map, and mixing is between samples
    of a batch. In a graph of `torch.compile` everything is.

    Args:
        model: whose modules draw.
    """

    def __init__(self, model: nn.Module) -> None:
        self._rows: NDArray[np.uint64] | None = None
        self._calls = dict.fromkeys(range(len(list(model.modules()))), 0)
        self._handles: list[RemovableHandle] = []
        for number, module in enumerate(model.modules()):
            if isinstance(module, GaussianSlots):
                hook = module.register_forward_pre_hook(self._on(number, self._slots), with_kwargs=True)
            elif isinstance(module, SlotPreheat):
                hook = module.register_forward_pre_hook(self._on(number, self._preheat), with_kwargs=True)
            elif isinstance(module, SlotTransition):
                hook = module.register_forward_pre_hook(self._on(number, self._pair), with_kwargs=True)
            elif isinstance(module, SlotGate):
                hook = module.register_forward_pre_hook(self._on(number, self._gate), with_kwargs=True)
            elif isinstance(module, AdaptiveTokenSampler) and module.sampling == "gumbel":
                hook = module.register_forward_hook(self._on(number, self._sample), with_kwargs=True)
            elif isinstance(module, DropPath) and module.rate > 0:
                hook = module.register_forward_hook(self._on(number, self._drop))
            else:
                continue
            self._handles.append(hook)

    def begin(self, key: Sequence[int], batch: int, *, process: int, processes: int) -> None:
        """Draw for these samples from here on.

        Args:
            key: seed and number of the batch.
            batch: samples in it.
            process: number of this one.
            processes: how many there are; sample i of process r of R is number i R + r.
        """
        if self._handles:
            self._rows = keys(*key, np.arange(batch, dtype=np.uint64) * np.uint64(processes) + np.uint64(process))
            self._calls = dict.fromkeys(self._calls, 0)

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _on(self, number: int, draw: Any) -> Any:
        def hook(module: nn.Module, *arguments: Any) -> Any:
            if self._rows is None or torch.compiler.is_compiling():
                return None
            self._calls[number] += 1
            return draw(keys(self._rows, number, self._calls[number]), module, *arguments)

        return hook

    def _slots(
        self, rows: NDArray[np.uint64], module: GaussianSlots, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
        slots, count, generator = (*args[1:], None, None, None)[:3]
        batch: int = args[0]
        if slots is not None or generator is not None or kwargs or batch != len(rows):
            return None
        shape = (batch, module.num_slots if count is None else count, module.slot_dim)
        noise = _normal(rows, shape).to(module.mean.device, module.mean.dtype)
        return (batch, module.mean + module.log_scale.exp() * noise, count), kwargs

    def _preheat(
        self, rows: NDArray[np.uint64], module: SlotPreheat, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
        slots: Tensor = args[0]
        if not module.training or args[4] is not None or kwargs or len(slots) != len(rows):
            return None
        return args, {"noise": _normal(rows, tuple(slots.shape)).to(slots.device)}

    def _pair(
        self, rows: NDArray[np.uint64], module: SlotTransition, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
        slots: Tensor = args[0]
        if not module.training or args[3] is not None or kwargs or len(slots) != len(rows):
            return None
        return args, {"noise": torch.from_numpy(uniforms(rows, 2)).to(slots.device)}

    def _gate(
        self, rows: NDArray[np.uint64], module: SlotGate, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
        slots: Tensor = args[0]
        mask, generator = (*args[1:], None, None)[:2]
        frames, rest = divmod(len(slots), len(rows))  # frames of a clip lie one after another
        if not module.training or generator is not None or kwargs or rest:
            return None
        even = uniforms(rows, frames * slots.shape[1]).reshape(len(slots), slots.shape[1])
        return (slots, mask), {"noise": torch.from_numpy(even).to(slots.device)}

    def _sample(
        self,
        rows: NDArray[np.uint64],
        module: AdaptiveTokenSampler,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: TokenSample,
    ) -> TokenSample | None:
        names = ("scores", "mask", "num_tokens", "generator")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        scores: Tensor = given["scores"]
        if given.pop("generator", None) is not None or len(scores) != len(rows):
            return None
        found = []
        for index, row in enumerate(rows):
            generator = torch.Generator(scores.device).manual_seed(int(row >> np.uint64(1)))
            one = {name: value[index : index + 1] for name, value in given.items() if isinstance(value, Tensor)}
            # `forward` itself: a call would come here again.
            found.append(module.forward(**{**given, **one}, generator=generator))
        return TokenSample(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _drop(self, rows: NDArray[np.uint64], module: DropPath, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        (branch,) = args
        if not module.training or len(branch) != len(rows):
            return None
        kept = torch.from_numpy(uniforms(rows, 1) >= module.rate).to(branch.device, branch.dtype)
        return branch * (kept.view(-1, *(1 for _ in branch.shape[1:])) / (1 - module.rate))


def _normal(rows: NDArray[np.uint64], shape: tuple[int, ...]) -> Tensor:
    """Normal numbers of a shape `[B, K, S]`, those of a sample a function of its row (Box and Muller 1958)."""
    even = uniforms(rows, 2 * shape[1] * shape[2]).astype(np.float64).reshape(shape[0], 2, *shape[1:])
    normal = np.sqrt(-2 * np.log1p(-even[:, 0])) * np.cos(2 * np.pi * even[:, 1])
    return torch.from_numpy(normal.astype(np.float32))
