"""Two results on the same items: how much one model is better than another, and whether that could be chance."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from scipy import stats

from smoltolk.evaluation.results import Average, StoredResult, bootstrap, first_difference, load_result

NUM_PERMUTATIONS = 9999


@dataclass(frozen=True)
class Difference:
    """One accuracy minus another on the same items.

    Args:
        group: what the number belongs to, such as a modality pair.
        name: what it is called in there.
        num_items: number of items.
        num_couples: number of couples, which are independent of each other.
        ours: accuracy of the first result.
        theirs: accuracy of the second.
        mean: the difference.
        low: lower end of its 95 % bootstrap interval over couples.
        high: upper end of it.
        p_value: two-sided, of no difference.
        test: "sign" for the exact sign test (McNemar's), "permutation" where couples differ by unlike amounts.
    """

    group: str
    name: str
    num_items: int
    num_couples: int
    ours: float
    theirs: float
    mean: float
    low: float
    high: float
    p_value: float
    test: str


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Args:
        differences: one for every number that was reported.
        notes: what differs between the results and may matter, in words.
    """

    differences: list[Difference]
    notes: list[str]


def compare(ours: Path, theirs: Path) -> Comparison:
    """Compares two folders of results item by item.

    Raises:
        ValueError: a folder cannot be read, or the results are of different tasks, items or protocols.
    """
    a, b = load_result(ours), load_result(theirs)
    _check_alike(a, b)
    keys = [column for column in a.table.column_names if not column.endswith(("score", "credit"))]
    if not a.table.select(keys).equals(b.table.select(keys)):
        raise ValueError(f"{ours} and {theirs} hold different items: evaluate both on the same file")
    notes = []
    for key in ("precision", "smoltolk_version"):
        if a.record.get(key) != b.record.get(key):
            notes.append(f"{key} differs: {a.record.get(key)} and {b.record.get(key)}")
    if a.record.get("tokens_fingerprint") != b.record.get("tokens_fingerprint"):
        notes.append("the models read the items as different tokens")
    for result in (a, b):
        if cut := result.record.get("num_truncated"):
            notes.append(f"{result.folder}: {cut} prompts were cut")
    return Comparison([_difference(average, a.table, b.table) for average in a.averages], notes)


def _check_alike(a: StoredResult, b: StoredResult) -> None:
    for what, keys in (("tasks", ("task", "split")), ("protocols", ("knobs", "truncates_prompts"))):
        found = first_difference(*({key: result.record.get(key) for key in keys} for result in (a, b)))
        if found:
            raise ValueError(
                f"{a.folder} and {b.folder} are of different {what}: {found[0]} is {found[1]!r} in one and "
                f"{found[2]!r} in the other; their numbers cannot be compared, evaluate both alike"
            )
    if a.record["items_fingerprint"] != b.record["items_fingerprint"] or a.averages != b.averages:
        raise ValueError(f"{a.folder} and {b.folder} hold different items: evaluate both on the same file")


def _difference(average: Average, ours: pa.Table, theirs: pa.Table) -> Difference:
    chosen = average.chosen(ours)
    table = ours.filter(pa.array(chosen))
    weights, _ = average.weights(table)
    credits = [found["credit"].to_numpy()[chosen] for found in (ours, theirs)]
    difference = credits[0] - credits[1]
    couples = table["couple"].to_pylist()
    low, high = bootstrap(difference, couples, weights=weights)
    _, index = np.unique(couples, return_inverse=True)
    of_couples = np.bincount(index, weights * difference)
    p_value, test = paired_test(of_couples)
    first, second = (float(weights @ credit / weights.sum()) for credit in credits)
    return Difference(
        group=average.group,
        name=average.name,
        num_items=len(table),
        num_couples=len(of_couples),
        ours=first,
        theirs=second,
        mean=first - second,
        low=low,
        high=high,
        p_value=p_value,
        test=test,
    )


def paired_test(differences: np.ndarray) -> tuple[float, str]:
    """Two-sided p-value of no difference, and the name of the test.

    Without a difference the signs of the couples' differences are arbitrary. Where all have the same size this is
    the exact sign test, else a permutation test, exact for few couples.

    Args:
        differences: summed over each couple, (num_couples,).
    """
    found = differences[~np.isclose(differences, 0, atol=1e-12)]
    if not len(found):
        return 1.0, "sign"
    sizes = np.abs(found)
    if np.allclose(sizes, sizes[0]):
        return float(stats.binomtest(int((found > 0).sum()), len(found)).pvalue), "sign"
    result = stats.permutation_test(
        (found / sizes.max(),),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=NUM_PERMUTATIONS,
        batch=max(1, 2**20 // len(found)),
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue), "permutation"
