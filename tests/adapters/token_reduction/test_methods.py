"""What each method keeps, against the paper's words in plain loops."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from narrows.adapters.token_reduction import METHODS, Merging, Signals
from narrows.adapters.token_reduction.methods import ATS, EViT, MergedTokens, Random, ToMe, TopK
from narrows.adapters.token_reduction.tokens import Padded
from tests.support import assert_close


def signals(
    attention: Tensor,
    values: Tensor | None = None,
    keys: Tensor | None = None,
    *,
    prefix: int = 1,
    mask: Tensor | None = None,
    positions: int | None = None,
    sizes: Tensor | None = None,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> Signals:
    """Signals of tokens with this attention `[B, H, n]` and no more than a test needs."""
    batch, heads, width = attention.shape
    rows = torch.ones(batch, width, heads, 4)
    return Signals(
        rows=(rows[:, :, 0], rows if keys is None else keys, rows if values is None else values),
        layout=Padded(batch, width, mask),
        attention_received=lambda: attention,
        prefix=prefix,
        positions=width - prefix if positions is None else positions,
        row_sizes=sizes,
        training=training,
        generator=generator,
    )


def naive_quantiles(scores: list[float], num_samples: int) -> list[int]:
    """Inverse-transform sampling as Fayyaz et al. write it, in float64, every quantile looked up for itself.

    In units of 2^-32 of the greatest score, of which scores are whole multiples by definition: distances that are not
    equal differ by a 48th at least, and what float64 rounds is far below the thousandth that is looked at.
    """
    greatest = max(scores)
    units = [round(score / greatest * 2**32) if greatest > 0 else 2**32 for score in scores]
    order = sorted(range(len(units)), key=lambda i: (units[i], i))
    cdf, total = [], -float(units[order[0]])
    for i in order:
        total += units[i]
        cdf.append(total)
    start, end = min(entry for entry in cdf if entry > 0), cdf[-1]
    kept = set()
    for k in range(num_samples):
        quantile = end if num_samples == 1 else start + k / (num_samples - 1) * (end - start)
        distances = [round(abs(entry - quantile), 3) for entry in cdf]
        kept.add(order[distances.index(min(distances))])
    return sorted(kept)


def score_rows(kind: str, number: int) -> tuple[Tensor, Tensor]:
    """Rows of scores, and which of them are tokens."""
    generator = torch.Generator().manual_seed(len(kind))
    mask = torch.ones(number, 49, dtype=torch.bool)
    scores = torch.rand(number, 49, generator=generator).pow(4)
    if kind == "ties":
        scores = torch.randint(1, 5, (number, 49), generator=generator) / 8
    elif kind == "zeros":
        scores = scores * (torch.rand(number, 49, generator=generator) < 0.4)
        scores[0] = 0
    elif kind == "masked tails":
        mask = torch.arange(49) < torch.randint(2, 50, (number, 1), generator=generator)
    return scores, mask


@pytest.mark.parametrize("kind", ["any", "ties", "zeros", "masked tails"])
def test_ats_keeps_what_inverse_transform_sampling_keeps(kind: str) -> None:
    scores, mask = score_rows(kind, 250)  # 1,000 rows in all
    attention = torch.cat((torch.zeros(250, 1), scores), 1)[:, None]
    given = signals(attention, mask=torch.cat((torch.ones(250, 1, dtype=torch.bool), mask), 1))
    significance = given.significance.double()
    for count in (1, 7, 24, 49):
        sample = ATS().choose(given, count)
        for row in range(250):
            expected = [i for i in range(49) if mask[row, i]]
            if len(expected) > (1 if count == 49 else count):
                kept = naive_quantiles(significance[row, expected].tolist(), count)
                expected = [expected[i] for i in kept]
            assert sample.ids[row][sample.mask[row]].tolist() == expected, (count, row)


def test_ats_with_the_whole_budget_drops_what_is_insignificant_and_else_keeps_what_fits() -> None:
    attention = torch.tensor([[[0.0, 0.9, 0.05, 0.03, 0.02]]])
    assert ATS().choose(signals(attention), 4).mask.sum() < 4
    assert ATS().choose(signals(attention, positions=9), 4).mask.sum() == 4


def test_ats_weighs_attention_by_the_norm_of_values() -> None:
    attention = torch.full((1, 2, 9), 1 / 9)
    values = torch.full((1, 9, 2, 4), 0.01)
    values[:, 5] = 1.0
    assert ATS().choose(signals(attention, values), 1).ids.tolist() == [[4]]  # counted without the class token


def test_topk_keeps_the_most_attended() -> None:
    attention = torch.rand(6, 3, 33, generator=torch.Generator().manual_seed(0))
    sample = TopK().choose(signals(attention, prefix=2), 9)
    for row in range(6):
        means = attention[row].mean(0)[2:].tolist()
        assert sample.ids[row].tolist() == sorted(sorted(range(31), key=lambda i: -means[i])[:9])
    assert sample.mask.all()


def shares_of(method: Merging, given: Signals, count: int) -> tuple[Tensor, MergedTokens]:
    """`[B, K, n]`: what part each token has in each slot, as tokens that are rows of the identity show."""
    batch, _, width = given.attention.shape
    merged = method.merged(given, torch.eye(width).expand(batch, -1, -1), count)
    return merged.tokens, merged


def test_evit_fuses_the_others_by_their_attention() -> None:
    attention = torch.rand(4, 2, 17, generator=torch.Generator().manual_seed(0))
    shares, merged = shares_of(EViT(), signals(attention), 5)
    kept = TopK().choose(signals(attention), 5).ids + 1
    assert shares.shape == (4, 7, 17)
    for row in range(4):
        assert merged.ids[row].tolist() == [0, *kept[row].tolist()]  # the fused token has no position
        others = [i for i in range(1, 17) if i not in kept[row].tolist()]
        means = attention[row].mean(0)
        fused = torch.zeros(17)
        fused[others] = means[others] / means[others].sum()
        assert_close(shares[row, 6], fused)
        assert torch.equal(shares[row, :6], torch.eye(17)[merged.ids[row]])


def naive_bipartite(keys: Tensor, sizes: list[float], prefix: int, count: int) -> list[list[int]]:
    """Groups of slots that bipartite soft matching (Bolya et al. 2023) leaves, in the order of their places."""
    metric = keys.mean(1).tolist()
    grid = list(range(prefix, len(metric)))
    sources, targets = grid[0::2], grid[1::2]

    def cosine(i: int, j: int) -> float:
        a, b = torch.tensor(metric[i]).double(), torch.tensor(metric[j]).double()
        return float(a @ b / a.norm() / b.norm())

    best = {source: max(targets, key=lambda target: cosine(source, target)) for source in sources}
    gone = sorted(sources, key=lambda source: -cosine(source, best[source]))[: len(grid) - count]
    groups = {i: [i] for i in range(len(metric)) if i not in gone}
    for source in gone:
        groups[best[source]].append(source)
    return [groups[i] for i in sorted(groups)]


@pytest.mark.parametrize("prefix", [0, 2])
def test_tome_merges_the_most_similar_pairs(prefix: int) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(5, 15 + prefix, 2, 8, generator=generator)
    sizes = torch.randint(1, 4, (5, 15 + prefix), generator=generator).float()
    for count in (14, 10, 7):
        given = signals(torch.ones(5, 2, 15 + prefix), keys=keys, sizes=sizes, prefix=prefix)
        shares, merge = shares_of(ToMe(), given, count)
        for row in range(5):
            groups = naive_bipartite(keys[row], sizes[row].tolist(), prefix, count)
            assert merge.ids[row].tolist() == [group[0] for group in groups]
            for slot, group in enumerate(groups):
                expected = torch.zeros(15 + prefix)
                expected[group] = sizes[row, group] / sizes[row, group].sum()
                assert_close(shares[row, slot], expected)


def test_random_is_fixed_in_evaluation_and_seeded_in_training() -> None:
    attention = torch.ones(3, 1, 65)
    fixed = [Random(seed).choose(signals(attention), 20).ids for seed in (0, 0, 1)]
    assert torch.equal(fixed[0], fixed[1])
    assert not torch.equal(fixed[0], fixed[2])
    assert torch.equal(fixed[0][0], fixed[0][1])

    def drawn(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return Random().choose(signals(attention, training=True, generator=generator), 20).ids

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))
    assert not torch.equal(drawn(3)[0], drawn(3)[1])


@pytest.mark.parametrize("method", [method for name, method in METHODS.items() if name in ("ats", "topk", "random")])
def test_kept_tokens_come_in_their_order_and_once(method: Callable[[], TopK]) -> None:
    attention = torch.rand(4, 2, 30, generator=torch.Generator().manual_seed(0))
    sample = method().choose(signals(attention), 11)
    for ids, mask in zip(sample.ids, sample.mask, strict=True):
        assert ids[mask].tolist() == sorted(set(ids[mask].tolist()))
