"""The hash against the reference generator written out in plain integers, and against literals."""

import warnings

import numpy as np

from igpt_ds.hashing import random_keys, splitmix64, stable_hash

MASK = (1 << 64) - 1


def reference_outputs(state: int, count: int) -> list[int]:
    """Vigna's splitmix64.c, statement by statement."""
    outputs = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        outputs.append(z ^ (z >> 31))
    return outputs


def test_published_outputs_of_seed_zero() -> None:
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert random_keys(0, 3).tolist() == expected


def test_hash_and_keys_equal_the_reference() -> None:
    states = [0, 1, 2, 12345, 1 << 32, 1 << 63, MASK - 1, MASK]
    hashed = splitmix64(np.array(states, dtype=np.uint64).reshape(2, 4))
    assert hashed.dtype == np.uint64
    assert hashed.shape == (2, 4)
    assert hashed.ravel().tolist() == [reference_outputs(state, 1)[0] for state in states]
    for state in states:
        assert random_keys(state, 50).tolist() == reference_outputs(state, 50)
    assert random_keys(-1, 5).tolist() == reference_outputs(MASK, 5)
    assert random_keys(3, 0).shape == (0,)


def test_the_argument_is_left_alone_and_nothing_warns() -> None:
    x = np.full(4, MASK, dtype=np.uint64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splitmix64(x)
        splitmix64(x[0])
        random_keys(MASK, 10)
        stable_hash(MASK, -1)
    assert x.tolist() == [MASK] * 4


def test_stable_hash_never_changes() -> None:
    # One value is one step of the generator, from the value mixed with the number of values.
    assert stable_hash(5) == reference_outputs(5 ^ 1, 1)[0]
    assert stable_hash(1, 2) == 0x2371C8A9B8068EBA
    assert stable_hash(2, 1) == 0x08B4FDA8C892B50E
    assert stable_hash(1, 2, 3) == 0x1072DECA7455826
    assert stable_hash(-1) == stable_hash(MASK)
    assert len({stable_hash(*values) for values in [(), (0,), (0, 0), (0, 0, 0), (1, 0), (0, 1)]}) == 6


def test_bits_are_balanced() -> None:
    keys = random_keys(stable_hash(1, 2), 20_000)
    ones = [int(((keys >> np.uint64(bit)) & np.uint64(1)).sum()) for bit in range(64)]
    # Five standard deviations of a fair coin, sqrt(20000) / 2 = 71 each.
    assert max(abs(count - 10_000) for count in ones) < 354
