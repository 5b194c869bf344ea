"""When nbval takes two outputs for the same (`notebooks/course/tools/compare.py`)."""
import pytest

from course.tools.compare import same_text

RECORD = "✓ rtn error: 0.0912 (expected 0.091 ± 0.0005)"


@pytest.mark.parametrize("stored, fresh, same", [
    ("loss 1.00000003", "loss 0.99999998", True),
    ("mse 2.62e-02", "mse 2.63e-02", True),
    ("mse 2.62e-02", "mse 2.72e-02", False),
    ("[1.  2.5]", "[1. 2.5]", True),
    ("tensor([[-0.501]])", "tensor([[-0.502]])", True),
    ("36.9%", "37.0%", True),
    ("36.9%", "39.9%", False),
    ("bits=4", "bits=5", False),
    ("4,194,304 parameters", "4,194,305 parameters", False),
    ("1000 rows", "1001 rows", False),
    ("it has 100.", "it has 101.", False),
    ("3", "3.0", False),
    ("int4", "int8", False),
    ("torch 2.13.0", "torch 2.13.1", False),
    ("3.1x smaller", "3.2x smaller", False),
    ("nan", "1.0", False),
    ("ok", "not ok", False),
    ("1e-8", "2e-8", False),
    ("1.23e-12", "4.5e-13", True),
    ("a\nb", "b\na", False),
    ("a\n\nb\n", "a\nb", True),
])
def test_words_and_whole_numbers_exactly_floats_nearly(stored, fresh, same):
    assert same_text(stored, fresh) is same
    assert same_text(fresh, stored) is same


def test_the_tolerance_can_be_widened():
    assert not same_text("loss 1.00", "loss 1.04")
    assert same_text("loss 1.00", "loss 1.04", rtol=0.05)


@pytest.mark.parametrize("fresh, same", [
    ("✓ rtn error: 0.0906 (expected 0.091 ± 0.0005)", True),
    ("✓ rtn error: 0.0915 (expected 0.091 ± 0.0005)", True),
    ("✓ rtn error: 0.0917 (expected 0.091 ± 0.0005)", False),  # no verdict can make this true
    ("✗ rtn error: 0.0917 (expected 0.091 ± 0.0005)", False),
    ("✓ rtn error: 0.0912 (expected 0.092 ± 0.0005)", False),
    ("✓ rtn error: 0.0912 (expected 0.091 ± 0.5)", False),
    ("✓ nf4 error: 0.0912 (expected 0.091 ± 0.0005)", False),
    ("· rtn error: 0.0912 (nothing to compare with)", False),
])
def test_a_record_line_by_the_tolerance_it_states(fresh, same):
    assert same_text(RECORD, fresh) is same


def test_a_record_line_with_a_tolerance_far_above_one_percent():
    line = "✓ accuracy: {} (expected 36 ± 4)"
    assert same_text(line.format("33.1"), line.format("39.8"))


def test_an_exact_record_line():
    line = "✓ parameters: {} (expected 4096, exactly)"
    assert same_text(line.format(4096), line.format(4096))
    assert not same_text(line.format(4096), line.format(4097))
