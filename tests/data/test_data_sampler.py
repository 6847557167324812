import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rookery.data import is_prime, magic_prime, sample_offset
from rookery.data.sampler import CoverSampler, CubicSampler, prime_fits

GOLDEN = Path(__file__).parents[1] / "golden"
PRIMES = json.loads((GOLDEN / "magic_prime.json").read_text(encoding="utf-8"))["rows"]
OFFSETS = json.loads((GOLDEN / "sampler.json").read_text(encoding="utf-8"))["rows"]


def test_magic_primes_of_the_reference() -> None:
    assert [magic_prime(row["data_tokens"], row["ctx_len"]) for row in PRIMES] == [row["magic_prime"] for row in PRIMES]
    assert magic_prime(3 * 16, 16) == 2
    assert magic_prime(3 * 16 - 1, 16) == 0
    assert magic_prime(5, 16) == 0


def test_is_prime_agrees_with_division() -> None:
    def divides(n: int) -> bool:
        return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))

    assert [n for n in range(5000) if is_prime(n)] == [n for n in range(5000) if divides(n)]
    # Carmichael numbers, a strong pseudoprime to the first 9 prime bases, and large primes.
    assert not any(map(is_prime, (561, 41041, 3825123056546413051, (2**31 - 1) ** 2, 2**61 + 1)))
    assert all(map(is_prime, (2**31 - 1, 2**61 - 1, 2**89 - 1, 81082817)))


@pytest.mark.parametrize("row", OFFSETS)
def test_offsets_of_the_reference(row: dict) -> None:
    arguments = {"world_size": row["world_size"], "ctx_len": row["ctx"], "prime": row["magic_prime"]}
    found = [sample_offset(i, rank=row["rank"], epoch=row["epoch"], **arguments) for i in row["idx"]]
    assert found == row["token_offset"]


def test_cubic_sampler_meets_every_window_once() -> None:
    for prime in (2, 5, 11, 1949):
        sampler = CubicSampler(prime, 3)
        assert sorted(sampler.offset(i) for i in range(prime)) == [3 * i for i in range(prime)]
        assert [sampler.offset(i) for i in range(prime, 2 * prime)] == [sampler.offset(i) for i in range(prime)]


def test_ranks_share_the_samples_out() -> None:
    one = [sample_offset(i, rank=0, world_size=1, epoch=3, ctx_len=16, prime=1949) for i in range(40)]
    four = [
        sample_offset(i, rank=r, world_size=4, epoch=3, ctx_len=16, prime=1949) for i in range(10) for r in range(4)
    ]
    assert one == four


@settings(deadline=None)
@given(st.integers(2, 400), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_cover_sampler_covers_every_target_each_pass(tokens: int, ctx_len: int, seed: int) -> None:
    sampler = CoverSampler(tokens, ctx_len, seed)
    for turn in range(3):
        offsets = [sampler.offset(turn * sampler.period + i) for i in range(sampler.period)]
        targets = {t for offset in offsets for t in range(offset + 1, min(offset + ctx_len, tokens - 1) + 1)}
        assert targets == set(range(1, tokens))
        assert len(set(offsets)) == sampler.period
        assert all(0 <= offset <= max(0, tokens - ctx_len - 1) for offset in offsets)


def test_cover_sampler_is_a_function_of_the_number_and_changes_its_order() -> None:
    sampler = CoverSampler(1000, 10, 7)
    forward = [sampler.offset(i) for i in range(300)]
    assert [CoverSampler(1000, 10, 7).offset(i) for i in reversed(range(300))] == forward[::-1]
    assert forward[:100] != forward[100:200]
    assert forward[:100] != [CoverSampler(1000, 10, 8).offset(i) for i in range(100)]


def test_the_reference_rule_for_a_prime() -> None:
    assert prime_fits(1949, 1000003, 512)
    assert not prime_fits(1951, 1000003, 512)  # p % 3 == 1
    assert not prime_fits(1949, 2 * 1000003, 512)  # half of the data
    assert not prime_fits(2, 12288, 4096)
    assert not prime_fits(1953, 1000003, 512)
