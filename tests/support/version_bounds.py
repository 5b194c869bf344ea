"""Requirements at the ends of what pyproject.toml allows:
`python -m tests.support.version_bounds lowest|newest`.

lowest   what the library itself imports in the oldest versions, the rest as in requirements.txt
newest   everything, without upper bounds but those of pyproject.toml
"""

import sys
import tomllib

from packaging.requirements import Requirement

from qlora_lib.base.paths import ROOT

OF_THE_LIBRARY = ("data", "gguf")  # extras that qlora_lib imports
APART = ("llama-cpp",)  # with the peers of tests/interop, in tests/requirements-interop.txt


def asked() -> tuple[dict[str, Requirement], list[Requirement]]:
    """What pyproject.toml asks for: the library's requirements by name, and all of them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    extras = {name: asked for name, asked in extras.items() if name not in APART}
    own = project["dependencies"] + [r for name in OF_THE_LIBRARY for r in extras[name]]
    everything = project["dependencies"] + sum(extras.values(), [])
    return {r.name: r for r in map(Requirement, own)}, list(map(Requirement, everything))


def lowest() -> list[str]:
    """Lines for pip, each with one version of a package; raises ValueError for a package of the
    library without a lower bound."""
    own, everything = asked()
    lines = []
    for name, requirement in own.items():
        bounds = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
        if len(bounds) != 1:
            raise ValueError(f"{requirement} in pyproject.toml has no lower bound")
        lines.append(f"{name}=={bounds[0]}")
    tested = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    for line in tested:
        if line and not line.startswith("#") and Requirement(line).name not in {*own, "triton"}:
            lines.append(line)
    # torch asks for a triton of its own.
    return lines + [str(r) for r in everything if r.name == "triton"]


if __name__ == "__main__":
    print(*(lowest() if sys.argv[1] == "lowest" else map(str, asked()[1])), sep="\n")
