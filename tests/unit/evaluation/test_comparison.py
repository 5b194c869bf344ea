"""McNemar, Newcombe and Wilson against published values and enumeration; two reports."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lib.base.hashes import content_hash
from qlora_lib.base.statistics import mcnemar, newcombe, wilson
from qlora_lib.evaluation.comparison import compare, drop
from qlora_lib.evaluation.evaluate import EvalReport, Prediction
from tests.support.tensors import PROPERTY


def report(strict: str, questions=None, flexible: str | None = None) -> EvalReport:
    """A report of one verdict a question."""
    predictions = [
        Prediction(q, "", "", "1", None, None, s == "1", f == "1", 0, True)
        for q, s, f in zip(questions or map(str, range(len(strict))), strict, flexible or strict)
    ]  # fmt: skip
    return EvalReport.count(predictions, {})


# --- The statistics -----------------------------------------------------------------------


@pytest.mark.parametrize("b, c", [(0, 0), (1, 0), (3, 3), (2, 7), (0, 9), (10, 4)])
def test_mcnemar_equals_enumeration(b, c):
    """The share of all equally likely ways for b + c coins to fall at least as unevenly."""
    falls = [sum(coins) for coins in itertools.product((0, 1), repeat=b + c)]
    extreme = sum(abs(2 * heads - (b + c)) >= abs(b - c) for heads in falls)
    assert mcnemar(b, c) == pytest.approx(extreme / len(falls), rel=1e-15)


def test_mcnemar_on_known_and_large_counts():
    # OpenAI's released GSM8K samples, 6B with verifier against 175B without
    assert mcnemar(209, 152) == pytest.approx(0.0031507, abs=1e-7)
    assert mcnemar(20, 0) == 2 / 2**20 and mcnemar(2000, 0) == 0.0  # below the smallest float
    assert 0 < mcnemar(1000, 40) < 1e-200
    with pytest.raises(ValueError, match="-1"):
        mcnemar(-1, 2)


def test_mcnemar_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    for b, c in ((0, 1), (5, 9), (209, 152), (40, 41)):
        assert mcnemar(b, c) == pytest.approx(stats.binomtest(b, b + c).pvalue, rel=1e-9)


# Newcombe 1998, Statistics in Medicine 17: 873-890, table II, method 10
TABLE_II = [
    ((56, 70, 48, 80), (0.0524, 0.3339)),
    ((9, 10, 3, 10), (0.1705, 0.8090)),
    ((6, 7, 2, 7), (0.0582, 0.8062)),
    ((5, 56, 0, 29), (-0.0381, 0.1926)),
    ((0, 10, 0, 20), (-0.1611, 0.2775)),
    ((0, 10, 0, 10), (-0.2775, 0.2775)),
    ((10, 10, 0, 20), (0.6791, 1.0)),
    ((10, 10, 0, 10), (0.6075, 1.0)),
]


@pytest.mark.parametrize("counts, interval", TABLE_II)
def test_newcombe_unpaired_gives_the_published_intervals(counts, interval):
    assert newcombe(*counts) == pytest.approx(interval, abs=5.1e-5)  # printed to 4 digits


def test_newcombe_paired_gives_the_published_interval():
    # Cavo et al. 2012, 59 / 6 / 16 / 80 of 161, in Fagerland, Lydersen and Laake, "Statistical
    # Analysis of Contingency Tables" (2017), chapter 8: -0.0621 (-0.1186 to -0.0046)
    assert newcombe(65, 161, 75, 161, both=59) == pytest.approx((-0.1186, -0.0046), abs=5.1e-5)


def test_pairing_narrows_the_interval_of_models_that_agree():
    low, high = newcombe(50, 100, 40, 100, both=38)
    wide_low, wide_high = newcombe(50, 100, 40, 100)
    assert wide_low < low < 0.1 < high < wide_high


@PROPERTY
@given(st.tuples(*[st.integers(0, 40)] * 4).filter(sum))
def test_newcombe_paired_contains_the_difference_and_turns_with_it(cells):
    both, only_a, only_b, neither = cells
    a, b, n = both + only_a, both + only_b, sum(cells)
    low, high = newcombe(a, n, b, n, both)
    assert -1 <= low <= (a - b) / n + 1e-12 and (a - b) / n - 1e-12 <= high <= 1
    assert newcombe(b, n, a, n, both) == pytest.approx((-high, -low), abs=1e-12)


def test_counts_that_do_not_fit_are_errors():
    for counts in ((5, 10, 5, 10, 6), (9, 10, 9, 10, 1), (5, 10, 5, 11, 3)):
        with pytest.raises(ValueError, match="cannot have"):
            newcombe(*counts)
    with pytest.raises(ValueError, match="n > 0"):
        newcombe(0, 0, 1, 2)


@pytest.mark.parametrize("n", [1, 3, 7, 50, 1000, 1319])
def test_wilson_ends_are_exact_at_none_and_all(n):
    assert wilson(0, n)[0] == 0.0 and wilson(n, n)[1] == 1.0
    z2 = 1.959963984540054**2
    assert wilson(0, n)[1] == pytest.approx(z2 / (n + z2), rel=1e-12)
    assert all(0 < x < 1 for x in (wilson(0, n)[1], wilson(n, n)[0]))


def test_content_hash_is_of_the_content():
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1})
    assert content_hash(["ab", "c"]) != content_hash(["a", "bc"])
    assert len(content_hash("\ud800")) == 64


# --- Two reports --------------------------------------------------------------------------


def test_compare_counts_discordant_questions_and_says_so():
    a, b = report("1" * 40 + "1" * 12 + "0" * 48), report("1" * 40 + "0" * 12 + "1" * 2 + "0" * 46)
    found = compare(a, b, names=("gptq", "rtn"))
    assert (*found.right, found.only_a, found.only_b) == (52, 42, 12, 2)
    assert found.p == mcnemar(12, 2) and found.difference == pytest.approx(0.1)
    assert found.interval == newcombe(52, 100, 42, 100, 40)
    text = str(found)
    assert "gptq 52.0%, rtn 42.0%, difference +10.0 points [" in text
    assert "right in gptq only: 12, in rtn only: 2" in text and "p = 0.013: gptq is better" in text
    assert "no difference is shown" in str(compare(report("110"), report("011")))
    assert "the same questions" in str(compare(a, a)) and compare(a, a).p == 1


def test_compare_takes_a_mode():
    a, b = report("00", flexible="11"), report("00", flexible="01")
    assert compare(a, b).only_a == 0 and compare(a, b, "flexible").only_a == 1
    with pytest.raises(ValueError, match="'lenient'"):
        compare(a, b, "lenient")


def test_compare_needs_the_same_questions():
    with pytest.raises(ValueError, match=r"3 with hash \w{12}, 3 .* to differ is number 2; .*drop"):
        compare(report("111"), report("111", questions=["0", "x", "2"]))
    with pytest.raises(ValueError, match="differ is number 4"):
        compare(report("111"), report("1111"))
    with pytest.raises(ValueError, match="EvalReport.load"):
        compare(report("1"), EvalReport(1, 1, 1, 1, 0, 0, 0.0))


def test_drop_unpaired_and_paired():
    a, b = report("1" * 56 + "0" * 14), report("1" * 48 + "0" * 32)
    fall = drop(a, b, names=("test", "hard"))
    assert fall.difference == pytest.approx(0.2)
    assert fall.interval == pytest.approx((0.0524, 0.3339), abs=5.1e-5)
    assert "test 56/70 = 80.0%, hard 48/80 = 60.0%; difference +20.0 points [+5.2" in str(fall)
    with pytest.raises(ValueError, match="70 and 80 problems can't be paired"):
        drop(a, b, paired=True)
    other = report("1" * 50 + "0" * 20, questions=[f"other {i}" for i in range(70)])
    low, high = drop(a, other, paired=True).interval
    assert (low, high) == newcombe(56, 70, 50, 70, 50) and low > 0 > drop(a, other).interval[0]


def test_wilson_solves_its_quadratic():
    """Both ends solve (p - k/n)^2 = z^2 p (1 - p) / n: the definition, to rounding."""
    z = 1.959963984540054
    for k, n in ((1, 7), (487, 1319), (12, 40)):
        for end in wilson(k, n):
            p = Fraction(end)
            gap = (p - Fraction(k, n)) ** 2 - Fraction(z) ** 2 * p * (1 - p) / n
            assert math.isclose(float(gap), 0, abs_tol=1e-15)
