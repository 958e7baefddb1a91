"""The handle of a reduced model: which tokens it kept, and how the reduction is undone."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from narrows.adapters.token_reduction.block import Plan, ReducedBlock
from narrows.adapters.token_reduction.budget import Schedule, count_of
from narrows.adapters.token_reduction.calls import Tower, averaging, drive, noted, release
from narrows.adapters.token_reduction.hosts.base import HostBlock, HostModel, RunsItself
from narrows.adapters.token_reduction.kept_tokens import KeptTokens, shorten
from narrows.adapters.token_reduction.methods import Merging, ReductionMethod
from narrows.adapters.token_reduction.tokens import Packed, Padded, TokenState, copy_kept_mask
from narrows.errors import InvalidArgument, InvalidType
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
        self.error: float | None = None  # of the self-test
        self.example: Any = None  # what the whole model is called with, if not with images alone
        self.target: str | None = None  # what was asked of a target and what was reached
        first = next(index for index, entry in enumerate(schedule) if entry is not None)
        self.plan = Plan(host, method, execution, generator, first, self._record)
        # Rows without padding, and masks that a block's own forward does not take, need the steps of all later blocks.
        packs = method.adaptive and execution != "static"
        biased = method.adaptive or (isinstance(method, Merging) and method.proportional)
        self.blocks: list[ReducedBlock] = []
        self.taken_apart: list[ReducedBlock] = []
        for index, entry in enumerate(schedule):
            in_steps = entry is not None or (index > first and biased)
            block = ReducedBlock(
                self._host_block(index, in_steps), self.plan, entry, index=index, last=index == host.depth - 1
            )
            self.blocks.append(block)
            closed = (biased and not block.host.takes_bias) or not block.host.takes_positions
            if entry is not None or (index > first and (packs or closed)):
                self.taken_apart.append(block)
        self._tower = Tower(host, method.name)
        self._hooks: list[Any] = []
        self._driven: list[nn.Module] = []
        self._names = {module: name for name, module in model.named_modules()}
        # For each block that reduces, what became of the tokens in the last call, and where they are.
        self._last_call: dict[int, tuple[TokenState, torch.device]] = {}

    def _host_block(self, index: int, in_steps: bool) -> HostBlock:
        try:
            return self.host.block(index)
        except InvalidType:
            if in_steps:
                raise
            return RunsItself(self.host.blocks[index])

    @staticmethod
    def of(model: nn.Module) -> "Reduction | None":
        """The handle of a reduced model; None if it is not reduced."""
        handle = getattr(model.__dict__.get("without_padding"), "__self__", None)
        return handle if isinstance(handle, Reduction) else None

    @property
    def attached(self) -> bool:
        """Whether the model runs reduced by this handle."""
        return Reduction.of(self.model) is self

    def attach(self) -> "Reduction":
        """Let the model run reduced. Whatever fails, every module is as it was before."""
        try:
            self._attach()
        except BaseException:
            self._detach()
            raise
        return self

    def check_replaceable(self) -> None:
        """Raise if somebody else has put a forward in the place of that of a block that is taken apart."""
        for block in self.taken_apart:
            if "forward" in block.host.module.__dict__:
                raise InvalidArgument(
                    "model",
                    expected="blocks that run their own forward",
                    got=f"block {block.index} with {block.host.module.__dict__['forward']!r} in its place",
                    hint="Undo what replaced it first.",
                )

    def _attach(self) -> None:
        self.check_replaceable()
        for block in self.taken_apart:
            self._drive(block.host.module, {"forward": block.run})
        for block in self.blocks:
            if block not in self.taken_apart:
                module = block.host.module
                self._hooks.append(module.register_forward_pre_hook(block.enter, with_kwargs=True))
                self._hooks.append(module.register_forward_hook(block.leave, with_kwargs=True, prepend=True))
        answers: dict[nn.Module, dict[str, Any]] = {
            self.host.module: {name: partial(self._tower.run, name) for name in self.host.entries}
        }
        for module, name in self.host.pools:
            answers.setdefault(module, {})[name] = self.host.pool
        for module in self.host.averaging(self.model):
            answers[module] = {"forward": averaging}
        for module, of_module in answers.items():
            self._drive(module, of_module)
        self._hooks += [module.register_forward_hook(copy_kept_mask) for module in self.host.between]
        embedding = self.host.embedding
        self._hooks.append(embedding.register_forward_pre_hook(self._tower.note_images, with_kwargs=True))
        self.model.__dict__["without_padding"] = self.without_padding

    def _drive(self, module: nn.Module, answers: dict[str, Any]) -> None:
        drive(module, answers)
        self._driven.append(module)

    def remove(self) -> None:
        """Give the model back as it was, bit for bit; a second call does nothing."""
        if self.attached:
            self._detach()

    def _detach(self) -> None:
        for module in self._driven:
            release(module)
        for hook in self._hooks:
            hook.remove()
        self._driven, self._hooks = [], []
        self.model.__dict__.pop("without_padding", None)

    def __enter__(self) -> "Reduction":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    @property
    def routing(self) -> tuple[Routing, ...]:
        """For each block that reduces, which tokens of the image went on in the last eager call.

        Weights `[B, 1, K, N]` are 1 where carrier k holds position n; a merged token holds several. Compiled and
        exported models record nothing.
        """
        return tuple(self._routing_of(block) for block in self.blocks if block.index in self._last_call)

    def _record(self, index: int, state: TokenState, device: torch.device) -> None:
        """Remember what became of the tokens up to the block at `index`, without the tokens themselves."""
        self._last_call[index] = replace(state, fills=(), gathered=[], call=replace(state.call, tower=None)), device

    @property
    def padded(self) -> bool:
        """Whether slots that hold no token were computed with in the last eager call."""
        layouts = [state.layout for state, _ in self._last_call.values()]
        return any(isinstance(layout, Padded) and layout.mask is not None for layout in layouts)

    def kept_tokens(self, **inputs: Any) -> KeptTokens:
        """Encode the images of a prompt, and shorten it to the tokens that were kept, each at the position it had.

        For a vision-language model of transformers that was reduced as a whole. Its projector and its language model
        then read kept tokens alone; nothing of the model is changed. Text keeps its positions too, so that a gap is
        where tokens were dropped. A merged token stands where its method puts it; one without a position (the fused one
        of `evit`) does not reach the language model.

        >>> kept = reduction.kept_tokens(**processor(images=image, text=prompt))  # doctest: +SKIP
        >>> model.generate(**kept.inputs, max_new_tokens=20)  # doctest: +SKIP

        Args:
            inputs: what the model is called with: `input_ids [B, L]` with a placeholder for each token of an image,
                `pixel_values`, and as they are at hand `attention_mask`, `position_ids`, `labels`, token types.

        Raises:
            InvalidType: a model that does not take encoded images, or does not read one feature for each token.
            InvalidArgument: inputs that are missing or do not fit, or a budget that reduces only after the last block
                that the language model reads.
        """

        def standing(block: int) -> Tensor | None:
            up_to = [index for index in self._last_call if index <= block]
            if not up_to:
                return None
            state, device = self._last_call[max(up_to)]
            return state.standing(device)

        if not self.attached:
            raise InvalidArgument("model", expected="a model that runs reduced", got="one whose reduction was removed")
        self.forget()
        return shorten(self.model, self.host, standing, inputs)

    def forget(self) -> None:
        """Drop the record of the last call."""
        self._last_call.clear()

    def without_padding(
        self, *inputs: Any, model: nn.Module | None = None, **keywords: Any
    ) -> Iterator[Callable[[], object]]:
        """For each image a call that runs it alone, without padding: what `narrows.measure` counts.

        Args:
            inputs: of the call.
            model: what is called; the whole model by default.
            keywords: of the call.
        """
        tensors = [value for value in (*inputs, *keywords.values()) if isinstance(value, Tensor) and value.ndim]
        batch = len(tensors[0])

        def of(image: int, value: Any) -> Any:
            return value[image : image + 1] if isinstance(value, Tensor) and value.shape[:1] == (batch,) else value

        for image in range(batch):
            arguments = [of(image, value) for value in inputs]
            named = {name: of(image, value) for name, value in keywords.items()}
            call = partial(self.model if model is None else model, *arguments, **named)
            yield partial(noted, call, packed=True)

    def _routing_of(self, block: ReducedBlock) -> Routing:
        state, device = self._last_call[block.index]
        layout = state.layout
        slots = torch.arange(layout.width, device=device)
        if isinstance(layout, Packed):
            slots = slots.expand(layout.batch, -1)[layout.mask][None]
        else:
            slots = slots.expand(layout.batch, -1)
        holder = state.on_grid(slots, -1)  # the slot that holds each position
        weights = (holder[:, None] == torch.arange(layout.width, device=device)[:, None])[:, None].float()
        prefix, name = self.host.prefix, self._names[block.host.module]
        routing = Routing(weights, carriers="kept tokens", prefix=prefix, name=name)
        grid = state.call.grid
        # In training, a model may have dropped patches of its own before the first block.
        if grid is None or prefix + grid[0] * grid[1] != state.width:
            return routing
        return routing.with_grid(grid, prefix=prefix)

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
                f"blocks      {self.plan.first} to {last} of 0 to {last} run reduced",
                *target,
                f"execution   {self._execution()}",
                f"self-test   all tokens kept: differs from the untouched model by {self.error:.1e}",
            )
        )

    def _execution(self) -> str:
        """What runs, and where `auto` chooses."""
        if self.plan.execution != "auto" or not self.method.adaptive:
            return self.plan.execution if self.plan.execution != "auto" else "static: as many tokens of every image"
        return "auto: ragged on the CPU, static on other devices, under masks and in graphs"
