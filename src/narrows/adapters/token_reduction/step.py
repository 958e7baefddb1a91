"""What one block does with the tokens that came in, in pieces that know where each token stands in the image."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from narrows.adapters.token_reduction.carried import Carried
from narrows.adapters.token_reduction.hosts.base import BlockCall, HostBlock, HostModel
from narrows.adapters.token_reduction.layout import Packed, attend, pick
from narrows.adapters.token_reduction.reading import read_by_all, read_by_logits, read_by_one


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
