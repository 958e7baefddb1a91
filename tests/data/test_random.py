import numpy as np

from narrows.data.random import keys, uniforms


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
