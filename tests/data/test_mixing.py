"""Weights of sources: the shares hold, rows are never repeated, and the choice is stable."""

import numpy as np
import pytest

from medjob.data.mixing import mixed, shares_of
from medjob.errors import DataError


@pytest.mark.parametrize(
    ("rows", "weights", "used"),
    [
        ([100, 100], [1, 1], [100, 100]),
        ([100, 100], [3, 1], [100, 33]),
        ([100, 1000], [0.5, 0.5], [100, 100]),
        ([100, 1000], [2, 20], [100, 1000]),
        ([1000, 10, 500], [70, 10, 20], [70, 10, 20]),
        ([7], [4], [7]),
        ([10**7, 3], [1e6, 1e-6], [10**7, 0]),
    ],
)
def test_one_source_is_used_whole_and_the_others_by_their_weight(
    rows: list[int], weights: list[float], used: list[int]
) -> None:
    assert [share.used for share in shares_of(rows, weights)] == used


def test_source_without_rows_is_refused_by_its_key() -> None:
    with pytest.raises(DataError, match=r"run\.prepare\.sources\.1: no row is left for training"):
        shares_of([5, 0], [1, 1])


def choose(weights: list[float]) -> set[int]:
    generator = np.random.default_rng(0)
    sources = np.repeat(np.arange(2, dtype=np.int32), 500)
    hashes = generator.integers(0, 2**63, 1000).astype(np.uint64)
    training = generator.random(1000) < 0.8
    chosen, shares = mixed(sources, hashes, training, weights)
    assert not (chosen & ~training).any()
    assert [int(chosen[sources == number].sum()) for number in range(2)] == [
        share.used for share in shares
    ]
    return set(np.flatnonzero(chosen).tolist())


def test_lower_weight_keeps_some_of_the_same_rows() -> None:
    many, few = choose([1, 0.5]), choose([1, 0.25])
    assert few < many
    assert few == choose([4, 1])


def test_rows_with_equal_hashes_are_counted_once() -> None:
    chosen, _ = mixed(
        np.array([0, 0, 0, 0, 1], np.int32),
        np.zeros(5, np.uint64),
        np.ones(5, dtype=bool),
        [2, 1],
    )
    assert chosen.tolist() == [True, True, False, False, True]
