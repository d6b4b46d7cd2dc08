"""How loss falls with size and tokens, and what follows for compute, with intervals."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

NUM_DRAWS = 400
FEWEST = 3  # sizes, and numbers of tokens
FEWEST_RUNS = 7  # two more than the law has parameters
_EXPONENTS = (0.01, 3.0)


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval; None where it means nothing.

    Args:
        value: the number.
        low: lower end.
        high: upper end, infinite where there is none.
    """

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Law:
    """Loss = floor + a · (N / size)^−alpha + b · (D / tokens)^−beta, for N parameters and D tokens.

    The form is that of Hoffmann et al. 2022 (arXiv 2203.15556, equation 2). A run of N parameters takes
    flops · (N / size)^gamma FLOPs for each token.

    Args:
        floor: what no size and no number of tokens gets below.
        a: what the size costs at `size`.
        alpha: how fast that falls.
        b: what the number of tokens costs at `tokens`.
        beta: how fast that falls.
        size: unit of N.
        tokens: unit of D.
        flops: FLOPs for a token at `size`.
        gamma: how they grow with the size.
        sizes: smallest and largest size it was fitted on.
    """

    floor: float
    a: float
    alpha: float
    b: float
    beta: float
    size: float
    tokens: float
    flops: float
    gamma: float
    sizes: tuple[float, float]

    def __call__(self, sizes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Loss at these sizes and tokens, of any one shape."""
        by_size = self.a * (np.asarray(sizes) / self.size) ** -self.alpha
        return self.floor + by_size + self.b * (np.asarray(tokens) / self.tokens) ** -self.beta

    @property
    def loss_exponent(self) -> float | None:
        """Exponent of compute in what the least loss is above the floor; None where size or tokens cost nothing."""
        return self._of_compute(self.alpha * self.beta)

    @property
    def size_exponent(self) -> float | None:
        """Exponent of compute in the best size."""
        return self._of_compute(self.beta)

    @property
    def tokens_exponent(self) -> float | None:
        """Exponent of compute in the best number of tokens."""
        return self._of_compute(self.alpha)

    def _of_compute(self, numerator: float) -> float | None:
        return numerator / (self.alpha + self.gamma * self.beta) if self.a > 0 and self.b > 0 else None

    def best_size(self, compute: np.ndarray) -> np.ndarray:
        """The size with the least loss at so many FLOPs, among those it was fitted on; of any shape."""
        lowest, highest = self.sizes
        compute = np.asarray(compute, dtype=float)
        if not self.a > 0 or not self.b > 0:
            return np.full(compute.shape, lowest if self.b > 0 else highest)
        tokens = compute / (self.flops * self.tokens)  # at the unit of size, in units of tokens
        ratio = self.alpha * self.a / (self.gamma * self.beta * self.b)
        best = self.size * (ratio * tokens**self.beta) ** (1 / (self.alpha + self.gamma * self.beta))
        return np.clip(best, lowest, highest)

    def best_tokens(self, compute: np.ndarray) -> np.ndarray:
        """The tokens that so many FLOPs give the best size, which may be more than any run had; of any shape."""
        return np.asarray(compute) / (self.flops * (self.best_size(compute) / self.size) ** self.gamma)

    def at(self, compute: np.ndarray) -> np.ndarray:
        """The least loss at so many FLOPs, with the best of the sizes it was fitted on; of any shape."""
        return self(self.best_size(compute), self.best_tokens(compute))

    def compute_for(self, loss: float) -> float:
        """The FLOPs that the least loss takes, infinite where it is never reached."""
        low, high = -30.0, 60.0  # powers of ten
        if self.at(np.array(10.0**high)) > loss:
            return math.inf
        if self.at(np.array(10.0**low)) <= loss:
            return 0.0
        found = optimize.brentq(lambda power: float(self.at(np.array(10.0**power))) - loss, low, high)
        return float(10.0**found)


@dataclass(frozen=True, eq=False)
class Fit:
    """A law, and laws of resampled runs that say how sure it is.

    Args:
        law: the law.
        draws: laws of the resampled runs.
        errors: loss over the law's, minus 1, of each run.
    """

    law: Law
    draws: list[Law]
    errors: np.ndarray

    def interval(self, quantity: Callable[[Law], float | None]) -> Interval:
        """A quantity of the law; without an interval where it means nothing in some draws."""
        value, drawn = quantity(self.law), [quantity(law) for law in self.draws]
        known = [one for one in drawn if one is not None]
        if len(known) < len(drawn):
            return Interval(value, None, None)
        return Interval(value, *quantiles(known))


def quantiles(values: list[float]) -> tuple[float, float]:
    """The 95 % interval of values, some of which may be infinite."""
    low, high = np.quantile(values, [0.025, 0.975], method="nearest")
    return float(low), float(high)


def fit_law(sizes: np.ndarray, tokens: np.ndarray, flops: np.ndarray, losses: np.ndarray, *, seed: int = 0) -> Fit:
    """Fits the law to runs by least squares of relative errors.

    Intervals come from `NUM_DRAWS` fits to the law's own losses with its relative errors drawn anew, widened for the
    five parameters that were fitted and, as Student's, for the few runs that are left to tell the errors' size.

    Args:
        sizes: number of parameters of each run, (num_runs,).
        tokens: tokens it was trained on, (num_runs,).
        flops: FLOPs of its training, (num_runs,).
        losses: its loss, (num_runs,).
        seed: seed of the draws.

    Raises:
        ValueError: too few runs, sizes or numbers of tokens; a number that is not finite and above 0; or larger models
            that do not take more FLOPs for a token.
    """
    sizes, tokens, flops, losses = (np.asarray(values, dtype=float) for values in (sizes, tokens, flops, losses))
    for name, values in (("size", sizes), ("tokens", tokens), ("FLOPs", flops), ("loss", losses)):
        wrong = values[~(np.isfinite(values) & (values > 0))]
        if len(wrong):
            raise ValueError(f"a run has {name} {wrong[0]}: it has to be finite and above 0; leave the run out")
    check_enough(sizes, tokens)
    fitter = _Fitter(sizes, tokens, flops)
    if not fitter.rest["gamma"] > 0:
        raise ValueError(
            f"FLOPs for a token grow as size ** {fitter.rest['gamma']:.2g}: a law of compute needs runs whose larger "
            "models take more; leave out what differs otherwise"
        )
    law = fitter.fit(losses)
    expected = law(sizes, tokens)
    errors = losses / expected - 1
    freedom = len(errors) - 5  # without the tails some 86 % of intervals of 9 runs with normal errors held the truth
    tails = stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975)
    wide = (errors - errors.mean()) * math.sqrt(len(errors) / freedom) * tails
    generator = np.random.default_rng(seed)
    draws = [
        fitter.fit(expected * (1 + generator.choice(wide, len(wide))), (law.alpha, law.beta)) for _ in range(NUM_DRAWS)
    ]
    return Fit(law, draws, errors)


def check_enough(sizes: np.ndarray, tokens: np.ndarray) -> None:
    """Refuses runs that are too few for a law.

    Args:
        sizes: number of parameters of each run, (num_runs,).
        tokens: tokens it was trained on, (num_runs,).

    Raises:
        ValueError: too few runs, sizes or numbers of tokens.
    """
    for name, count, fewest in (
        ("runs", len(sizes), FEWEST_RUNS),
        ("sizes", len(np.unique(sizes)), FEWEST),
        ("numbers of tokens", len(np.unique(tokens)), FEWEST),
    ):
        if count < fewest:
            raise ValueError(f"{count} {name}: a law of size and tokens needs {fewest} or more; add runs")


class _Fitter:
    """Given both exponents the rest is linear: only they are searched for."""

    def __init__(self, sizes: np.ndarray, tokens: np.ndarray, flops: np.ndarray) -> None:
        self.log_sizes, self.log_tokens = (np.log(x) - np.log(x).mean() for x in (sizes, tokens))
        gamma, at_unit = np.polyfit(self.log_sizes, np.log(flops / tokens), 1)
        self.rest: dict[str, Any] = {
            "size": float(np.exp(np.log(sizes).mean())),
            "tokens": float(np.exp(np.log(tokens).mean())),
            "flops": float(np.exp(at_unit)),
            "gamma": float(gamma),
            "sizes": (float(sizes.min()), float(sizes.max())),
        }

    def fit(self, losses: np.ndarray, start: tuple[float, float] | None = None) -> Law:
        def solved(log_exponents: np.ndarray) -> tuple[np.ndarray, float]:
            alpha, beta = np.exp(log_exponents)
            terms = [np.ones_like(losses), np.exp(-alpha * self.log_sizes), np.exp(-beta * self.log_tokens)]
            return optimize.nnls(np.stack(terms, axis=1) / losses[:, None], np.ones_like(losses))

        def error(log_exponents: np.ndarray) -> float:
            return solved(log_exponents)[1]

        starts: Iterator[tuple[float, ...]] = iter([start]) if start else _grid(np.geomspace(0.05, 2, 8))
        begin = min((np.log(point) for point in starts), key=error)
        found = optimize.minimize(
            error, begin, method="Nelder-Mead", bounds=[np.log(_EXPONENTS)] * 2, options={"fatol": 1e-12, "xatol": 1e-5}
        )
        (floor, a, b), _ = solved(found.x)
        alpha, beta = np.exp(found.x)
        return Law(float(floor), float(a), float(alpha), float(b), float(beta), **self.rest)


def _grid(values: np.ndarray) -> Iterator[tuple[float, ...]]:
    return ((float(a), float(b)) for a in values for b in values)


@dataclass(frozen=True)
class Line:
    """Accuracy = middle + slope · log10(compute / unit), by least squares, with Student's intervals.

    Args:
        unit: geometric mean of the runs' FLOPs.
        middle: accuracy there.
        slope: what a tenfold of compute adds.
        spread: standard deviation of runs about the line.
        n: number of runs.
        scatter: sum of squares of log10(compute / unit).
    """

    unit: float
    middle: float
    slope: float
    spread: float
    n: int
    scatter: float

    def at(self, compute: np.ndarray) -> np.ndarray:
        """Accuracy at so many FLOPs, of any shape."""
        return self.middle + self.slope * np.log10(np.asarray(compute) / self.unit)

    def reach(self, compute: np.ndarray) -> np.ndarray:
        """Half the width of the 95 % interval of that."""
        away = np.log10(np.asarray(compute) / self.unit)
        return self._student * self.spread * np.sqrt(1 / self.n + away**2 / self.scatter)

    @property
    def slope_interval(self) -> Interval:
        """The slope and its interval."""
        half = float(self._student * self.spread / math.sqrt(self.scatter))
        return Interval(self.slope, self.slope - half, self.slope + half)

    def interval(self, compute: float) -> Interval:
        """Accuracy at so many FLOPs and its interval."""
        value, half = float(self.at(np.array(compute))), float(self.reach(np.array(compute)))
        return Interval(value, value - half, value + half)

    @property
    def _student(self) -> float:
        return float(stats.t.ppf(0.975, self.n - 2))


def fit_line(flops: np.ndarray, accuracies: np.ndarray) -> Line:
    """Fits accuracy to the logarithm of compute.

    Args:
        flops: FLOPs of each run, (num_runs,).
        accuracies: share of right answers of each, (num_runs,).

    Raises:
        ValueError: fewer than three runs, or all took the same FLOPs.
    """
    powers = np.log10(np.asarray(flops, dtype=float))
    if len(powers) < FEWEST or np.ptp(powers) == 0:
        raise ValueError(
            f"{len(powers)} runs of {len(np.unique(powers))} different FLOPs: a line needs {FEWEST} runs and 2 FLOPs; "
            "add runs"
        )
    away = powers - powers.mean()
    scatter = float(away @ away)
    middle = float(np.mean(accuracies))
    slope = float(away @ np.asarray(accuracies)) / scatter
    errors = np.asarray(accuracies) - middle - slope * away
    spread = math.sqrt(float(errors @ errors) / (len(powers) - 2))
    return Line(float(10 ** powers.mean()), middle, slope, spread, len(powers), scatter)
