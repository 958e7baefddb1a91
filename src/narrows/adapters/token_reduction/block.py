"""The forward that takes a block's place, and what it shares with the other reduced blocks of the model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from narrows.adapters.token_reduction.budget import Entry, count_of
from narrows.adapters.token_reduction.hosts.base import BlockCall, HostBlock, HostModel
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
    Packed,
    TokenState,
    attach_kept_mask,
    attach_state,
    attend,
    gather_rows,
    state_of,
)
from narrows.errors import InvalidArgument, NarrowsError
from narrows.ops.token_sampling import TokenSample


@dataclass
class Plan:
    """What the reduced blocks of a model share.

    Args:
        host: the model.
        method: chooses or merges tokens.
        execution: "auto", "static" or "ragged".
        generator: source of randomness for methods that draw while training.
        record: told by every block that reduces, by its number, which tokens go on; not while a graph is traced.
    """

    host: HostModel
    method: ReductionMethod
    execution: str
    generator: torch.Generator | None
    record: Callable[[int, TokenState], None]


@dataclass(frozen=True)
class Step:
    """One call of one block: attention and updates of tokens that know their positions in the image.

    Args:
        model: the host.
        block: its block.
        call: what the block was called with.
        state: the tokens that came in.
    """

    model: HostModel
    block: HostBlock
    call: BlockCall
    state: TokenState

    @property
    def positions(self) -> int:
        """How many tokens the image had after the prefix before any were dropped."""
        return self.call.grid.shape[1] - self.model.prefix

    def apply_rotary(self, heads: Float[Tensor, "R n H d"], state: TokenState) -> Float[Tensor, "R n H d"]:
        """Rotary position embedding of queries or keys, by the positions that their tokens have in the image."""
        rotary = self.call.rotary
        if rotary is None:
            return heads
        images, positions = rotary.shape[:2]
        rows = state.ids.where(state.ids >= 0, positions - 1)
        if images > 1:
            rows = rows + state.layout.per_row(torch.arange(images, device=rows.device) * positions)
        return self.block.rotate(heads, gather_rows(rotary, rows))

    def attention_update(
        self,
        query: Float[Tensor, "S m H d"],
        key: Float[Tensor, "R n H d"],
        value: Float[Tensor, "R n H d"],
        normed: Float[Tensor, "S m D"],
        queries: TokenState,
    ) -> Float[Tensor, "S m D"]:
        """What attention to the tokens that came in adds to the tokens `queries`, whose attention input is `normed`."""
        attended = attend(
            query,
            key,
            value,
            queries.layout,
            self.state.layout,
            scale=self.block.scale,
            bias=self._bias(queries),
            dropout=self.block.dropout,
        )
        return self.block.attention_update(attended.flatten(2), normed)

    def attention_received(self, normed: Tensor, query: Tensor | None, key: Tensor) -> Float[Tensor, "B G n"]:
        """Attention weights that each token receives: from the class token, else from the pooling query, else the mean.

        Args:
            normed: the input of attention.
            query: rotated; None: to be projected from `normed`, as far as it is needed.
            key: rotated.
        """
        layout, scale, bias = self.state.layout, self.block.scale, self._bias(self.state)
        if self.model.class_token:
            first = layout.flat(self.state.ids.new_zeros(layout.batch, 1))
            class_query = self.block.query(gather_rows(normed, first)) if query is None else gather_rows(query, first)
            return attention_of_query(
                class_query, key, layout, scale=scale, bias=None if bias is None else bias[:, :, 0]
            )
        logits = self.model.pooling_logits(self.state.tokens)
        if logits is not None:
            return attention_of_logits(logits, layout, bias=bias)
        queries = self.apply_rotary(self.block.query(normed), self.state) if query is None else query
        return mean_attention(queries, key, layout, scale=scale, bias=bias)

    def added(self, state: TokenState, update: Float[Tensor, "R n D"], drop_path: nn.Module) -> TokenState:
        """The tokens plus an update, which stochastic depth leaves out for some images."""
        if isinstance(state.layout, Packed) and not isinstance(drop_path, nn.Identity):
            factors = drop_path(update.new_ones(state.layout.batch, 1, 1))
            update = update * state.layout.per_row(factors[:, 0])
        else:
            update = drop_path(update)
        return state.with_tokens(state.tokens + update)

    def _bias(self, queries: TokenState) -> Tensor | None:
        """What is added to the logits: log sizes of merged tokens, or the host's mask for these queries and keys."""
        keys = self.state
        if keys.sizes is not None:  # proportional attention: a token counts as often as the tokens merged into it
            return keys.sizes.log().to(keys.tokens.dtype)[:, None, None]
        if self.call.bias is None:
            return None
        by_query = torch.take_along_dim(self.call.bias, queries.ids[:, None, :, None], 2)
        return torch.take_along_dim(by_query, keys.ids[:, None, None, :], 3)


class ReducedBlock:
    """One block of the host, from the first that reduces on; `forward` is bound into the block's `__dict__`.

    A bound method of a plain object: copying the model copies it with the block it belongs to.

    Args:
        host: the block, taken apart.
        plan: what it shares with the other blocks.
        entry: how many tokens, or what share of the grid's, go on; None for all that come.
        index: of the block.
        first: no block before it is reduced.
        last: no block after it is.
    """

    def __init__(self, host: HostBlock, plan: Plan, entry: Entry, *, index: int, first: bool, last: bool) -> None:
        self.host, self.plan, self.entry = host, plan, entry
        self.index, self.first, self.last = index, first, last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block's own `forward` takes and returns."""
        return self.host.call(self._forward, *args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.host.arguments(*args, **kwargs)
        state = TokenState.all_of(call.grid) if self.first else state_of(call.grid)
        if state is None:
            raise NarrowsError(
                f"block {self.index} of the reduced model was not given what the reduced block before it returned: "
                "something replaced the tokens between the two (a hook, a wrapper around single blocks, reentrant "
                "gradient checkpointing, a call of one block alone). Take it away, or remove() the reduction."
            )
        step = Step(self.plan.host, self.host, call, state)
        attended = self._attention(step)
        update = self.host.feed_forward_update(attended.tokens)
        state = step.added(attended, update, self.host.drop_paths()[1])
        if self.entry is not None and not tracing():
            self.plan.record(self.index, state)
        return self.host.result(attach_kept_mask(state) if self.last else attach_state(state))

    def _attention(self, step: Step) -> TokenState:
        """The tokens that this block keeps, after attention."""
        method, prefix = self.plan.method, self.plan.host.prefix
        if self.entry is None:
            return self._all(step)[0]
        count = count_of(self.entry, step.positions)
        sampled_anyway = method.adaptive and count == step.positions
        if step.state.layout.width - prefix <= count and not sampled_anyway:
            return self._all(step)[0]
        if isinstance(method, Pruning):
            return self._pruned(step, method, count)
        assert isinstance(method, Merging)
        return self._merged(step, method, count)

    def _all(self, step: Step) -> tuple[TokenState, Signals]:
        """All tokens after attention, and what a method may look at."""
        state = step.state
        normed = self.host.normed(state.tokens)
        query, key, value = self.host.query_key_value(normed)
        rotated_key, rotated_query = step.apply_rotary(key, state), step.apply_rotary(query, state)
        update = step.attention_update(rotated_query, rotated_key, value, normed, state)
        signals = self._signals(step, key, value, normed, rotated_query, rotated_key)
        return step.added(state, update, self.host.drop_paths()[0]), signals

    def _pruned(self, step: Step, method: Pruning, count: int) -> TokenState:
        """Tokens chosen by their keys and values; only their queries are projected, and attend to all."""
        state = step.state
        normed = self.host.normed(state.tokens)
        key, value = self.host.key_value(normed)
        rotated_key = step.apply_rotary(key, state)
        with torch.no_grad():
            sample = method.choose(self._signals(step, key, value, normed, None, rotated_key), count)
        sample = _with_prefix(sample, self.plan.host.prefix)
        kept, rows = state.kept(sample, adaptive=method.adaptive, pack=self._packs(step), last=step.call.grid)
        normed = gather_rows(normed, rows)
        query = step.apply_rotary(self.host.query(normed), kept)
        update = step.attention_update(query, rotated_key, value, normed, kept)
        return step.added(kept, update, self.host.drop_paths()[0])

    def _merged(self, step: Step, method: Merging, count: int) -> TokenState:
        """All tokens attend; what comes out is merged by one product with a matrix of shares."""
        if step.call.bias is not None:
            raise InvalidArgument(
                "attn_mask",
                expected=f"none: a mask does not say what the tokens merged by {method.name} may attend to",
                got=f"shape {tuple(step.call.bias.shape)}",
                hint="Reduce by a method that keeps tokens as they are: 'ats' or 'topk'.",
            )
        attended, signals = self._all(step)
        with torch.no_grad():
            merge = method.merge(signals, count)
            slots = torch.arange(merge.ids.shape[1], device=merge.into.device)
            belongs = merge.into[:, None] == slots[:, None]  # [B, K, n]
            sizes = None
            if method.proportional:
                before = torch.ones_like(merge.share) if attended.sizes is None else attended.sizes
                sizes = (belongs * before[:, None]).sum(-1)
        # A product, not index_add, which sums in no fixed order on a GPU and which few runtimes can export.
        shares = (belongs * merge.share[:, None]).to(attended.tokens.dtype)
        ids = attended.ids.gather(1, merge.ids.clamp_min(0)).where(merge.ids >= 0, -1)
        return attended.merged(shares @ attended.tokens, ids, sizes, merge.into)

    def _signals(
        self, step: Step, key: Tensor, value: Tensor, normed: Tensor, query: Tensor | None, rotated_key: Tensor
    ) -> Signals:
        return Signals(
            rows=(step.state.tokens, key, value),
            layout=step.state.layout,
            attention_received=lambda: step.attention_received(normed, query, rotated_key),
            prefix=self.plan.host.prefix,
            positions=step.positions,
            row_sizes=step.state.sizes,
            training=self.host.module.training,
            generator=self.plan.generator,
        )

    def _packs(self, step: Step) -> bool:
        """Whether rows without a token are left out, not masked."""
        layout, bias, execution = step.state.layout, step.call.bias, self.plan.execution
        if isinstance(layout, Packed):
            return True
        if execution == "ragged" and bias is not None:
            raise InvalidArgument(
                "attn_mask",
                expected="none with execution='ragged'",
                got=f"shape {tuple(bias.shape)}",
                hint="Use execution='auto' or 'static'.",
            )
        if execution == "auto":
            return bias is None and layout.mask is None and not tracing()
        return execution == "ragged"


def tracing() -> bool:
    """Whether a compiler or an exporter traces: shapes must not depend on values then."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def _with_prefix(sample: TokenSample, prefix: int) -> TokenSample:
    """A sample of the tokens after the prefix as one of all tokens, the prefix first."""
    before = torch.arange(prefix, device=sample.ids.device).expand(sample.ids.shape[0], -1)
    present = sample.mask.new_ones(before.shape)
    ids = torch.cat((before, (sample.ids + prefix).where(sample.mask, 0)), 1)
    return TokenSample(ids, torch.cat((present, sample.mask), 1))
