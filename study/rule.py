"""How a claim is judged: the rule, written before the runs.

A number with a claim in brackets has a side of a bound, and the others are only reported. Its p is that of a one-sided t test
over the seeds. A claim holds where all its numbers do, so its p is the largest of theirs. The opposite is tested alike. One
number on the wrong side is enough, so the p against the claim is the smallest of theirs, times their count. The smaller of the
two, doubled, is the claim's p. Holm's method adjusts the p of all claims for their count, which includes those that are not
run. At 0.05 a claim is *supported* or *contradicted*. Otherwise it is *level* if the 90 % interval of each of its numbers is
within 0.03 of the bound. If not, it is *undecided*. A number with ≈ claims that its mean is within 0.03 of the bound, and one
with ≉ that it is not. Of a ratio the logarithm is tested.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from study.results import mean_and_interval

ALPHA, LEVEL, COUNT = 0.05, 0.03, 17  # COUNT: of the claims


def digits(x):
    """A number with three digits, or all of those before the point."""
    return f"{x:#.3g}".rstrip(".") if abs(x) < 100 else f"{x:.0f}"


class Measured(NamedTuple):
    """A number, one value a seed, and what is claimed of its mean: a side of a bound, or nothing, where it is only reported."""

    text: str
    values: np.ndarray
    side: str = ""  # >, <, ≈ or ≉
    bound: float = 0.0
    ratio: bool = False  # means and tests are of its logarithm

    @property
    def tested(self):
        """The values and the bound that the tests take."""
        return (np.log(self.values), math.log(self.bound)) if self.ratio else (self.values, self.bound)

    def beyond(self, side, shift=0.0):
        """p of the one-sided t test that the mean is on a side of the bound, shifted."""
        values, bound = self.tested
        distance = (values - bound - shift) * (1 if side == ">" else -1)
        if np.ptp(values) == 0:
            return float(distance[0] <= 0)
        return float(stats.ttest_1samp(distance, 0, alternative="greater").pvalue)

    @property
    def inside_or_outside(self):
        """p that the mean is within LEVEL of the bound, and p that it is not."""
        within = max(self.beyond(">", -LEVEL), self.beyond("<", LEVEL))
        return within, min(1.0, 2 * min(self.beyond("<", -LEVEL), self.beyond(">", LEVEL)))

    @property
    def p_for(self):
        if self.side in "<>":
            return self.beyond(self.side)
        return self.inside_or_outside[self.side == "≉"]

    @property
    def p_against(self):
        if self.side in "<>":
            return self.beyond("<" if self.side == ">" else ">")
        return self.inside_or_outside[self.side == "≈"]

    @property
    def p_flip(self):
        """The exact test beside it, of > and < alone: over all signs of the values' distances from the bound."""
        values, bound = self.tested
        distance = (values - bound) * (1 if self.side == ">" else -1)
        signs = np.array(np.meshgrid(*[[1, -1]] * len(distance))).reshape(len(distance), -1)
        return np.mean((signs * np.abs(distance)[:, None]).sum(0) >= distance.sum() - 1e-12)

    @property
    def is_level(self):
        """Whether its 90 % interval is within LEVEL of the bound."""
        return self.inside_or_outside[0] <= ALPHA

    def __str__(self):
        claimed = f" (claim: {self.side} {self.bound:g})" if self.side else ""
        if not len(self.values):
            return f"{self.text}{claimed}"
        if lost := np.count_nonzero(~np.isfinite(np.log(self.values) if self.ratio else self.values)):
            return f"{self.text}: not finite on {lost} of {len(self.values)} seeds{claimed}"
        if self.ratio:
            mean, half = mean_and_interval(np.log(self.values))
            mean, low, high = (digits(math.exp(x)) for x in (mean, mean - half, mean + half))
            numbers = mean if math.isnan(half) else f"{mean}, {low} to {high}"
        else:
            numbers = " ± ".join(digits(x) for x in mean_and_interval(self.values) if not math.isnan(x))
        p = f", p {self.p_for:.2g}" if self.side and len(self.values) > 1 else ""
        return f"{self.text}: {numbers}{claimed}{p}" + (f", exact {self.p_flip:.2g}" if p and self.side in "<>" else "")


class Claim(NamedTuple):
    text: str
    measured: list
    experiments: str  # that its runs are of

    @property
    def seeds(self):
        return sorted({len(m.values) for m in self.measured})

    @property
    def p(self):
        """(p for it, p against it); None where a number has fewer than two seeds."""
        tested = [m for m in self.measured if m.side]
        if any(len(m.values) < 2 for m in tested):
            return None
        # a number of a run that diverged is NaN, and speaks neither for the claim nor against it
        for_it, against = (np.nan_to_num([getattr(m, name) for m in tested], nan=1.0) for name in ("p_for", "p_against"))
        return float(for_it.max()), min(1.0, len(tested) * float(against.min()))


def holm(claims, count=COUNT):
    """{id: the adjusted p}, of the claims that are run, among `count`."""
    raw = {name: min(1.0, 2 * min(claim.p)) for name, claim in claims.items() if claim.p}
    adjusted, largest = {}, 0.0
    for i, name in enumerate(sorted(raw, key=raw.get)):
        adjusted[name] = largest = max(largest, min(1.0, (count - i) * raw[name]))
    return adjusted


def verdicts(claims, count=COUNT):
    """{id: supported, contradicted, level, undecided or not run}."""
    adjusted, words = holm(claims, count), {}
    for name, claim in claims.items():
        if name not in adjusted:
            words[name] = "not run"
        elif adjusted[name] <= ALPHA:
            words[name] = "supported" if claim.p[0] < claim.p[1] else "contradicted"
        else:
            words[name] = "level" if all(m.is_level for m in claim.measured if m.side) else "undecided"
    return words
