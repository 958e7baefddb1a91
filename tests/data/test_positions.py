import numpy as np
import pytest

from narrows.data import Position, PositionSampler
from narrows.data.positions import keys, seed_of, uniforms


def _deal(length: int, processes: int, *, fill: bool, epoch: int = 0, shuffle: bool = True) -> list[list[Position]]:
    samplers = [
        PositionSampler(range(length), seed=5, shuffle=shuffle, fill=fill, num_replicas=processes, rank=rank)
        for rank in range(processes)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own():
    first, second = (_deal(50, 1, fill=False, epoch=epoch)[0] for epoch in (0, 1))
    assert sorted(p.index for p in first) == list(range(50)) == sorted(p.index for p in second)
    assert [p.index for p in first] != [p.index for p in second]
    assert {p.epoch for p in second} == {1}
    assert first == _deal(50, 1, fill=False)[0]


def test_processes_share_the_batches_of_one_process():
    (alone,), together = _deal(48, 1, fill=False), _deal(48, 3, fill=False)
    for step in range(4):
        of_all = {p for dealt in together for p in dealt[step * 4 : (step + 1) * 4]}
        assert of_all == set(alone[step * 12 : (step + 1) * 12])


@pytest.mark.parametrize("length", [1, 7, 8, 9])
def test_padding_positions_do_not_count_and_every_image_counts_once(length):
    dealt = _deal(length, 4, fill=True, shuffle=False)
    assert len({len(positions) for positions in dealt}) == 1
    assert sorted(p.index for positions in dealt for p in positions if p.counts) == list(range(length))


def test_without_padding_processes_get_equally_many():
    assert [len(positions) for positions in _deal(11, 4, fill=False)] == [2, 2, 2, 2]


def test_begin_at_skips_in_its_epoch_only():
    sampler = PositionSampler(range(20), seed=1, shuffle=True, fill=False)
    sampler.set_epoch(3)
    complete = list(sampler)
    sampler.begin_at(3, 8)
    assert list(sampler) == complete[8:]
    sampler.set_epoch(4)
    assert len(list(sampler)) == 20


def test_uniforms_are_uniform_and_close_keys_are_unrelated():
    numbers = uniforms(keys(0, 1, np.arange(4000, dtype=np.uint64)), 50).astype(np.float64)
    assert ((numbers >= 0) & (numbers < 1)).all()
    # Standard errors: of the mean 0.29 / sqrt(2e5) = 6e-4, of a correlation 1 / sqrt(2e5) = 2e-3.
    assert abs(numbers.mean() - 0.5) < 3e-3
    assert abs(numbers.var() - 1 / 12) < 3e-3
    for shifted in (np.roll(numbers, 1, 0), np.roll(numbers, 1, 1)):
        assert abs(np.corrcoef(numbers.ravel(), shifted.ravel())[0, 1]) < 1e-2


def test_numbers_of_a_key_do_not_depend_on_the_others():
    key = keys(3, np.arange(100, dtype=np.uint64))
    assert np.array_equal(uniforms(key, 7)[[41, 3]], uniforms(key[[41, 3]], 7))


def test_every_part_of_a_key_matters_and_so_does_their_order():
    found = {int(keys(*parts)[0]) for parts in ((0, 0), (0, 1), (1, 0), (1, 1), (0,), (1,), (0, 0, 0))}
    assert len(found) == 7


def test_a_seed_is_the_same_python_number_with_every_numpy():
    """Orders of training images depend on it; NumPy 1.26 and 2 mix its types and Python's in different ways."""
    seed = seed_of(5, 1)
    assert (type(seed), seed) == (int, 8123850007721853293)
    assert seed_of(2**64 - 1, 0) == 3377987053190985883
