"""The twenty completions that a reader of notebook 05 grades: labels and rules are the policy's."""
import re

import pytest

from course.nb05 import exercises as nb05
from qlora_lib.base.paths import ROOT

POLICY = (ROOT / "docs" / "EXTRACTION.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\d)\. (.*?)(?=^## |\Z)", POLICY, re.M | re.S))
RULES = sorted({rule for rules in nb05._MISREAD.values() for rule in rules})


def plain(text):
    return " ".join(text.replace("**", "").split()).lower()


def test_twenty_completions_each_with_what_is_often_misread():
    assert len(nb05._TWENTY) == 20 and sorted(nb05._MISREAD) == list(range(1, 21))
    for i, rules in nb05._MISREAD.items():
        reads = [read for found in rules.values() for read in found]
        assert nb05.reading(i) not in reads and len(set(reads)) == len(reads) >= 2
    assert nb05.reading(15) == (None, 1234.5) and nb05.reading(14) == (-5, -5)


@pytest.mark.parametrize("section, words", RULES)
def test_each_rule_is_quoted_from_its_section_of_the_policy(section, words):
    assert plain(words) in plain(SECTIONS[section[0]])
    if "." in section:  # the item of that number
        item = re.search(rf"^{section[2:]}\. .*?(?=^\d\. |\Z)", SECTIONS[section[0]], re.M | re.S)
        assert plain(words) in plain(item.group())
