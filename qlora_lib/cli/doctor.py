"""`python -m qlora_lib doctor`: what this machine has and lacks for the course, with the remedies.

It imports neither torch nor anything else that may be missing or broken: what torch sees, a
process of its own says, and no answer is waited for longer than some seconds.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import file_digest
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from ..base.machine import container_memory, cores, free_memory
from ..base.paths import BUNDLED, DATA, ROOT, short_path

INSTALL = "make setup, or python -m pip install -r requirements.txt"
NEEDED_MEMORY = 2e9  # of the longest notebook, at its peak
NEEDED_DISK, LARGE_DISK = 0.5e9, 15e9  # of the outputs of the tiny profile; of LLaMA-2-7B's weights
TORCH_SECONDS, OTHER_SECONDS = 60, 5  # patience; the first import from a cold disk takes long


@dataclass(frozen=True)
class Finding:
    """One line: ok, note (the bundled course runs nevertheless) or problem (it does not)."""

    state: str
    text: str


ok, note, problem = (partial(Finding, state) for state in ("ok", "note", "problem"))
Findings = Iterator[Finding]


def add_commands(commands) -> None:
    text = "say what this machine has and lacks for the course, with the remedies"
    command = commands.add_parser("doctor", help=text)
    command.add_argument("--json", action="store_true", help="a list of states and texts")
    command.set_defaults(run=doctor)


def doctor(args) -> int:
    """Print the findings; returns 1 where the bundled course cannot run, else 0."""
    with ThreadPoolExecutor() as pool:
        found = [line for lines in pool.map(_lines, CHECKS) for line in lines]
    problems = sum(line.state == "problem" for line in found)
    if args.json:
        print(json.dumps([asdict(line) for line in found], indent=1))
        return int(problems > 0)
    for line in found:
        print(f"{line.state:8} {line.text}")
    can = "cannot run here before the problems are mended" if problems else "can run here"
    print(f"\nThe bundled course {can}.")
    return int(problems > 0)


def _lines(check) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:  # of a check, it says nothing about the course
        name = check.__name__.removeprefix("check_")
        return [note(f"{name} could not be checked: {type(error).__name__}: {error}")]


def ask(command: list[str], seconds: float) -> str:
    """Return what a program prints; RuntimeError, in one line, where it is missing, too slow or
    fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer within {seconds} s") from None
    except OSError as error:
        raise RuntimeError(str(error)) from None
    if done.returncode < 0:
        raise RuntimeError(f"the process was ended by signal {-done.returncode}")
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.splitlines()[-1:]) or f"exit {done.returncode}")
    return done.stdout


# --- Python and packages -------------------------------------------------------------------------


def check_python() -> Findings:
    yield ok(f"Python {platform.python_version()}, {sys.executable}")


def check_packages() -> Findings:
    """Whether what pyproject.toml asks for is installed, in versions within its bounds."""
    try:
        fine, lacking = _packages()
    except ImportError:
        yield problem(f"the package `packaging` is missing, and probably all others: {INSTALL}")
        return
    needed, others = ([text for text, is_needed in lacking if is_needed == wanted]
                      for wanted in (True, False))  # fmt: skip
    yield ok(f"{fine} packages within the bounds of pyproject.toml")
    if needed:
        yield problem(f"packages that the course needs: {_with_versions(needed)}: {INSTALL}")
    if others:
        yield note(f"packages for GPU, hub, GGUF or tests: {_with_versions(others)}: {INSTALL}")
    if not all(find_spec(name) for name in ("course", "experiments")):
        yield problem("the course itself is not installed: in a clone, make setup, or "
                      "python -m pip install --no-deps -e .")  # fmt: skip


def missing_packages() -> list[str]:
    """Return the requirements of the bundled course that are not met here, as pip takes them."""
    return [text for text, is_needed in _packages()[1] if is_needed]


def _packages() -> tuple[int, list[tuple[str, bool]]]:
    """Return how many requirements are met, and the others, as `_asked` gives them."""
    from packaging.requirements import Requirement

    fine, lacking = 0, []
    for text, is_needed in _asked():
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        version = installed(wanted.name)
        if version and wanted.specifier.contains(version, prereleases=True):
            fine += 1
        else:
            lacking.append((f"{wanted.name}{wanted.specifier}", is_needed))
    return fine, lacking


def _with_versions(texts: list[str]) -> str:
    from packaging.requirements import Requirement

    found = ((text, installed(Requirement(text).name)) for text in texts)
    return ", ".join(f"{text} ({version or 'not installed'})" for text, version in found)


def _asked() -> list[tuple[str, bool]]:
    """Return the requirements, and whether the notebooks of the tiny profile need them."""
    if not (ROOT / "pyproject.toml").is_file():  # a wheel: pip saw to its bounds
        return []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [(text, True) for text in project["dependencies"]]
    for extra, texts in extras.items():
        needed += [(t, extra == "notebooks" and not t.startswith("triton")) for t in texts]
    return needed


def installed(name: str) -> str | None:
    """Return a package's version; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# --- torch, GPU, compiler ------------------------------------------------------------------------


def check_torch() -> Findings:
    script = Path(__file__).with_name("torch_facts.py").read_text(encoding="utf-8")
    try:
        said = ask([sys.executable, "-c", script], TORCH_SECONDS)
        facts = json.loads(said.splitlines()[-1])
    except (RuntimeError, ValueError, IndexError) as error:
        facts = {"error": str(error)}
    if "error" in facts:
        yield problem(f"torch can't be imported ({facts['error']}): {INSTALL}; where that does not "
                      "help, begin with a new environment")  # fmt: skip
        return
    native = "bf16 natively" if facts["cpu_bf16"] else "no bf16 of its own, so fp32"
    built = f"torch {facts['torch']}, built for {facts['built_for']}"
    yield ok(f"{built}; CPU: {facts['cpu']}, {native}")
    if "transformers_error" in facts:
        yield problem(f"transformers can't be imported ({facts['transformers_error']}): {INSTALL}")
    yield from gpu_lines(facts, nvidia_gpus())
    yield from compiler_lines(facts)


def nvidia_gpus() -> list[str]:
    """Return the GPUs that NVIDIA's driver names, as "name, driver version"; none without it."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return ask(query, OTHER_SECONDS).splitlines()
    except RuntimeError:
        return []


def gpu_lines(facts: dict, driver_says: list[str]) -> Findings:
    """What torch and the driver say of GPUs. The tiny profile needs none."""
    for gpu in facts["gpus"]:
        name = f"GPU {gpu['name']}"
        if "error" in gpu:
            yield note(f"{name} can't be used ({gpu['error']}): free it, or install a torch built "
                       "for it (pytorch.org's Get started names the indexes)")  # fmt: skip
            continue
        bf16 = "bf16" if gpu["bf16"] else "no bf16, so fp16"
        yield ok(f"{name}, compute capability {gpu['capability']}, {bf16}, {_gb(gpu['free'])} of "
                 f"{_gb(gpu['memory'])} free")  # fmt: skip
    if facts["gpus"]:
        return
    if not driver_says:
        yield ok("no GPU, which the tiny profile does not need; llama2-7b wants one of 8 GB")
    elif facts["built_for"] == "the CPU":
        yield note(f"this torch can't use the GPU ({driver_says[0]}): make setup with PIP_ARGS="
                   '"--extra-index-url ..." of a CUDA build (pytorch.org has it)')  # fmt: skip
    else:
        yield note(f"torch does not see the GPU ({driver_says[0]}; "
                   f"{facts['warning'] or 'CUDA_VISIBLE_DEVICES may hide it'}): update the driver, "
                   "or install a torch built for the CUDA that nvidia-smi shows")  # fmt: skip


def compiler_lines(facts: dict) -> Findings:
    """Triton, and the C compiler and Python headers with which it compiles for a GPU."""
    wheels = sys.platform == "linux" and platform.machine() == "x86_64"
    if "triton" in facts:
        yield ok(f"Triton {facts['triton']}")
    elif wheels or facts["gpus"]:
        yield note(f"no Triton ({facts['triton_error']}): 4-bit layers are slower on "
                   f"a GPU, and 06 does not run its kernels: {INSTALL}")  # fmt: skip
    else:
        yield ok("no Triton, which has no wheels here: 06 does not run its kernels")
    named = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    compiler = next(filter(shutil.which, (named.split()[0], "gcc", "clang", "cc")), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    lacking = [what for what, there in (("C compiler", compiler), ("Python.h", header.is_file()))
               if not there]  # fmt: skip
    if not lacking:
        yield ok(f"C compiler {compiler} and Python.h")
    elif facts["gpus"]:
        yield note(f"no {' and no '.join(lacking)}: Triton compiles nothing, and 4-bit layers are "
                   "slower; apt install gcc python3-dev (or your system's packages)")  # fmt: skip
    else:
        yield ok(f"no {' and no '.join(lacking)}: Triton needs it on a GPU, and make interop")


# --- memory, cores, disk -------------------------------------------------------------------------


def check_machine() -> Findings:
    free, limit = free_memory(), container_memory()[1]
    of = f" (this container's limit is {_gb(limit)})" if limit < float("inf") else ""
    if free < NEEDED_MEMORY:
        yield problem(f"{_gb(free)} of memory free{of}, and a notebook takes up to "
                      f"{_gb(NEEDED_MEMORY)}: end other programs and kernels")  # fmt: skip
    elif free == float("inf"):
        yield ok(f"free memory: this system does not say; {_gb(NEEDED_MEMORY)} a notebook")
    else:
        yield ok(f"{_gb(free)} of memory free{of}")
    count = cores()
    yield ok(f"{count} cores") if count > 1 else note("1 core: the course takes twice as long")
    yield from disk_lines("checkpoints/ and outputs/", Path.cwd(), NEEDED_DISK, problem,
                          "free some, or work in a clone on a larger disk")  # fmt: skip
    yield from disk_lines("the hub's cache", hub_cache(), LARGE_DISK, note, "LLaMA-2-7B would not "
                          "fit; export HF_HOME=a folder on a larger disk")  # fmt: skip


def disk_lines(what: str, folder: Path, needed: float, state, remedy: str) -> Findings:
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        yield state(f"{what}: {there} can't be written: chown it, or take another folder")
    elif free < needed:
        yield state(f"{what}: {_gb(free)} free in {there}, less than {_gb(needed)}: {remedy}")
    else:
        yield ok(f"{what}: {_gb(free)} of disk free in {there}")


def hub_cache() -> Path:
    """Return the folder of what the hub's client downloads, by the variables that it reads."""
    home = os.environ.get("HF_HOME")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(home) if home else cache / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser().absolute()


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


# --- Jupyter -------------------------------------------------------------------------------------


def check_jupyter() -> Findings:
    """The versions here, the JupyterLab on PATH where it is another environment's, and the kernel
    that `make kernel` offers to it."""
    here = [f"{name} {installed(name) or 'missing'}" for name in ("jupyterlab", "ipywidgets")]
    state = note if "missing" in " ".join(here) else ok  # whether it may be, check_packages says
    yield state(f"in this environment: {', '.join(here)}")
    other = shutil.which("jupyter")
    python = python_of(Path(other)) if other else None
    if other and python is None:
        yield note(f"another jupyter, {other}, whose Python can't be told: sliders need "
                   "jupyterlab_widgets in its environment (pip list there)")  # fmt: skip
    elif other and not same_environment(python):
        yield from server_lines(python)
    yield from kernel_lines(kernel_python(), bool(other) and not same_environment(python))


def python_of(script: Path) -> Path | None:
    """Return the Python that runs an installed script: by its first line, or beside it (Windows);
    None where that can't be told."""
    with open(script, "rb") as file:
        first = file.readline(500).decode(errors="replace").strip()
    words = first[2:].split() if first.startswith("#!") else []
    beside = [script.parent / "python.exe", script.parent.parent / "python.exe"]
    candidates = [Path(w) for w in words[:1] if "python" in Path(w).name] + beside
    return next((p for p in candidates if p.is_file()), None)


def same_environment(python: Path | None) -> bool:
    """Return whether a Python is this one. (Those of two environments may be links to one file.)"""
    return python is not None and python.parent.resolve() == Path(sys.executable).parent.resolve()


def server_lines(python: Path) -> Findings:
    """Whether another environment's JupyterLab can show the sliders."""
    script = ("import importlib.metadata as m, json\nfound = {d.name.lower().replace('-', '_'): "
              "d.version for d in m.distributions()}\nprint(json.dumps({n: found.get(n) for n in "
              "('jupyterlab', 'jupyterlab_widgets')}))")  # fmt: skip
    try:
        lab, widgets = json.loads(ask([str(python), "-c", script], OTHER_SECONDS)).values()
    except (RuntimeError, ValueError) as error:
        yield note(f"another jupyter, run by {python}, does not answer ({error}): make lab starts "
                   "this environment's")  # fmt: skip
        return
    if lab is None:
        yield ok(f"{python} has a jupyter without JupyterLab; make lab starts this environment's")
    elif widgets is None or not widgets.startswith("3."):
        yield note(f"the JupyterLab {lab} of {python} shows no sliders (jupyterlab_widgets "
                   f"{widgets or 'missing'}): {python} -m pip install 'jupyterlab_widgets>=3,<4', "
                   "and start it again; or make lab")  # fmt: skip
    else:
        yield ok(f"another JupyterLab {lab}, of {python}, with jupyterlab_widgets {widgets}")


def kernel_python() -> Path | None:
    """Return the Python that the kernel qlora-course starts; None where there is no such kernel."""
    try:
        from jupyter_core.paths import jupyter_path
    except ImportError:
        return None
    for folder in map(Path, jupyter_path("kernels")):
        if (spec := folder / "qlora-course/kernel.json").is_file():
            return Path(json.loads(spec.read_text(encoding="utf-8"))["argv"][0])
    return None


def kernel_lines(python: Path | None, other_server: bool) -> Findings:
    remedy = "make kernel, or python -m ipykernel install --user --name qlora-course"
    if python is None:
        if other_server:
            yield note(f"no kernel qlora-course for that other jupyter: {remedy}")
    elif not shutil.which(python):
        yield note(f"the kernel qlora-course starts {python}, which is gone: {remedy}")
    elif not same_environment(Path(shutil.which(python))):
        yield note(f"the kernel qlora-course starts {python}, another environment: {remedy}")
    else:
        yield ok("the kernel qlora-course starts this Python")


# --- hub and data --------------------------------------------------------------------------------


def check_hub() -> Findings:
    offline = "the tiny profile needs none; others take MODEL=folder and GSM8K_DIR=folder"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield note(f"no hub: HF_HUB_OFFLINE is set ({offline}): unset it to download")
        return
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    script = ("import sys, urllib.request as web\nrequest = web.Request(sys.argv[1], method='HEAD')"
              "\ntry: web.urlopen(request, timeout=float(sys.argv[2]))"
              "\nexcept OSError as error: sys.exit(str(getattr(error, 'reason', error)))")
    try:  # in a process, since nothing else bounds the look-up of the name
        ask([sys.executable, "-c", script, address, str(OTHER_SECONDS - 1)], OTHER_SECONDS)
        yield ok(f"the hub answers, {address}")
    except RuntimeError as error:
        yield note(f"no hub: {address} does not answer ({error}; {offline}): HTTPS_PROXY or a "
                   "mirror in HF_ENDPOINT may help")  # fmt: skip


def check_data() -> Findings:
    """Whether the bundled files are there, as data/hashes.json has them."""
    listing = DATA / "hashes.json"
    if not listing.is_file():
        yield problem(f"there is no {listing}: the bundled model {BUNDLED}")
        return
    wanted = json.loads(listing.read_text(encoding="utf-8"))["files"]
    missing = [name for name in wanted if not (DATA / name).is_file()]
    changed = [n for n, was in wanted.items() if n not in missing and _sha256(DATA / n) != was]
    results = [n for n in changed if n.startswith("results/")]  # by `make experiments`, perhaps
    asked = [n for n in changed if n not in results]
    for state, what, names in ((problem, "missing", missing), (problem, "changed", asked),
                               (note, "changed", results)):  # fmt: skip
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            yield state(f"{what} in {short_path(DATA)}: {', '.join(names[:3])}{more}: git checkout "
                        f"-- {short_path(DATA)}, or clone again")  # fmt: skip
    if not missing and not changed:
        yield ok(f"{len(wanted)} bundled files in {short_path(DATA)}, as they were published")


def _sha256(path: Path) -> str:  # base/hashes.py needs torch
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


CHECKS = (check_python, check_packages, check_torch, check_machine, check_jupyter, check_hub,
          check_data)  # fmt: skip
