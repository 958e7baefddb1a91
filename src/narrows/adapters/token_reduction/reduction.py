"""The handle of a reduced model: which tokens it kept, and how the reduction is undone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from narrows.adapters.token_reduction.block import Plan, ReducedBlock, tracing
from narrows.adapters.token_reduction.budget import Schedule, count_of
from narrows.adapters.token_reduction.hosts.base import HostModel
from narrows.adapters.token_reduction.methods import ReductionMethod
from narrows.adapters.token_reduction.tokens import TokenState, copy_kept_mask
from narrows.routing import Routing


class Reduction:
    """Token reduction in a model, as `reduce_tokens` put it there; as a context manager it is removed at the end.

    `str()` says what was done. A copy of a reduced model is reduced, and its handle is `Reduction.of(copy)`.

    Args:
        model: what was passed to `reduce_tokens`.
        host: the vision transformer in it.
        method: chooses or merges tokens.
        schedule: one entry for each block.
        execution: "auto", "static" or "ragged".
        generator: source of randomness for methods that draw while training.
    """

    def __init__(
        self,
        model: nn.Module,
        host: HostModel,
        method: ReductionMethod,
        schedule: Schedule,
        *,
        execution: str = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        self.model, self.host, self.method, self.schedule = model, host, method, schedule
        self.plan = Plan(host, method, execution, generator, self._record)
        self.error: float | None = None  # of the self-test
        self.target: str | None = None  # what was asked of a target and what was reached
        first = next(index for index, entry in enumerate(schedule) if entry is not None)
        last = host.depth - 1
        self.blocks = tuple(
            ReducedBlock(
                host.block(index), self.plan, schedule[index], index=index, first=index == first, last=index == last
            )
            for index in range(first, host.depth)
        )
        self._names = {module: name for name, module in model.named_modules()}
        # For each block: the slot that holds each position, and the number of slots.
        self._last_call: dict[int, tuple[Tensor, int]] = {}
        self._image_size: tuple[int, int] | None = None

    @staticmethod
    def of(model: nn.Module) -> "Reduction | None":
        """The handle of a reduced model; None if it is not reduced."""
        handle = getattr(model.__dict__.get("without_padding"), "__self__", None)
        return handle if isinstance(handle, Reduction) else None

    @property
    def attached(self) -> bool:
        """Whether the model runs reduced by this handle."""
        return Reduction.of(self.model) is self

    def attach(self) -> None:
        """Put the reduced blocks in the place of the host's."""
        for block in self.blocks:
            block.host.module.forward = block.forward
        self._hooks = [self.host.embedding.register_forward_pre_hook(self._note_image_size, with_kwargs=True)]
        self._readout = self.host.readout
        for module, name, function in self._readout:
            setattr(module, name, function)
        if self._readout:
            self._hooks += [module.register_forward_hook(copy_kept_mask) for module in self.host.between]
        self.model.__dict__["without_padding"] = self.without_padding

    def remove(self) -> None:
        """Give the model back as it was, bit for bit; a second call does nothing."""
        if not self.attached:
            return
        for block in self.blocks:
            del block.host.module.__dict__["forward"]
        for module, name, _ in self._readout:
            del module.__dict__[name]
        for hook in self._hooks:
            hook.remove()
        del self.model.__dict__["without_padding"]

    def __enter__(self) -> "Reduction":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    @contextmanager
    def attached_temporarily(self) -> Iterator[None]:
        """The model runs reduced within the context only."""
        self.attach()
        try:
            yield
        finally:
            self.remove()

    @property
    def routing(self) -> tuple[Routing, ...]:
        """For each block that reduces, which tokens of the image went on in the last eager call.

        Weights `[B, 1, K, N]` are 1 where carrier k holds position n; a merged token holds several. Compiled and
        exported models record nothing.
        """
        return tuple(self._routing_of(block) for block in self.blocks if block.index in self._last_call)

    def _record(self, index: int, state: TokenState) -> None:
        """Remember which positions the block at `index` carries on."""
        # Rows are numbered over the batch; slots within each image.
        start = state.layout.flat(state.holder.new_zeros(state.holder.shape[0], 1))
        slots = (state.holder - start).where(state.holder >= 0, -1)
        self._last_call[index] = slots, state.layout.width

    def forget(self) -> None:
        """Drop the record of the last call."""
        self._last_call.clear()
        self._image_size = None

    def without_padding(self, *inputs: Any, **keywords: Any) -> Iterator[Callable[[], object]]:
        """For each image a call that runs it alone, without padding: what `narrows.measure` counts."""
        tensors = [value for value in (*inputs, *keywords.values()) if isinstance(value, Tensor) and value.ndim]
        batch = len(tensors[0])

        def of(image: int, value: Any) -> Any:
            return value[image : image + 1] if isinstance(value, Tensor) and value.shape[:1] == (batch,) else value

        for image in range(batch):
            arguments = [of(image, value) for value in inputs]
            yield partial(self._packed, arguments, {name: of(image, value) for name, value in keywords.items()})

    def _packed(self, inputs: list[Any], keywords: dict[str, Any]) -> object:
        """One image alone, without rows that hold no token, whatever the execution."""
        execution, self.plan.execution = self.plan.execution, "ragged"
        try:
            return self.model(*inputs, **keywords)
        finally:
            self.plan.execution = execution

    def _note_image_size(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the size of the images, which gives the grid of their tokens."""
        if not tracing():
            images = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            self._image_size = images.shape[-2], images.shape[-1]

    def _routing_of(self, block: ReducedBlock) -> Routing:
        holder, width = self._last_call[block.index]
        slots = torch.arange(width, device=holder.device)[:, None]
        weights = (holder[:, None] == slots)[:, None].float()
        prefix, name = self.host.prefix, self._names[block.host.module]
        routing = Routing(weights, carriers="kept tokens", prefix=prefix, name=name)
        if self._image_size is None:
            return routing
        height, width = self.host.token_grid(*self._image_size)
        # In training, a model may have dropped patches of its own before the first block.
        fits = prefix + height * width == holder.shape[1]
        return routing.with_grid((height, width), prefix=prefix) if fits else routing

    def __str__(self) -> str:
        tokens = self.host.num_tokens
        kept = ", ".join(
            f"{count_of(entry, tokens)} after block {index}"
            for index, entry in enumerate(self.schedule)
            if entry is not None
        )
        last = self.host.depth - 1
        target = () if self.target is None else (f"target      {self.target}",)
        return "\n".join(
            (
                f"{type(self.host.module).__name__} reduced by {self.method.name}" + " (removed)" * (not self.attached),
                f"tokens      {tokens} after {self.host.prefix} special ones",
                f"kept        {'at most ' if self.method.adaptive else ''}{kept}",
                f"blocks      {self.blocks[0].index} to {last} of 0 to {last} run reduced",
                *target,
                f"execution   {self.plan.execution}",
                f"self-test   all tokens kept: differs from the untouched model by {self.error:.1e}",
            )
        )
