"""The requirements of `make lowest` and `make newest`."""

from packaging.requirements import Requirement

from tests.support import version_bounds


def test_the_lowest_are_allowed_and_pin_each_package_once():
    lines = {r.name.lower(): r for r in map(Requirement, version_bounds.lowest())}
    assert len(lines) == len(version_bounds.lowest())
    own, everything = version_bounds.asked()
    assert {"torch", "transformers", "accelerate"} <= own.keys() < {r.name for r in everything}
    for requirement in everything:
        pinned = lines[requirement.name.lower()]
        if requirement.name in own:
            version = next(iter(pinned.specifier)).version
            assert requirement.specifier.contains(version)
            bound, = (s for s in requirement.specifier if s.operator == ">=")
            assert bound.version == version


def test_the_tested_versions_are_within_the_bounds():
    tested = (version_bounds.ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned = {r.name.lower(): r for r in map(Requirement, (
        line for line in tested if line and line[0] != "#"))}
    for requirement in version_bounds.asked()[1]:
        version = next(iter(pinned[requirement.name].specifier)).version
        assert requirement.specifier.contains(version), requirement
