"""What kernels keep of the rows of slots, and the gradients of weights that are made of it."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from narrows.ops.slot_attention.common import Weights

ROWS = 16  # of a program


class Sizes(NamedTuple):
    """Of a call, as the kernels name them: B samples, K slots, H heads of width E, tokens of width D, or W aligned.

    Slots are S wide, the MLP's hidden layer M, and what the recurrent cell takes in U.
    """

    B: int
    K: int
    H: int
    D: int
    W: int
    S: int
    E: int
    M: int
    U: int
    two_way: bool = False

    @classmethod
    def of(cls, slots: Tensor, weights: Weights, heads: int = 1, *, two_way: bool = False) -> "Sizes":
        (inner, dim), (batch, number, width) = weights.key.shape, slots.shape
        hidden, update = weights.expand.shape[0], weights.input.shape[1]
        return cls(batch, number, heads, dim, dim + -dim % 16, width, inner // heads, hidden, update, two_way)

    @property
    def widths(self) -> tuple[int, ...]:
        """As kernels take them."""
        return self.D, self.W, self.S, self.E, self.M, self.U

    @property
    def rows(self) -> int:
        return self.B * self.K

    @property
    def programs(self) -> int:
        return -(-self.rows // ROWS)

    def kept(self) -> list[int]:
        """Values, mapped heads, hidden layer, what it takes in, what queries are made of, shifted means, queries.

        In the two-way form what the MLP makes; what tokens read, their keys and values.
        """
        one_way = [self.H * self.E, self.S, self.M, self.S, self.S, self.H * self.W, self.H * self.E]
        return [*one_way, *[self.S, self.S, self.D, self.D][: 4 * self.two_way]]

    def made(self) -> list[int]:
        """Gradients of queries, readers, values, mapped heads, what the MLP makes, hidden layer, gates; the old slots.

        In the two-way form of the last gates; the slots between the cells; gradients of keys, readers, values and gates
        of the tokens.
        """
        heads, width, dim = self.H * self.E, self.S, self.D
        one_way = [heads, self.H * self.W, heads, width, width, self.M, 6 * width, width]
        return [*one_way, *[6 * width, width, dim, self.W, dim, 3 * dim][: 6 * self.two_way]]

    def summed(self) -> dict[str, int]:
        """Gradients of vectors but the gain and shift of tokens that slots read."""
        heads, width, dim = self.H * self.E, self.S, self.D
        one_way = {
            "key_bias": heads,
            "value_bias": heads,
            "out_bias": width,
            "input_bias": 3 * width,
            "state_bias": 3 * width,
            "mlp_gain": width,
            "mlp_shift": width,
            "expand_bias": self.M,
            "contract_bias": width,
            "slot_gain": width,
            "slot_shift": width,
            "query_bias": heads,
        }
        two_way = {
            "last_input_bias": 3 * width,
            "last_state_bias": 3 * width,
            "tokens.slot_gain": dim,
            "tokens.slot_shift": dim,
            "tokens.gain": width,
            "tokens.shift": width,
            "tokens.query_bias": dim,
            "tokens.key_bias": dim,
            "tokens.value_bias": dim,
        }
        return one_way | two_way if self.two_way else one_way


def row_of(widths: list[int]) -> int:
    """How long a row of parts is that each begin at a multiple of 16."""
    return sum(width + -width % 16 for width in widths)


def parts_of(rows: Tensor, widths: list[int]) -> list[Tensor]:
    """The parts of rows `[..., row_of(widths)]`."""
    padded = [width + -width % 16 for width in widths]
    return [part[..., :width] for part, width in zip(rows.split(padded, -1), widths, strict=True)]


def matrices_of(weights: Weights, sizes: Sizes, kept: Tensor, made: Tensor) -> dict[str, Tensor]:
    """Gradients of matrices by name, one product each; "tokens." before those of the side that reads slots."""
    values, outs, hidden, normed, asked, shifted, queries, *more = parts_of(kept.flatten(0, 1), sizes.kept())
    of_queries, of_readers, of_values, of_outs, of_new, of_hidden, gates, old, *of_more = parts_of(
        made.flatten(0, 1), sizes.made()
    )

    def by_head(grad: Tensor, rows: Tensor) -> Tensor:
        grad, rows = (x.unflatten(1, (sizes.H, -1)).transpose(0, 1) for x in (grad, rows))
        return (grad.mT @ rows[..., : sizes.D]).flatten(0, 1)

    gated = 3 * sizes.S
    matrices = {
        "key": by_head(queries, of_readers),
        "value": by_head(of_values, shifted),
        "input": gates[:, :gated].mT @ (values if weights.out is None else outs),
        "state": gates[:, gated:].mT @ old,
        "expand": of_hidden.mT @ normed,
        "contract": of_new.mT @ hidden,
        "query": of_queries.mT @ asked,
    }
    if weights.out is not None:
        matrices["out"] = of_outs.mT @ values
    if sizes.two_way:
        contracted, read, keys, read_values = more
        of_last, between, of_keys, of_token_readers, of_read_values, of_gates = of_more
        matrices |= {
            "last_input": of_last[:, :gated].mT @ contracted,
            "last_state": of_last[:, gated:].mT @ between,
            "tokens.key": of_keys.mT @ read,
            "tokens.value": of_read_values.mT @ read,
            "tokens.query": keys.mT @ of_token_readers[:, : sizes.D],
            "tokens.input": of_gates.mT @ read_values,
        }
    return matrices


def in_order(
    weights: dict[str, Tensor], matrices: dict[str, Tensor], vectors: Iterable[tuple[Tensor, dict[str, int]]]
) -> list[Tensor]:
    """Gradients of weights in their order, dtype and layout, from those of matrices and sums that hold vectors."""
    in_dtype: dict[torch.dtype, dict[str, Tensor]] = {}
    vectors = list(vectors)
    for dtype in {weight.dtype for weight in weights.values()}:
        parts = in_dtype.setdefault(dtype, {})
        for summed, widths in vectors:
            parts.update(zip(widths, summed.to(dtype).split(list(widths.values())), strict=True))
    return [
        matrices[name].to(weight.dtype).contiguous() if name in matrices else in_dtype[weight.dtype][name]
        for name, weight in weights.items()
    ]


def unpacked(weights: list[Tensor], present: list[bool]) -> list[Tensor | None]:
    """Weights and None where there is none."""
    rest = iter(weights)
    return [next(rest) if there else None for there in present]
