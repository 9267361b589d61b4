"""The reference cache: what is written comes back, damage is seen, and a key covers every token."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.data.reference_cache import ReferenceCache, ReferenceLogProbs, pair_key

KEY = {"base": "abc", "dtype": "torch.float32"}


def keys(*numbers: int) -> list[bytes]:
    """32-byte keys."""
    return [hashlib.sha256(bytes([n])).digest() for n in numbers]


def values(*numbers: float) -> ReferenceLogProbs:
    """Log-probs in which every column is another number."""
    x = np.array(numbers, np.float32)
    return ReferenceLogProbs(-x, -x - 0.5, x.astype(np.int32), x.astype(np.int32) + 7)


def rows(found: ReferenceLogProbs) -> list[tuple[float, ...]]:
    """The columns of each pair."""
    columns = (found.chosen_P, found.rejected_P, found.chosen_len_P, found.rejected_len_P)
    return list(zip(*(c.tolist() for c in columns), strict=True))


def shards(folder: Path) -> list[Path]:
    """The shards of the only set below a folder."""
    return sorted(folder.rglob("*.safetensors"))


def test_round_trip_keeps_order_and_duplicates(tmp_path: Path) -> None:
    ReferenceCache(tmp_path, KEY).add(keys(1, 2, 3), values(1, 2, 3))
    cache = ReferenceCache(tmp_path, KEY)
    found = cache.get(keys(3, 1, 3))
    assert rows(found) == rows(values(3, 1, 3))
    assert found.chosen_P.dtype == np.float32
    assert found.chosen_len_P.dtype == np.int32
    assert len(cache) == 3
    assert rows(cache.get([])) == []
    with pytest.raises(KeyError):
        cache.get(keys(9))


def test_strided_values_are_saved_as_they_read(tmp_path: Path) -> None:
    table = np.array([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]], np.float32)
    lengths = np.array([[1, 2], [3, 4], [5, 6]], np.int32).T[:, ::-1]  # strides reversed
    given = ReferenceLogProbs(table[:, 0], table[::-1, 1], lengths[0], lengths[1])
    cache = ReferenceCache(tmp_path, KEY)
    cache.add(keys(1, 2, 3), given)
    truth = [(-1.0, -6.0, 5, 6), (-3.0, -4.0, 3, 4), (-5.0, -2.0, 1, 2)]
    assert rows(cache.get(keys(1, 2, 3))) == truth
    assert rows(ReferenceCache(tmp_path, KEY).get(keys(1, 2, 3))) == truth


def test_missing_names_each_unknown_key_once(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, KEY)
    cache.add(keys(1), values(1))
    assert cache.missing(keys(2, 1, 3, 2, 1)) == [0, 2]
    assert cache.missing([]) == []


def cut(content: bytes) -> bytes:
    return content[:-4]


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [cut, flip, lambda content: b""])
def test_a_damaged_shard_is_set_aside_and_computed_again(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    cache = ReferenceCache(tmp_path, KEY)
    cache.add(keys(1, 2), values(1, 2))
    (shard,) = shards(tmp_path)
    cache.add(keys(3), values(3))
    shard.write_bytes(damage(shard.read_bytes()))
    again = ReferenceCache(tmp_path, KEY)
    assert again.damaged == [shard]
    assert not shard.exists()
    assert again.missing(keys(1, 2, 3)) == [0, 1]
    again.add(keys(1, 2), values(1, 2))
    healed = ReferenceCache(tmp_path, KEY)
    assert healed.damaged == []
    assert rows(healed.get(keys(1, 2, 3))) == rows(values(1, 2, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 1])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, bad: float, column: int) -> None:
    columns = [np.array([-1.0, -2.0], np.float32), np.array([-3.0, -4.0], np.float32)]
    columns[column][1] = bad
    lengths = np.array([1, 2], np.int32)
    cache = ReferenceCache(tmp_path, KEY)
    with pytest.raises(ValueError, match="finite"):
        cache.add(keys(1, 2), ReferenceLogProbs(columns[0], columns[1], lengths, lengths))
    assert shards(tmp_path) == []
    assert len(cache) == 0


def test_columns_of_unequal_length_leave_no_shard(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, KEY)
    with pytest.raises(ValueError):
        cache.add(keys(1, 2, 3), values(1, 2))
    assert len(ReferenceCache(tmp_path, KEY)) == 0


def test_two_writers_share_one_set(tmp_path: Path) -> None:
    one, two = ReferenceCache(tmp_path, KEY), ReferenceCache(tmp_path, KEY)
    one.add(keys(1), values(1))
    two.add(keys(2), values(2))
    two.add(keys(1), values(1))  # the same work done twice is the same file
    one.add(keys(3), values(3))
    both = ReferenceCache(tmp_path, KEY)
    assert rows(both.get(keys(1, 2, 3))) == rows(values(1, 2, 3))
    assert len(shards(tmp_path)) == 3
    assert both.damaged == []


def test_a_torn_part_file_is_ignored(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, KEY)
    cache.add(keys(1), values(1))
    (shard,) = shards(tmp_path)
    shard.with_suffix(".4711.part").write_bytes(shard.read_bytes()[:50])
    again = ReferenceCache(tmp_path, KEY)
    assert (len(again), again.damaged) == (1, [])


@pytest.mark.parametrize("other", [{**KEY, "dtype": "torch.bfloat16"}, {**KEY, "gemm": "int8"}])
def test_sets_do_not_mix(tmp_path: Path, other: dict[str, Any]) -> None:
    ReferenceCache(tmp_path, KEY).add(keys(1), values(1))
    cache = ReferenceCache(tmp_path, other)
    assert cache.missing(keys(1)) == [0]
    assert ReferenceCache(tmp_path, dict(reversed(KEY.items()))).missing(keys(1)) == []


tokens = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@given(st.tuples(tokens, tokens, tokens), st.integers(0, 2), st.data())
@settings(max_examples=80, deadline=None)
def test_one_changed_id_is_another_pair(
    parts: tuple[list[int], list[int], list[int]], part: int, data: st.DataObject
) -> None:
    pair = EncodedPair(*(np.array(p, np.int32) for p in parts))
    changed = [list(p) for p in parts]
    at = data.draw(st.integers(0, len(parts[part]) - 1))
    changed[part][at] += data.draw(st.integers(1, 2**20))
    other = EncodedPair(*(np.array(p, np.int32) for p in changed))
    assert pair_key(other) != pair_key(pair)


def test_a_moved_boundary_is_another_pair() -> None:
    ids = np.arange(12, dtype=np.int32)
    cuts = [(p, c) for p in range(1, 10) for c in range(p + 1, 11)]
    pairs = [EncodedPair(ids[:p], ids[p:c], ids[c:]) for p, c in cuts]
    assert len({pair_key(pair) for pair in pairs}) == len(cuts)


def test_the_key_is_of_ids_and_order_only() -> None:
    a, b, c = (np.array(x, np.int64) for x in ([1, 2], [3, 4], [5, 6]))
    pair = EncodedPair(a, b, c)
    assert pair_key(EncodedPair(a.astype(np.int32), b, c, prompt_truncated=True)) == pair_key(pair)
    assert pair_key(EncodedPair(a, c, b)) != pair_key(pair)
    strided = np.array([[1, 9], [2, 9]], np.int32)[:, 0]
    assert pair_key(EncodedPair(strided, b, c)) == pair_key(pair)
    # A change of these bytes empties every cache there is.
    assert (
        pair_key(pair) == hashlib.sha256(struct.pack("<3I6i", 2, 2, 2, 1, 2, 3, 4, 5, 6)).digest()
    )
