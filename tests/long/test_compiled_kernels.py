"""The Triton kernels compiled for GPUs that need not be there, and their machine code counted."""

import json
import sys
from importlib.util import find_spec

import pytest

from qlora_lib.base.paths import DATA
from tests.support.compiled_kernels import counters_of

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler has wheels for Linux"),
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton has no wheel here"),
]
RECORD = DATA / "results" / "int4-counters.json"
SHARED = {80: 163, 90: 227, 100: 227}  # KiB that a program may have
# (sm, group, tokens of a tile, dtype): all sizes and spans; `benchmarks.predictions` takes all pairs
CONFIGURATIONS = [
    (90, 64, 8, "bf16"), (90, 128, 8, "bf16"), (90, 32, 8, "bf16"), (90, 64, 16, "bf16"),
    (90, 64, 32, "bf16"), (90, 64, 64, "bf16"),
    (80, 64, 8, "bf16"), (80, 64, 16, "bf16"), (80, 64, 32, "bf16"), (80, 128, 16, "bf16"),
    (80, 128, 32, "fp16"), (80, 64, 64, "fp16"),
    (100, 128, 8, "bf16"), (100, 64, 16, "fp16"), (100, 32, 64, "bf16"),
]  # fmt: skip


@pytest.fixture(scope="module")
def made():
    return dict(zip(CONFIGURATIONS, counters_of(CONFIGURATIONS), strict=True))


@pytest.mark.parametrize("case", CONFIGURATIONS, ids=lambda c: "-".join(map(str, c)))
def test_every_configuration_compiles_and_keeps_its_numbers_in_registers(case, made):
    found = made[case]
    assert found["tensor_cores"] and found["shared"] < SHARED[case[0]] * 1024
    assert found["copies"] > 0 and found["stages"] >= 3  # cp.async, two passes ahead at least
    assert found["spilled"] <= 32  # bytes of a thread, once a pass of hundreds of instructions


def test_up_to_32_tokens_take_three_and_a_half_instructions_a_weight_at_most(made):
    for width, most in ((64, 2.8), (128, 2.4), (32, 3.5)):
        assert made[90, width, 8, "bf16"]["instructions_a_weight"] < most
    for sm in (80, 90):
        assert made[sm, 64, 16, "bf16"]["instructions_a_weight"] < 2.8
        assert made[sm, 64, 32, "bf16"]["instructions_a_weight"] < 3.5


def test_counters_are_those_on_record(made):
    """A change that makes them worse needs a new record, and says so."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))["kernels"]
    known = {(r["sm"], r["group"], r["tokens"], "bf16"): r for r in record}
    both = known.keys() & made.keys()
    assert len(both) == 10
    for case in both:
        now, then = made[case], known[case]
        assert now["instructions_a_weight"] < 1.05 * then["instructions_a_weight"], case
        assert now["stages"] >= then["stages"] and now["shared"] <= then["shared"], case
        assert now["registers"] <= then["registers"] + 16, case


def test_the_kernels_that_make_dense_compile():
    made = counters_of("dense")
    assert len(made) == 16 and not any(found["spilled"] for found in made)
