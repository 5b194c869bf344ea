"""The pictures of notebook 10: what their controls change, and what they state."""

import pytest
import torch

from course.nb10 import draw
from course.nb10.exercises import q4_0_blocks
from qlora_lib.serving.verify import CLOSE, NEAR
from qlora_lib.serving.verify import FAR as FAR_OFF
from tests.support.controls import axes_of, check_controls

pytestmark = pytest.mark.usefixtures("quick_pictures")

CODES = [(7 * i) % 16 for i in range(32)]
FAR = {"adapter missing": {"as measured": [4.0, 6.0], "adapter missing": [0.02, 0.0],
                           "adapter merged twice": [9.0, 9.0]},
       "nothing": {"as measured": [0.0, 0.0], "adapter missing": [4.0, 6.0],
                   "adapter merged twice": [1.0, 3.0]}}  # fmt: skip
ROWS = [{"name": name, "bits": bits, "correct": correct, "n": 200}
        for name, bits, correct in (("nearest adapter", 4.5, 187), ("gptq adapter", 4.5, 187),
                                    ("gptq merged", 5.0, 186))]  # fmt: skip


def test_controls_of_the_block():
    check_controls(draw.draw_block, {"d": [0.05, -0.1], "place": [0, 17], "code": [0, 8, 15]},
                   codes=CODES, axes=(2, 1))


def test_controls_of_distances():
    check_controls(draw.draw_distances, {"fault": list(FAR), "questions": [1, 2]}, far=FAR)


def test_the_bytes_are_those_of_a_block():
    d = torch.tensor(-0.11).half()
    codes = torch.tensor(CODES, dtype=torch.uint8)
    assert list(draw.block_bytes(d.item(), CODES)) == q4_0_blocks(codes, d).tolist()


@pytest.mark.parametrize("place, half, byte", [(0, "low", 2), (15, "low", 17), (16, "high", 2)])
def test_where_a_code_stands(place, half, byte):
    above, below = axes_of(draw.draw_block, (2,), d=0.5, place=place, code=10, codes=CODES)
    assert above.get_title() == f"code {place} is 10, in the {half} half of byte {byte}"
    assert below.get_title() == f"weight {place} = 0.5 (10 - 8) = 1"
    marked = [text for text in above.texts if text.get_weight() == "bold"]
    assert [text.get_text() for text in marked] == ["a"]


def test_the_title_names_the_nearest():
    ax = axes_of(draw.draw_distances, fault="adapter missing", questions=1, far=FAR)
    assert ax.get_title() == "nearest: adapter missing, 0.02 off"
    ax = axes_of(draw.draw_distances, fault="nothing", questions=2, far=FAR)
    assert ax.get_title() == "nearest: as measured, under 0.001 off"


def test_the_limits_stand_at_the_bars_that_they_are_for():
    ax = axes_of(draw.draw_distances, fault="nothing", questions=1, far=FAR)
    spans = {line.get_xdata()[0]: line.get_ydata() for line in ax.get_lines()}
    assert sorted(spans) == [CLOSE, NEAR, FAR_OFF]
    names = [text.get_text() for text in ax.get_yticklabels()]
    for limit, (first, last) in spans.items():
        crossed = [name for place, name in enumerate(names) if first < place < last]
        assert crossed == (["missing", "merged twice"] if limit == NEAR else ["as measured"])


def test_a_point_for_each_row_over_its_bits():
    ax = axes_of(draw.draw_bits, rows=ROWS)
    first, second, third = sorted({float(x) for line in ax.get_lines() for x in line.get_xdata()})
    assert first < 4.5 < second < third == 5.0
    assert [text.get_text() for text in ax.texts] == [
        row["name"].replace(" ", "\n") for row in ROWS]  # fmt: skip
