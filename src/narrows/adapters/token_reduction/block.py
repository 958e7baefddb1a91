"""The forward that takes a block's place."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from narrows.adapters.token_reduction.budget import Entry, count_of
from narrows.adapters.token_reduction.hosts.base import BlockCall, HostBlock, HostModel
from narrows.adapters.token_reduction.methods import Merging, Pruning, Signals, read_by_all, read_by_logits, read_by_one
from narrows.adapters.token_reduction.tokens import Carried, Packed, attend, hand_on, hand_out, pick, received
from narrows.errors import InvalidArgument, NarrowsError
from narrows.ops.token_sampling import TokenSample

if TYPE_CHECKING:
    from narrows.adapters.token_reduction.reduction import Reduction


@dataclass(frozen=True)
class Step:
    """One block at work.

    Args:
        model: the host.
        block: its block.
        call: what the block was called with.
        carried: the tokens that came in.
    """

    model: HostModel
    block: HostBlock
    call: BlockCall
    carried: Carried

    @property
    def positions(self) -> int:
        """How many tokens the image had after the prefix before any were dropped."""
        return self.call.grid.shape[1] - self.model.prefix

    def turned(self, heads: Float[Tensor, "R n H d"], carried: Carried) -> Float[Tensor, "R n H d"]:
        """Queries or keys of these tokens, rotated by the positions they have in the image."""
        rotary = self.call.rotary
        if rotary is None:
            return heads
        images, positions = rotary.shape[:2]
        rows = carried.ids.where(carried.ids >= 0, positions - 1)
        if images > 1:
            rows = rows + carried.layout.spread(torch.arange(images, device=rows.device) * positions)
        return self.block.rotate(heads, pick(rotary, rows))

    def attention_update(
        self,
        query: Float[Tensor, "S m H d"],
        key: Float[Tensor, "R n H d"],
        value: Float[Tensor, "R n H d"],
        normed: Float[Tensor, "S m D"],
        asking: Carried,
    ) -> Float[Tensor, "S m D"]:
        """What the tokens that ask get from those that came in; `normed` are those that ask."""
        attended = attend(
            query,
            key,
            value,
            asking.layout,
            self.carried.layout,
            scale=self.block.scale,
            bias=self._bias(asking),
            dropout=self.block.dropout,
        )
        return self.block.attention_update(attended.flatten(2), normed)

    def reading(self, normed: Tensor, query: Tensor | None, key: Tensor) -> Callable[[], Float[Tensor, "B G n"]]:
        """Asks whoever reads the image, when it is called: class token, query that pools, or all queries.

        Args:
            normed: what attention reads.
            query: rotated, if there is one already.
            key: rotated.
        """

        def read() -> Tensor:
            layout, scale, bias = self.carried.layout, self.block.scale, self._bias(self.carried)
            if self.model.class_token:
                first = layout.flat(self.carried.ids.new_zeros(layout.batch, 1))
                asking = self.block.query(pick(normed, first)) if query is None else pick(query, first)
                return read_by_one(asking, key, layout, scale=scale, bias=None if bias is None else bias[:, :, 0])
            logits = self.model.pooling_logits(self.carried.tokens)
            if logits is not None:
                return read_by_logits(logits, layout, bias=bias)
            asking = self.turned(self.block.query(normed), self.carried) if query is None else query
            return read_by_all(asking, key, layout, scale=scale, bias=bias)

        return read

    def added(self, carried: Carried, update: Float[Tensor, "R n D"], drop_path: nn.Module) -> Carried:
        """The tokens plus an update that stochastic depth leaves out for some images."""
        if isinstance(carried.layout, Packed) and not isinstance(drop_path, nn.Identity):
            factors = drop_path(update.new_ones(carried.layout.batch, 1, 1))
            update = update * carried.layout.spread(factors[:, 0])
        else:
            update = drop_path(update)
        return carried.with_tokens(carried.tokens + update)

    def _bias(self, asking: Carried) -> Tensor | None:
        """What is added to the logits: sizes of joint tokens, or the host's mask for these queries and keys."""
        read = self.carried
        if read.sizes is not None:  # a token is read as often as the tokens it stands for
            return read.sizes.log().to(read.tokens.dtype)[:, None, None]
        if self.call.bias is None:
            return None
        by_query = torch.take_along_dim(self.call.bias, asking.ids[:, None, :, None], 2)
        return torch.take_along_dim(by_query, read.ids[:, None, None, :], 3)


class ReducedBlock:
    """One block of the host, from the first that reduces on; `forward` is bound into the block's `__dict__`.

    A bound method of a plain object: copying the model copies it with the block it belongs to.

    Args:
        host: the block, taken apart.
        reduction: what it is part of: model, method, execution, record.
        entry: how many tokens, or what share of the grid's, go on; None for all that come.
        index: of the block.
        first: no block before it is reduced.
        last: no block after it is.
    """

    def __init__(
        self, host: HostBlock, reduction: "Reduction", entry: Entry, *, index: int, first: bool, last: bool
    ) -> None:
        self.host, self.reduction, self.entry = host, reduction, entry
        self.index, self.first, self.last = index, first, last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block's own `forward` takes and returns."""
        return self.host.call(self._forward, *args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.host.arguments(*args, **kwargs)
        carried = Carried.all_of(call.grid) if self.first else received(call.grid)
        if carried is None:
            raise NarrowsError(
                f"block {self.index} of the reduced model was not given what the reduced block before it returned: "
                "something replaced the tokens between the two (a hook, a wrapper around single blocks, reentrant "
                "gradient checkpointing, a call of one block alone). Take it away, or remove() the reduction."
            )
        step = Step(self.reduction.host, self.host, call, carried)
        attended = self._attention(step)
        update = self.host.feed_forward_update(attended.tokens)
        carried = step.added(attended, update, self.host.drop_paths()[1])
        self.reduction.record(self, carried)
        return self.host.result(hand_out(carried) if self.last else hand_on(carried))

    def _attention(self, step: Step) -> Carried:
        """The tokens that go on, after attention."""
        method, prefix = self.reduction.method, self.reduction.host.prefix
        if self.entry is None:
            return self._all(step)[0]
        count = count_of(self.entry, step.positions)
        sampled_anyway = method.adaptive and count == step.positions
        if step.carried.layout.width - prefix <= count and not sampled_anyway:
            return self._all(step)[0]
        if isinstance(method, Pruning):
            return self._pruned(step, method, count)
        assert isinstance(method, Merging)
        return self._merged(step, method, count)

    def _all(self, step: Step) -> tuple[Carried, Signals]:
        """All tokens after attention to one another, and what a method may know of them."""
        carried = step.carried
        normed = self.host.normed(carried.tokens)
        query, key, value = self.host.query_key_value(normed)
        turned, asking = step.turned(key, carried), step.turned(query, carried)
        update = step.attention_update(asking, turned, value, normed, carried)
        signals = self._signals(step, key, value, normed, asking, turned)
        return step.added(carried, update, self.host.drop_paths()[0]), signals

    def _pruned(self, step: Step, method: Pruning, count: int) -> Carried:
        """Tokens chosen by their keys and values; only their queries are projected, and attend to all."""
        carried = step.carried
        normed = self.host.normed(carried.tokens)
        key, value = self.host.key_value(normed)
        turned = step.turned(key, carried)
        with torch.no_grad():
            sample = method.choose(self._signals(step, key, value, normed, None, turned), count)
        sample = _with_prefix(sample, self.reduction.host.prefix)
        kept, rows = carried.kept(sample, adaptive=method.adaptive, pack=self._packs(step), last=step.call.grid)
        normed = pick(normed, rows)
        query = step.turned(self.host.query(normed), kept)
        update = step.attention_update(query, turned, value, normed, kept)
        return step.added(kept, update, self.host.drop_paths()[0])

    def _merged(self, step: Step, method: Merging, count: int) -> Carried:
        """All tokens attend; what comes out is joined by one product with a matrix of shares."""
        if step.call.bias is not None:
            raise InvalidArgument(
                "attn_mask",
                expected=f"none: a mask says nothing of the joint tokens that {method.name} makes",
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
        # A product instead of adding up by index, which is in no fixed order on a GPU and which few runtimes export.
        shares = (belongs * merge.share[:, None]).to(attended.tokens.dtype)
        ids = attended.ids.gather(1, merge.ids.clamp_min(0)).where(merge.ids >= 0, -1)
        return attended.merged(shares @ attended.tokens, ids, sizes, merge.into)

    def _signals(
        self, step: Step, key: Tensor, value: Tensor, normed: Tensor, asking: Tensor | None, turned: Tensor
    ) -> Signals:
        return Signals(
            rows=(step.carried.tokens, key, value),
            layout=step.carried.layout,
            reading=step.reading(normed, asking, turned),
            prefix=self.reduction.host.prefix,
            positions=step.positions,
            row_sizes=step.carried.sizes,
            training=self.host.module.training,
            generator=self.reduction.generator,
        )

    def _packs(self, step: Step) -> bool:
        """Whether slots without a token are packed away."""
        layout, masked, execution = step.carried.layout, step.call.bias is not None, self.reduction.execution
        if isinstance(layout, Packed):
            return True
        if execution == "ragged" and masked:
            raise InvalidArgument(
                "attn_mask",
                expected="none with execution='ragged'",
                got=f"shape {tuple(step.call.bias.shape)}",  # pyright: ignore[reportOptionalMemberAccess]
                hint="Use execution='auto' or 'static'.",
            )
        if execution == "auto":
            return not masked and layout.mask is None and not tracing()
        return execution == "ragged"


def tracing() -> bool:
    """Whether a compiler or an exporter is looking: shapes must not depend on values then."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def _with_prefix(sample: TokenSample, prefix: int) -> TokenSample:
    """A sample of the tokens after the prefix as one of all tokens, the prefix first."""
    before = torch.arange(prefix, device=sample.ids.device).expand(sample.ids.shape[0], -1)
    present = sample.mask.new_ones(before.shape)
    ids = torch.cat((before, (sample.ids + prefix).where(sample.mask, 0)), 1)
    return TokenSample(ids, torch.cat((present, sample.mask), 1))
