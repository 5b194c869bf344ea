"""Names that become files stay where they are put."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lib.base.paths import plain_name


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "../x", "a/b", "/x", "a\\b", "C:x", "a\0b", "a\nb", "\ud800", None, 5, "x" * 300]
)
def test_what_names_no_file(name):
    with pytest.raises(ValueError, match="profile .* can't name a file"):
        plain_name(name, "the profile")


@given(st.text(max_size=20))
def test_a_plain_name_is_a_child_of_its_folder(name):
    try:
        plain_name(name, "it")
    except ValueError:
        return
    assert (Path("/folder") / name).resolve().parent == Path("/folder")
