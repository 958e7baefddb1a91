"""What reduced blocks do: those that choose or merge tokens are taken apart, the others run their own forward on fewer.

Of a block that is taken apart only attention is written here, in the steps of its `HostBlock`; its modules are called.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.adapters.token_reduction.budget import Entry, count_of
from narrows.adapters.token_reduction.calls import current_call, hand_over, handed_over, is_computed_again, tracing
from narrows.adapters.token_reduction.hosts.base import BlockCall, HostBlock, HostModel, first_of, with_first
from narrows.adapters.token_reduction.methods import (
    Merging,
    Pruning,
    ReductionMethod,
    Signals,
    attention_of_logits,
    attention_of_query,
    mean_attention,
)
from narrows.adapters.token_reduction.tokens import (
    Kept,
    Merged,
    Packed,
    Padded,
    TokenState,
    attend,
    call_of,
    gather_rows,
    mark,
    state_of,
    transposed,
    with_kept_mask,
    with_state,
)
from narrows.errors import InvalidArgument, NarrowsError
from narrows.precision import compute_dtype


@dataclass(frozen=True)
class Plan:
    """What the reduced blocks of a model share.

    Args:
        host: the model.
        method: chooses or merges tokens.
        execution: "auto", "static" or "ragged".
        generator: source of randomness for methods that draw while training.
        first: number of the first block that reduces.
        record: told by every block that reduces, by its number, what became of the tokens; not while a graph is traced.
    """

    host: HostModel
    method: ReductionMethod
    execution: str
    generator: torch.Generator | None
    first: int
    record: Callable[[int, TokenState, torch.device], None]


# Arguments of calls that are remembered as gathered: rotary positions, a mask, relative positions; blocks that are each
# given their own would pile them up.
_REMEMBERED = 3


@dataclass(frozen=True)
class Visit:
    """One call of one block with the tokens that came in.

    Args:
        plan: of the reduction.
        block: of the host.
        call: what the block was called with.
        state: what became of the tokens so far.
        tokens: those that are carried.
    """

    plan: Plan
    block: HostBlock
    call: BlockCall
    state: TokenState
    tokens: Float[Tensor, "R n D"]

    @property
    def positions(self) -> int:
        """How many tokens the image had after the prefix before any were dropped."""
        return self.state.width - self.plan.host.prefix

    @property
    def rotary(self) -> Tensor | None:
        """`[B or 1, n, H or 1, R]`: rotary embeddings of the tokens, by the positions that they have in the image."""
        return self.gathered(self.call.rotary, self._rotary, self.state)

    @property
    def mask(self) -> Tensor | None:
        """`[B or 1, H or 1, n, n]`: the mask of the host for these tokens."""
        return self.gathered(self.call.bias, self._mask, self.state)

    @property
    def relative(self) -> Tensor | None:
        """`[B or 1, H, n, n]`: what the host adds to the logits by where two tokens stand in the image."""
        return self.gathered(self.call.relative, self._relative, self.state)

    @property
    def readable(self) -> Tensor | None:
        """What attention may read, or is to add wherever tokens stand: mask, padding, log sizes of merged tokens."""
        return _both(self.mask, self.state.bias)

    @property
    def bias(self) -> Tensor | None:
        """What attention is to add or may read."""
        return _both(self.relative, self.readable)

    def gathered(self, source: Any, gather: Callable[[Any, TokenState], Tensor], state: TokenState) -> Tensor | None:
        """What a call's argument is for the tokens of `state`: gathered once for all blocks that are given the same."""
        if source is None:
            return None
        for known, found in state.gathered:
            # torch.compile does not know whether two tuples are one.
            if type(known) is type(source) and (
                known[0] is source[0] if isinstance(source, tuple) else known is source
            ):
                return found
        found = gather(source, state)
        if not found.requires_grad:
            state.gathered.append((source, found))
            del state.gathered[:-_REMEMBERED]
        return found

    def _rotary(self, source: Any, state: TokenState) -> Tensor:
        rows = self.block.rotary_rows(source, state.width, self.plan.host.prefix)
        if not state.steps:
            return rows[:, :-1]
        ids = state.positions(rows.device)
        if rows.shape[0] == 1:
            return rows[0][ids]
        if isinstance(state.layout, Packed):
            ids = ids + state.layout.per_row(torch.arange(rows.shape[0], device=ids.device) * rows.shape[1])
            return rows.flatten(0, 1)[ids]
        return gather_rows(rows, ids)

    def _mask(self, source: Any, state: TokenState) -> Tensor:
        mask = self.block.mask_of(source, state.width)
        if not state.steps:
            return mask
        ids = state.positions(mask.device)
        return _gathered(_gathered(mask, ids, 2), ids, 3)

    def _relative(self, source: Tensor, state: TokenState) -> Tensor:
        source = source.reshape(-1, *source.shape[-3:])
        if not state.steps:
            return source
        ids = state.positions(source.device)
        padded = F.pad(source[0], (0, 1, 0, 1))  # a fused token stands nowhere
        return padded[:, ids[:, :, None], ids[:, None, :]].transpose(0, 1)

    def signals(self, query: Tensor, key: Tensor, value: Tensor, rotated_key: Tensor) -> Signals:
        """What a method may look at; queries are rotated."""
        return Signals(
            rows=(self.tokens, key, value),
            layout=self.state.layout,
            attention_received=partial(self._attention_received, query, rotated_key),
            prefix=self.plan.host.prefix,
            positions=self.positions,
            row_sizes=self.state.sizes,
            training=self.block.module.training,
            generator=self.plan.generator,
        )

    def _attention_received(self, query: Tensor, key: Tensor) -> Float[Tensor, "B G n"]:
        """Attention that each token receives: from the class token, else from the pooling query, else the mean."""
        host, layout, scale, bias = self.plan.host, self.state.layout, self.scale_of(query), self.bias
        if host.class_token:
            of_first = bias if bias is None else bias[:, :, 0]
            return attention_of_query(layout.first(query), key, layout, scale=scale, bias=of_first)
        logits = host.pooling_logits(self.state.call.tower or host.module, self.tokens)
        if logits is not None:
            return attention_of_logits(logits, layout, bias=self.readable)
        return mean_attention(query, key, layout, scale=scale, bias=bias)

    def scale_of(self, query: Float[Tensor, "R n H d"]) -> float:
        """Factor of the attention logits."""
        scale = self.block.scale
        return query.shape[-1] ** -0.5 if scale is None else scale

    def heads(self, normed: Float[Tensor, "R n D"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and keys without rotary positions, in this order."""
        query, key, value = self.block.query_key_value(normed)
        rotary = self.rotary
        if rotary is None:
            return query, key, value, key
        return self.block.rotate(query, rotary), self.block.rotate(key, rotary), value, key

    def packs(self) -> bool:
        """Whether rows without a token are left out, not masked."""
        layout, execution, relative = self.state.layout, self.plan.execution, self.call.relative is not None
        masked = relative or self.call.bias is not None
        if isinstance(layout, Packed) or (self.state.call.packed and layout.batch == 1):
            return True
        if layout.batch == 0:
            return False
        if execution == "ragged" and masked:
            raise InvalidArgument(
                "execution" if relative else "attn_mask",
                expected="'auto' or 'static' for a model that adds relative positions to the logits of attention"
                if relative
                else "none with execution='ragged'",
                got="'ragged'" if relative else "one",
                hint="Use execution='auto' or 'static'.",
            )
        if execution == "auto":
            # Lengths of packed rows are read back to the host, which a GPU would have to wait for.
            return not masked and layout.mask is None and not tracing() and self.tokens.device.type == "cpu"
        return execution == "ragged"


class ReducedBlock:
    """One block of the host, from the first on.

    Args:
        host: the block.
        plan: what it shares with the other blocks.
        entry: how many tokens, or what share of the grid's, go on; None for all that come.
        index: of the block.
        last: whether no block comes after it.
        in_steps: take the block apart although it keeps every token; otherwise only where its own forward cannot run.
    """

    def __init__(
        self, host: HostBlock, plan: Plan, entry: Entry, *, index: int, last: bool, in_steps: bool = False
    ) -> None:
        self.host, self.plan, self.entry = host, plan, entry
        self.index, self.last, self.in_steps = index, last, in_steps

    def run(self, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The block's `forward`."""
        block = self._of(module)
        tokens, state = self._incoming(block, args, kwargs)
        visit = Visit(self.plan, block, _arguments(block, state, args, kwargs), state, tokens)
        readable = isinstance(state.layout, Padded) and (state.bias is None or block.takes_bias)
        readable = readable and (block.takes_positions or len(state.steps) == 0)
        if self.entry is None and readable and not self.in_steps:
            args, kwargs = self._narrowed(visit, args, kwargs)
            return self._returned(block, own(*args, **kwargs), tokens, state)
        block.check_unobserved(self.index)
        self._check_kept(tokens, state)
        with self._no_second_draw():
            tokens, state = self._attention(visit)
        update = block.feed_forward_update(tokens)
        tokens = _added(tokens, update, block.drop_paths()[1], state)
        if self.entry is not None and not tracing():
            self.plan.record(self.index, state, tokens.device)
        return block.result(first_of(args, kwargs), in_order(block, self._outgoing(tokens, state)))

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A forward pre-hook of a block that keeps every token: its arguments for the tokens that are carried."""
        block = self._of(module)
        if self.index < self.plan.first:
            tokens = block.tokens(first_of(args, kwargs))
            if call_of(tokens) is None:
                mark(tokens, current_call())
            return None
        tokens, state = self._incoming(block, args, kwargs)
        call = _arguments(block, state, args, kwargs)
        return self._narrowed(Visit(self.plan, block, call, state, tokens), args, kwargs)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """A forward hook of such a block: what becomes of the tokens goes with them."""
        block = self._of(module)
        if self.index > self.plan.first:  # other hooks may have replaced the tokens since
            return self._returned(block, result, *self._incoming(block, args, kwargs))
        call = call_of(block.tokens(first_of(args, kwargs)))
        if call is not None:
            mark(block.tokens(result), call)
        return None

    def _returned(self, block: HostBlock, result: Any, tokens: Tensor, state: TokenState) -> Any:
        """What the block's own forward returned, with what became of the tokens attached."""
        returned = in_order(block, block.tokens(result))
        if returned.shape[:2] != tokens.shape[:2]:
            raise NarrowsError(
                f"block {self.index} of the reduced model was given {tokens.shape[1]} tokens and returned "
                f"{returned.shape[1]}: it is a bottleneck itself. Reduce after it."
            )
        return block.with_tokens(result, in_order(block, self._outgoing(returned, state)))

    def _check_kept(self, tokens: Tensor, state: TokenState) -> None:
        """Raise under reentrant checkpointing, whose second forward would not be given what became of the tokens."""
        if state.call.differentiable and tokens.requires_grad and not torch.is_grad_enabled():
            raise InvalidArgument(
                "model",
                expected="activation checkpointing that is not reentrant, or around the whole vision transformer",
                got=f"reentrant checkpointing around block {self.index}",
                hint="Use use_reentrant=False (timm.layers.set_reentrant_ckpt(False), "
                "gradient_checkpointing_enable({'use_reentrant': False})).",
            )

    @contextmanager
    def _no_second_draw(self) -> Iterator[None]:
        """Raise if a method draws from the generator once more in the second forward of activation checkpointing."""
        generator = self.plan.generator
        before = None if generator is None or tracing() or not is_computed_again() else generator.get_state()
        yield
        if generator is not None and before is not None and not torch.equal(generator.get_state(), before):
            raise InvalidArgument(
                "generator",
                expected="None under activation checkpointing, which restores torch's global state alone",
                got="one that the second forward draws from again",
                hint=f"Seed {self.plan.method.name} by torch.manual_seed.",
            )

    def _of(self, module: nn.Module) -> HostBlock:
        return self.host if module is self.host.module else self.host.of(module)

    def _incoming(self, block: HostBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, TokenState]:
        """The tokens that are carried, and what became of the others."""
        given = block.tokens(first_of(args, kwargs))
        if call_of(given) is None:
            mark(given, current_call())
        tokens = in_order(block, given)
        state = state_of(tokens)
        if state is not None:
            return (tokens if state.tokens is None else state.tokens), replace(state, tokens=None)
        state = handed_over(self.index, tuple(tokens.shape[:2])) if self.index > self.plan.first else None
        if state is not None:
            return with_state(tokens, state), state
        if self.index > self.plan.first:
            raise NarrowsError(
                f"block {self.index} of the reduced model was not given what the reduced block before it returned: "
                "something replaced the tokens between the two by others (a hook, a wrapper around single blocks, "
                "reentrant gradient checkpointing, a call of one block alone). Take it away, or remove() the reduction."
            )
        call = call_of(tokens)
        assert call is not None, "it was marked above"
        batch, width = tokens.shape[:2]
        self.plan.host.check_count(width, call)
        return tokens, TokenState(call, width, Padded(batch, width))

    def _outgoing(self, tokens: Tensor, state: TokenState) -> Tensor:
        if not self.last:
            hand_over(self.index, state)
            return with_state(tokens, state)
        if state.call.reader != "special":
            return with_kept_mask(tokens, state)
        return state.layout.to_padded(tokens)

    def _narrowed(self, visit: Visit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's own arguments, for fewer tokens."""
        if not visit.state.steps:
            return args, kwargs
        first = visit.block.with_tokens(first_of(args, kwargs), in_order(visit.block, visit.tokens))
        args, kwargs = with_first(args, kwargs, first)
        return visit.block.narrowed(args, kwargs, visit.rotary, visit.bias, self.plan.host.prefix)

    def _attention(self, visit: Visit) -> tuple[Tensor, TokenState]:
        """The tokens that this block keeps, after attention."""
        method, prefix, state = self.plan.method, self.plan.host.prefix, visit.state
        if self.entry is None:
            return self._all(visit)[0], state
        count = count_of(self.entry, visit.positions)
        sampled_anyway = method.adaptive and count >= visit.positions
        if state.layout.width - prefix <= count and not sampled_anyway:
            return self._all(visit)[0], state
        if isinstance(method, Pruning):
            return self._pruned(visit, method, min(count, visit.positions))
        assert isinstance(method, Merging)
        left = state.layout.width - prefix
        stays = Fraction(1 - method.removes_at_most).limit_denominator(100)  # in whole numbers, which can be traced
        if count < stays.numerator * left // stays.denominator:
            raise InvalidArgument(
                "budget",
                expected=f"at least {left - int(left * method.removes_at_most)} of the {left} tokens that come to "
                f"block {self.index}: {method.name} removes at most {method.removes_at_most:.0%} at once",
                got=self.entry,
                hint="Give shares in place of counts for images larger than the model's own.",
            )
        return self._merged(visit, method, count)

    def _all(self, visit: Visit) -> tuple[Tensor, Signals]:
        """All tokens after attention, and what a method may look at."""
        block, state = visit.block, visit.state
        normed = block.normed(visit.tokens)
        query, key, value, plain_key = visit.heads(normed)
        attended = _attend(visit, query, key, value, state, visit.bias)
        update = block.attention_update(attended, normed if block.gated else None)
        tokens = _added(visit.tokens, update, block.drop_paths()[0], state)
        return tokens, visit.signals(query, plain_key, value, key)

    def _pruned(self, visit: Visit, method: Pruning, count: int) -> tuple[Tensor, TokenState]:
        """Tokens chosen by their keys and values attend to all."""
        block = visit.block
        normed = block.normed(visit.tokens)
        query, key, value, plain_key = visit.heads(normed)
        with torch.no_grad():
            step = self._chosen(visit, method, visit.signals(query, plain_key, value, key), count)
            after = self._after(visit, step)
        tokens, query = step.gather(visit.tokens), step.gather(query)
        bias = visit.bias
        if bias is not None and bias.shape[2] > 1:
            bias = _gathered(bias, step.rows, 2)
        attended = _attend(visit, query, key, value, after, bias)
        update = block.attention_update(attended, step.gather(normed) if block.gated else None)
        return _added(tokens, update, block.drop_paths()[0], after), after

    def _chosen(self, visit: Visit, method: Pruning, signals: Signals, count: int) -> Kept:
        """The tokens that go on, as rows of the layout they will have."""
        before = visit.state.layout
        batch = before.batch
        ids, mask = method.choose_with_prefix(signals, count)
        if not method.adaptive:
            return Kept(ids, before, Padded(batch, ids.shape[1]))
        assert mask is not None
        if not visit.packs():
            return Kept(ids, before, Padded(batch, ids.shape[1], mask))
        lengths = mask.sum(1).cpu()
        kept = torch.nonzero_static(mask.flatten(), size=int(lengths.sum()))[:, 0]
        if batch == 1:  # a single image needs no padding
            return Kept(ids[0, kept][None], before, Padded(1, kept.shape[0]))
        rows = (ids + before.starts(ids.device)).flatten()[kept][None]
        return Kept(rows, before, Packed(lengths, rows.device))

    def _after(self, visit: Visit, step: Kept) -> TokenState:
        ids = bias = None
        if any(argument is not None for argument in visit.call):
            ids = step.gather(visit.state.positions(step.rows.device))
        if isinstance(step.after, Padded) and step.after.mask is not None:
            bias = _as_bias(step.after.mask, visit.tokens)[:, None, None]
        return visit.state.after(step, visit.tokens, ids=ids, bias=bias)

    def _merged(self, visit: Visit, method: Merging, count: int) -> tuple[Tensor, TokenState]:
        """All tokens attend; what comes out is merged."""
        if visit.call.bias is not None:
            raise InvalidArgument(
                "attn_mask",
                expected=f"none: a mask does not say what the tokens merged by {method.name} may attend to",
                got="one",
                hint="Reduce by a method that keeps tokens as they are: 'ats' or 'topk'.",
            )
        attended, signals = self._all(visit)
        merged = method.merged(signals, attended, count)
        after = Padded(merged.tokens.shape[0], merged.tokens.shape[1])
        ids = bias = None
        with torch.no_grad():
            if visit.call.rotary is not None or visit.call.relative is not None:
                positions, width = visit.state.positions(merged.ids.device), visit.state.width
                without = positions.new_full((positions.shape[0], 1), width)
                ids = torch.cat((positions, without), 1).gather(1, merged.ids)
                ids = torch.cat((ids, without.expand(-1, after.width - ids.shape[1])), 1)
            if merged.sizes is not None:  # proportional attention: a token counts as often as the tokens merged into it
                bias = merged.sizes.to(attended.dtype).log()[:, None, None]
        if merged.into is None:
            step = Kept(merged.ids, visit.state.layout, after)
        else:
            before = Padded(attended.shape[0], attended.shape[1])
            step = Merged(merged.into, merged.placed, merged.ids, before, after)
        return merged.tokens, visit.state.after(step, attended, ids=ids, sizes=merged.sizes, bias=bias)


def in_order(block: HostBlock, tokens: Float[Tensor, "R n D"]) -> Tensor:
    """Tokens of the host as `[R, n, D]`, or the other way round, with what is known of them."""
    return transposed(tokens) if block.sequence_first else tokens


def _arguments(block: HostBlock, state: TokenState, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BlockCall:
    """What the block was called with; under an exporter without the full mask that transformers makes of no mask."""
    call = block.arguments(*args, **kwargs)
    return call if state.call.masked or not tracing() else block.unmasked(call)


def _gathered(bias: Shaped[Tensor, "Bb H q k"], ids: Int[Tensor, "B m"], axis: int) -> Shaped[Tensor, "B H *sizes"]:
    """The rows (axis 2) or columns (3) of these tokens."""
    # Not `take_along_dim`, which makes exporters write down the batch of the example.
    shape = [ids.shape[0], *bias.shape[1:]]
    shape[axis] = ids.shape[1]
    index = ids[:, None, :, None] if axis == 2 else ids[:, None, None]
    return bias.expand(ids.shape[0], -1, -1, -1).gather(axis, index.expand(shape))


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Two biases or masks of attention as one."""
    if first is None or second is None:
        return second if first is None else first
    if second.dtype == torch.bool:
        return first & second if first.dtype == torch.bool else first.masked_fill(~second, -torch.inf)
    return second.where(first, -torch.inf) if first.dtype == torch.bool else first + second


def _attend(
    visit: Visit, query: Tensor, key: Tensor, value: Tensor, queries: TokenState, bias: Tensor | None
) -> Tensor:
    return attend(
        query,
        key,
        value,
        queries.layout,
        visit.state.layout,
        scale=visit.scale_of(query),
        bias=bias,
        dropout=visit.block.dropout,
        fused=visit.block.fused,
    )


def _as_bias(mask: Bool[Tensor, "B n"], tokens: Tensor) -> Shaped[Tensor, "B n"]:
    """What attention adds to its logits in place of a mask.

    Kernels of a GPU take nothing else, and rows of memory whose length divides by 8: made once, not in every block.
    """
    if tracing():
        return mask
    batch, width = mask.shape
    rows = tokens.new_zeros((batch, -(-width // 8) * 8), dtype=compute_dtype(tokens))
    return rows[:, :width].masked_fill_(~mask, -torch.inf)


def _added(tokens: Tensor, update: Tensor, drop_path: nn.Module, state: TokenState) -> Tensor:
    """The tokens plus an update, which stochastic depth leaves out for some images."""
    if isinstance(state.layout, Packed) and not isinstance(drop_path, nn.Identity):
        factors = drop_path(update.new_ones(state.layout.batch, 1, 1))
        return tokens + update * state.layout.per_row(factors[:, 0])
    return tokens + drop_path(update)
