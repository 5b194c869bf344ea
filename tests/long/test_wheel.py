"""What pip makes of the repository: a wheel that stands alone, and an editable install."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from qlora_lib.base.paths import ROOT
from tests.support.small_models import small_model, small_tokenizer

pytestmark = pytest.mark.long

# Quantizes, trains and saves a small random model, in the environment that has the wheel.
ALONE = """
import importlib.util
import sys
from pathlib import Path

import torch

import qlora_lib
from qlora_lib import (
    QuantizedLinear, QuantSpec, TrainConfig, finetune, inject_lora, load_adapter, load_profile,
    load_quantized, quantize_model, quantized_layers, save_adapter, save_quantized,
)
from qlora_lib.models.load import load_model

assert Path(qlora_lib.__file__).is_relative_to(sys.prefix), qlora_lib.__file__
assert not any(importlib.util.find_spec(name) for name in ("course", "experiments"))

model, tokenizer = load_model("random-llama", compute_dtype="fp32")
pairs = [(f"{i} + {i}?", f"#### {2 * i}") for i in range(8)]
ids = tokenizer([question for question, _ in pairs], return_tensors="pt", padding=True)
quantize_model(model, [dict(ids)], QuantSpec(4, 32))
assert len(quantized_layers(model)) == 14
save_quantized(model, tokenizer, "base")
inject_lora(model, "all", rank=2)
finetune(model, tokenizer, pairs, TrainConfig(max_steps=3, batch_size=4, compute_dtype="fp32"))
save_adapter(model, "adapter")
reloaded, _ = load_quantized("base", compute_dtype="fp32")
before = reloaded(**ids).logits
load_adapter(reloaded, "adapter")
with torch.no_grad():
    logits = model.eval()(**ids).logits
    assert torch.allclose(reloaded.eval()(**ids).logits, logits, atol=1e-5)
assert not torch.allclose(before, logits, atol=1e-3)  # something was learned

profile = load_profile("tiny")
for missing in (profile.load, lambda: profile.examples("train")):
    try:
        missing()
    except FileNotFoundError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """What pip reads of the repository, where builds leave their folders."""
    place = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "setup.py", "LICENSE"):
        shutil.copy(ROOT / name, place)
    unwanted = shutil.ignore_patterns("__pycache__", "*.ipynb", ".ipynb_checkpoints")
    for name in ("qlora_lib", "experiments", "notebooks", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, place / name, ignore=unwanted)
    return place


def environment(place: Path) -> tuple[Path, Path]:
    """(its python, its site-packages) of a new environment, which sees the packages of this one
    but not what is installed here editably."""
    builder = venv.EnvBuilder(symlinks=os.name != "nt")
    builder.create(place)
    site = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(place)}))
    packages = [path for path in sys.path if path.endswith("-packages")]
    (site / "packages_of_the_tests.pth").write_text("\n".join(packages))
    return Path(builder.ensure_directories(place).env_exe), site


def run(*command, cwd: Path) -> str:
    """What the command prints; its working directory and environment have no repository."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    clean |= {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(map(str, command), cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments, cwd: Path) -> str:
    return run(sys.executable, "-m", "pip", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(copy):
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", ".", cwd=copy)
    return next((copy / "dist").glob("qlora_lib-*.whl"))


def test_a_wheel_holds_the_library_whole_and_alone(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    library = {p.relative_to(ROOT).as_posix() for p in (ROOT / "qlora_lib").rglob("*.py")}
    assert names == library


def test_the_wheel_works_without_the_repository(wheel, tmp_path):
    python, _ = environment(tmp_path / "env")
    pip("--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    small_model().save_pretrained(tmp_path / "random-llama")
    small_tokenizer().save_pretrained(tmp_path / "random-llama")
    no_model, no_problems = run(python, "-c", ALONE, cwd=tmp_path).splitlines()
    assert "tiny-llama" in no_model and "minigsm" in no_problems
    for message in (no_model, no_problems):
        assert "comes with the course's repository" in message and "clone" in message


def test_an_editable_install_finds_the_course_and_the_experiments(copy, tmp_path):
    python, site = environment(tmp_path / "env")
    pip("--python", python, "install", "-q", "--no-deps", "--no-index", "--no-build-isolation",
        "-e", copy, cwd=tmp_path)  # fmt: skip
    names = "qlora_lib", "qlora_lib.quant.grid", "course.kit", "course.tools", "experiments.toy"
    find = f"""
import importlib.util
for name in {names}:
    print(importlib.util.find_spec(name).origin)
"""
    found = run(python, "-c", find, cwd=tmp_path).splitlines()
    assert len(found) == len(names)
    assert all(Path(origin).is_relative_to(copy.resolve()) for origin in found), found
    assert not (site / "qlora_lib").exists()
