"""How many tokens each block keeps."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from narrows.adapters.token_reduction.methods import ReductionMethod
from narrows.errors import InvalidArgument, InvalidType

# A count of tokens after the prefix, a share of those that the image had, or None for all that come.
Entry = int | float | None
Schedule = tuple[Entry, ...]
# One entry for the whole model, one for each block, or entries by number of the block.
FixedBudget = int | float | Sequence[Entry] | Mapping[int, Entry]
_FINEST = 10**6  # the greatest denominator of a share


def schedule_of(
    budget: FixedBudget,
    method: ReductionMethod,
    *,
    depth: int,
    num_tokens: int,
) -> Schedule:
    """The schedule of a budget: an entry for each block.

    A single number holds from block `depth // 4` on: attention of earlier blocks says little about which tokens matter.
    A method that can remove only a limited share at once removes equal shares in all blocks from there on, which keeps
    it well below its limit. (The paper of token merging merges a fixed number of tokens in every block.)

    Args:
        budget: a count, a share, one entry for each block, or entries by number of the block.
        method: that has to meet it.
        depth: number of blocks.
        num_tokens: tokens after the prefix, at the model's own image size.

    Raises:
        InvalidArgument, InvalidType: it cannot be met, or is not a budget.
    """
    if isinstance(budget, Mapping):
        schedule = _by_block(budget, depth)
    elif isinstance(budget, Sequence) and not isinstance(budget, str):
        schedule = tuple(budget)
        if len(schedule) != depth:
            raise InvalidArgument(
                "budget", expected=f"one entry for each of the {depth} blocks", got=f"{len(schedule)} entries"
            )
    else:
        _check_entry(budget, num_tokens)
        assert isinstance(budget, int | float)
        schedule = _from_one(budget, method, depth, num_tokens)
    for entry in schedule:
        if entry is not None:
            _check_entry(entry, num_tokens)
    if all(entry is None for entry in schedule):
        raise InvalidArgument("budget", expected="an entry that is not None", got=list(schedule))
    _check_steps(schedule, method, num_tokens)
    return schedule


def as_plain(budget: Any) -> Any:
    """A budget in Python's own numbers: those of tensors and NumPy, and blocks that are keys of JSON, as well."""
    if isinstance(budget, Mapping):
        return {_block(block): as_plain(entry) for block, entry in budget.items()}
    if isinstance(budget, list | tuple):
        return [as_plain(entry) for entry in budget]
    if hasattr(budget, "tolist"):  # tensors, arrays, and numbers that they are made of
        return budget.tolist()
    return budget


def _block(key: Any) -> Any:
    if isinstance(key, str) and key.isdigit():
        return int(key)
    return key.tolist() if hasattr(key, "tolist") else key  # pyright: ignore[reportAttributeAccessIssue]


def count_of(entry: int | float, num_tokens: int) -> int:
    """How many of `num_tokens` an entry allows: a count, or a share rounded, halves up, to at least one.

    In whole numbers, which exporters trace where `num_tokens` is a symbol.
    """
    if isinstance(entry, int):
        return entry
    share = Fraction(entry).limit_denominator(_FINEST)
    count = (2 * share.numerator * num_tokens + share.denominator) // (2 * share.denominator)
    return max(1, count) if isinstance(num_tokens, int) else count


def _by_block(budget: Mapping[int, Entry], depth: int) -> Schedule:
    unknown = [block for block in budget if not isinstance(block, int) or not 0 <= block < depth]
    if unknown:
        raise InvalidArgument("budget", expected=f"numbers of blocks from 0 to {depth - 1}", got=unknown)
    return tuple(budget.get(block) for block in range(depth))


def _from_one(entry: int | float, method: ReductionMethod, depth: int, num_tokens: int) -> Schedule:
    first = depth // 4
    if method.adaptive and count_of(entry, num_tokens) == num_tokens:
        return (None,) * first + (entry,) * (depth - first)
    steps = 1 if method.removes_at_most == 1 else depth - first
    share = count_of(entry, num_tokens) / num_tokens
    between = [share ** (step / steps) for step in range(1, steps)]
    schedule = (None,) * first + (*between, entry) + (None,) * (depth - first - steps)
    if _too_steep(schedule, method, num_tokens) is not None:
        raise InvalidArgument(
            "budget",
            expected=f"at most what {method.name} can remove in the {depth - first} blocks from block {first} on",
            got=entry,
        )
    return schedule


def _check_entry(entry: object, num_tokens: int) -> None:
    if isinstance(entry, bool) or not isinstance(entry, int | float):
        raise InvalidType(
            "budget",
            expected="a count, a share, a sequence or mapping of them, or a target such as narrows.TargetMACs",
            got=repr(entry),
        )
    if isinstance(entry, int) and not 1 <= entry <= num_tokens:
        raise InvalidArgument("budget", expected=f"a count of 1 to {num_tokens} tokens", got=entry)
    if isinstance(entry, float) and not 0 < entry <= 1:
        raise InvalidArgument("budget", expected="a share above 0 and at most 1", got=entry)


def _check_steps(schedule: Schedule, method: ReductionMethod, num_tokens: int) -> None:
    counts = [count_of(entry, num_tokens) for entry in schedule if entry is not None]
    if counts != sorted(counts, reverse=True):
        raise InvalidArgument(
            "budget", expected="entries that do not grow: tokens do not come back", got=list(schedule)
        )
    block = _too_steep(schedule, method, num_tokens)
    if block is not None:
        raise InvalidArgument(
            "budget",
            expected=f"steps in which {method.name} removes at most {method.removes_at_most:.0%} of the tokens",
            got=f"{schedule[block]} at block {block}",
            hint="Give one number, which is spread over blocks, or a schedule with smaller steps.",
        )


def _too_steep(schedule: Schedule, method: ReductionMethod, num_tokens: int) -> int | None:
    """The first block that would have to remove more tokens than the method can, if any."""
    left = num_tokens
    for block, entry in enumerate(schedule):
        if entry is None:
            continue
        count = min(left, count_of(entry, num_tokens))
        if count < int(left * (1 - method.removes_at_most)):
            return block
        left = count
    return None
