"""What a reduction method is: a small class that looks at one block and says which tokens go on."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from narrows.adapters.token_reduction.signals import Signals
from narrows.ops.token_sampling import TokenSample


class Merge(NamedTuple):
    """Tokens that go on in common.

    Args:
        into: `[B, n]`, the new slot that takes each token in; -1 for one that is dropped.
        share: `[B, n]`, the weight of each token in the slot that takes it in.
        ids: `[B, K]`, the slot (of the n) whose position each new slot keeps; -1 for one that stands nowhere.
    """

    into: Int[Tensor, "B n"]
    share: Float[Tensor, "B n"]
    ids: Int[Tensor, "B K"]


class ReductionMethod:
    """Says which tokens a block carries on. Subclass `Pruning` or `Merging` and pass an instance as `method=`.

    Methods see the prefix tokens (class token, distillation token, registers) only in `Signals`, and cannot drop them.
    They hold settings and no state: what they need comes in with the signals.
    """

    # Whether an image may keep fewer tokens than the budget allows.
    adaptive: bool = False
    # The greatest share of tokens that one application can remove; below 1, a budget is spread over several blocks.
    removes_at_most: float = 1.0

    @property
    def name(self) -> str:
        """What reports call it."""
        return type(self).__name__


class Pruning(ReductionMethod, ABC):
    """Chooses tokens before their queries are projected: what is dropped costs a key and a value, and no more."""

    @abstractmethod
    def choose(self, signals: Signals, count: int) -> TokenSample:
        """At most `count` of the tokens after the prefix.

        Args:
            signals: what the block knows.
            count: K, how many may go on; fewer only if the method is `adaptive`, and then at least one.

        Returns:
            `ids [B, K]` counted from the first token after the prefix, ascending, each once, and `mask [B, K]`.
        """


class Merging(ReductionMethod, ABC):
    """Joins tokens after attention: all of them attend, fewer go through the feed-forward."""

    # Whether attention counts a merged token as often as the tokens it stands for (Bolya et al. 2023, section 3).
    proportional: bool = False

    @abstractmethod
    def merge(self, signals: Signals, count: int) -> Merge:
        """`count` tokens, and where the method adds one a fused token, out of those after the prefix.

        Args:
            signals: what the block knows; nothing is masked.
            count: how many tokens go on.

        Returns:
            Slots and shares of all n tokens, the prefix first and untouched.
        """
