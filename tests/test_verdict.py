"""The verdict against simulated nights: what it keeps that is worth nothing, what it gains, its cost."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prepare import judge, pooled_sigma

NIGHTS = 400
RUNS = 100
MIXES = {  # effect of one idea in sigma, positive is better; only the null night has nothing to find
    "null night": lambda rng: 0.0,
    "small gains": lambda rng: rng.choice((1, -2, -1, -1, -0.5, -0.3, 0, 0, 0, 0)),
    "one large gain": lambda rng: rng.choice((2, -6, -4, -3, -2, -1, -1, 0, 0, 0)),
    "two gains": lambda rng: rng.choice((1.5, 0.5, -6, -4, -3, -2, -1, -1, 0, 0)),
    "wide": lambda rng: min(max(rng.gauss(-2, 2), -8), 6),
    "fine tuning": lambda rng: rng.gauss(-0.3, 0.5),
}


def whatever_improved(
    candidate: list[float], incumbent: list[float], sigma: float
) -> tuple[str, float, float]:
    """The reference rule: one run each, the lower one stays."""
    gain = incumbent[0] - candidate[0]
    return ("keep" if gain > 0 else "discard"), gain, sigma


def night(rule, baselines: int, draw, seed: int) -> tuple[int, float, int]:
    """Useless or harmful keeps, true gain in sigma, and repeated runs; val_bpb is `level` plus N(0, 1).

    Ideas and noise have generators of their own, so that both rules meet the same ideas in the same order.
    """
    ideas = random.Random(2 * seed)
    noise = random.Random(2 * seed + 1)
    level = 0.0
    bad_keeps = 0
    repeats = baselines - 1
    incumbent = [noise.gauss(0, 1) for _ in range(baselines)]
    groups = [incumbent]
    candidate = []
    effect = draw(ideas)
    for _ in range(RUNS - baselines):
        candidate.append(level - effect + noise.gauss(0, 1))
        if len(candidate) == 2:
            repeats += 1
            groups.append(candidate)
        sigma = pooled_sigma(groups, default=1.0) if len(candidate) > 1 else 1.0
        status = rule(candidate, incumbent, sigma)[0]
        if status == "maybe":
            continue
        if status == "keep":
            incumbent = candidate
            level -= effect
            bad_keeps += effect <= 0
        candidate = []
        effect = draw(ideas)
    return bad_keeps, -level, repeats


@pytest.mark.parametrize("mix", MIXES)
def test_a_night_keeps_less_that_is_worthless(mix):
    def mean_night(rule, baselines):
        nights = [night(rule, baselines, MIXES[mix], seed) for seed in range(NIGHTS)]
        return [sum(column) / NIGHTS for column in zip(*nights, strict=True)]

    keeps, gain, repeats = mean_night(judge, 2)
    other_keeps, other_gain, _ = mean_night(whatever_improved, 1)
    print(
        f"\n{mix:14}  worthless keeps {keeps:.2f} for {other_keeps:.2f} ({keeps / other_keeps:.2f})", end=""
    )
    print(f"  true gain {gain:5.2f} for {other_gain:5.2f} ({gain / (other_gain or 1):.2f})", end="")
    print(f"  repeats {repeats:.1f}")
    assert other_keeps > 1, "nothing to improve on: the simulation is broken"
    assert keeps <= 0.65 * other_keeps
    assert gain >= 0.95 * other_gain
    assert other_gain > 0.2 or mix == "null night"


exact = st.integers(-4096, 4096).map(lambda n: n / 1024)  # sums and halves of these have no rounding error
runs = st.lists(exact, min_size=1, max_size=2) | st.lists(exact, min_size=4, max_size=4)
sigmas = st.integers(1, 1024).map(lambda n: n / 1024)


@settings(deadline=None)
@given(runs, runs, sigmas, exact)
def test_a_verdict_is_the_stated_rule_at_any_level(candidate, incumbent, sigma, shift):
    first = candidate[:2]
    gain = sum(incumbent) / len(incumbent) - sum(first) / len(first)
    se = (sigma**2 / len(incumbent) + sigma**2 / len(first)) ** 0.5
    verdict = judge(candidate, incumbent, sigma)
    status, got_gain, got_se = verdict
    assert (got_gain, got_se) == (gain, pytest.approx(se))
    repeated = "keep" if gain >= 0.25 * got_se else "discard"
    assert status == ("discard" if gain <= 0 else "maybe" if len(candidate) == 1 else repeated)
    assert judge([v + shift for v in candidate], [v + shift for v in incumbent], sigma) == verdict


@settings(deadline=None)
@given(runs, runs, sigmas)
def test_of_two_codes_at_most_one_beats_the_other(one, other, sigma):
    one, other = one[:2], other[:2]
    there, gain, se = judge(one, other, sigma)
    back, loss, same_se = judge(other, one, sigma)
    assert gain == -loss and se == pytest.approx(same_se)
    assert "discard" in (there, back)


@settings(deadline=None)
@given(st.lists(exact, min_size=2, max_size=9), runs, sigmas)
def test_reruns_beyond_two_change_nothing(candidate, incumbent, sigma):
    assert judge(candidate, incumbent, sigma) == judge(candidate[:2], incumbent, sigma)


@settings(deadline=None)
@given(runs, runs, sigmas, sigmas)
def test_a_worse_run_never_helps(candidate, incumbent, sigma, worse):
    order = ("discard", "maybe", "keep")
    status = judge(candidate, incumbent, sigma)[0]
    assert order.index(judge([candidate[0] + worse, *candidate[1:]], incumbent, sigma)[0]) <= order.index(
        status
    )


def test_a_gain_is_kept_from_a_quarter_of_its_error():
    assert judge([0.75, 0.75], [1.0, 1.0], 1.0) == ("keep", 0.25, pytest.approx(1.0))
    assert judge([0.76, 0.76], [1.0, 1.0], 1.0)[0] == "discard"
    assert judge([0.0], [1.0, 1.0], 0.001)[0] == "maybe"  # however large: seen once


def test_a_draw_is_discarded_even_without_noise():
    assert judge([1.0, 1.0], [1.0, 1.0], 0.0) == ("discard", 0.0, 0.0)
    assert judge([0.5, 0.5], [1.0, 1.0], 0.0) == ("keep", 0.5, 0.0)


def test_sigma_is_pooled_about_each_groups_own_mean():
    assert pooled_sigma([], 7.0) == 7.0
    assert pooled_sigma([[1.0], [2.0], []], 7.0) == 7.0  # single runs say nothing about seeds
    assert pooled_sigma([[1.0, 3.0], [50.0], [10.0, 10.0, 10.0]], 7.0) == pytest.approx((2 / 3) ** 0.5)
    assert pooled_sigma([[1.0, 1.0]], 7.0) == 0.0  # measured, so not the default
    rng = random.Random(0)
    groups = [[level + rng.gauss(0, 2) for _ in range(2 + level % 3)] for level in range(3000)]
    assert pooled_sigma(groups, 7.0) == pytest.approx(2, rel=0.03)
