"""The doctor: each check with a faked environment, and the whole of it without torch."""

import ast
import json
import re
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from experiments.data_hashes import data_hashes
from qlora_lib.__main__ import main
from qlora_lib.base.files import read_json
from qlora_lib.base.folders import HASHES
from qlora_lib.base.paths import DATA, ROOT
from qlora_lib.cli import doctor
from qlora_lib.cli.checks import bundled, finding, gpu, hub, jupyter, machine, packages, torch_facts

FACTS = {"torch": "2.13.0", "built_for": "CUDA 12.8", "cpu": "AVX512", "cpu_bf16": True,
         "warning": "", "gpus": [], "triton": "3.7.1"}  # fmt: skip
GPU = {"name": "H200", "capability": "9.0", "bf16": True, "free": 100e9, "memory": 140e9}
SMI = ["NVIDIA T4, 470.82"]


def states(findings) -> list[str]:
    return [line.state for line in findings]


def only(findings) -> finding.Finding:
    (line,) = findings
    return line


def answers(monkeypatch, said, module):
    """What a module's checks ask gives `said`, or raises it; returns what was asked."""
    asked = []

    def ask(command, seconds):
        asked.append((command, seconds))
        if isinstance(said, Exception):
            raise said
        return said

    monkeypatch.setattr(module, "ask", ask)
    return asked


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("found, code", [("ok note", 0), ("ok problem note", 1)])
def test_a_problem_alone_makes_it_fail(monkeypatch, capsys, found, code):
    lines = [finding.Finding(state, f"about {state}: do that") for state in found.split()]
    monkeypatch.setattr(doctor, "CHECKS", [lambda: iter(lines)])
    assert main(["doctor"]) == code
    said = capsys.readouterr().out
    assert all(f"about {state}: do that" in said for state in found.split())
    assert ("can run here" in said) == (code == 0)
    assert main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == [vars(line) for line in lines]


def test_a_check_that_fails_is_a_note_and_the_others_go_on(monkeypatch, capsys):
    def check_moon():
        yield finding.ok("still there")
        raise KeyError("phase")

    monkeypatch.setattr(doctor, "CHECKS", [check_moon, lambda: [finding.ok("sun")]])
    assert doctor.doctor(Namespace(json=False)) == 0
    said = capsys.readouterr().out
    assert "moon could not be checked" in said and "sun" in said


def test_an_older_python_is_told_so_before_it_meets_what_it_cannot_read(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    monkeypatch.delitem(sys.modules, "qlora_lib.__main__")  # to be read anew
    with pytest.raises(SystemExit, match="Python 3.11 or newer is needed"):
        runpy.run_module("qlora_lib", run_name="__main__")
    for name in ("__init__.py", "__main__.py"):  # these it reads
        ast.parse((ROOT / "qlora_lib" / name).read_text(encoding="utf-8"), feature_version=(3, 7))


@pytest.mark.long
def test_it_runs_without_any_package(tmp_path):
    """In Python's isolated mode, which sees no installed package; the hub is switched off."""
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + (
        "from qlora_lib.__main__ import main\nsys.exit(main(['doctor', '--json']))")
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 1 and not done.stderr
    said = " ".join(line["text"] for line in json.loads(done.stdout) if line["state"] == "problem")
    assert "make setup" in said and "packaging" in said


@pytest.mark.long
def test_here_the_course_can_run(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["doctor"]) == 0, capsys.readouterr().out
    assert "torch" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("code, words", [
    ("import sys; sys.exit('no such driver')", "no such driver"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "signal 4"),
    ("import threading; threading.Event().wait(60)", "no answer within 0.2 s"),
])  # fmt: skip
def test_a_program_that_fails_dies_or_hangs_is_a_line(code, words):
    with pytest.raises(RuntimeError, match=words):
        finding.ask([sys.executable, "-I", "-S", "-c", code], 0.2 if "60" in code else 30)


def test_a_program_that_is_missing_is_a_line():
    with pytest.raises(RuntimeError, match="No such file"):
        finding.ask(["/there/is/none"], 1)


# --- packages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, version, state", [
    ("transformers", None, "problem"), ("transformers", "4.50.0", "problem"),
    ("transformers", "6.0.0", "problem"), ("ipywidgets", "8.1.9", "problem"),
    ("triton", None, "note"), ("datasets", None, "note"), ("nbval", "0.10.0", "note"),
])  # fmt: skip
def test_packages_outside_the_bounds_are_named(monkeypatch, name, version, state):
    own = packages.installed
    monkeypatch.setattr(packages, "installed", lambda n: version if n == name else own(n))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(packages, "_asked", lambda asked=packages._asked: [
        (text.partition(";")[0], needed) for text, needed in asked()])  # on any machine
    line = only(line for line in packages.check_packages() if name in line.text)
    assert line.state == state and (version or "not installed") in line.text
    assert "requirements.txt" in line.text


def test_packages_within_the_bounds_are_fine():
    assert "problem" not in states(packages.check_packages())


def test_without_the_course_installed_there_is_a_remedy(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    assert "-e ." in [line.text for line in packages.check_packages() if line.state == "problem"][0]


# --- torch, GPU, compiler ------------------------------------------------------------------------


@pytest.mark.parametrize("said", [
    RuntimeError("the process was ended by signal 4"), "", "no JSON",
    json.dumps({"error": "OSError: libcudart.so.12: cannot open shared object file"})])  # fmt: skip
def test_a_torch_that_is_missing_or_broken_is_a_problem(monkeypatch, said):
    answers(monkeypatch, said, gpu)
    line = only(gpu.check_torch())
    assert line.state == "problem" and "pip install" in line.text


def test_transformers_that_cannot_be_imported_is_a_problem_too(monkeypatch):
    answers(monkeypatch, json.dumps(FACTS | {"transformers_error": "ImportError: tokenizers"}), gpu)
    line = only(line for line in gpu.check_torch() if line.state == "problem")
    assert "tokenizers" in line.text and "pip install" in line.text


def test_the_facts_of_this_torch():
    facts = torch_facts.torch_facts()
    assert facts.keys() >= {"torch", "built_for", "cpu", "cpu_bf16", "warning", "gpus"}
    assert ("triton" in facts) != ("triton_error" in facts) and "transformers" in facts
    assert json.loads(json.dumps(facts)) == facts


def test_a_torch_that_cannot_be_imported_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "torch" in torch_facts.torch_facts()["error"]


@pytest.mark.parametrize("facts, driver, state, words", [
    ({"gpus": [GPU]}, SMI, "ok", "capability 9.0, bf16, 100.0 GB of 140.0 GB free"),
    ({"gpus": [GPU | {"bf16": False}]}, SMI, "ok", "no bf16, so fp16"),
    ({"gpus": [{"name": "K80", "capability": "3.7", "error": "no kernel image"}]}, SMI, "note",
     "no kernel image"),
    ({}, [], "ok", "no GPU"),
    ({"built_for": "the CPU"}, SMI, "note", "--extra-index-url"),
    ({"warning": "The NVIDIA driver on your system is too old"}, SMI, "note", "too old.*update"),
    ({}, SMI, "note", "CUDA_VISIBLE_DEVICES"),
])  # fmt: skip
def test_what_stands_between_torch_and_a_gpu_is_said(facts, driver, state, words):
    line = only(gpu.gpu_lines(FACTS | facts, driver))
    assert line.state == state and re.search(words, line.text)


@pytest.mark.parametrize("gpus, there, state", [
    ([], [], "ok"), ([GPU], [], "note"), ([GPU], ["gcc"], "ok"), ([], ["cc"], "ok")])  # fmt: skip
def test_a_gpu_wants_a_compiler_and_headers(monkeypatch, tmp_path, gpus, there, state):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(gpu.sysconfig, "get_path", lambda name: str(tmp_path))
    if there:
        (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CC", "my-cc -m64")
    line = list(gpu.compiler_lines(FACTS | {"gpus": gpus}))[1]
    assert line.state == state and ("python3-dev" in line.text) == (state == "note")


@pytest.mark.parametrize("machine, state", [("x86_64", "note"), ("arm64", "ok")])
def test_triton_is_missed_where_it_has_wheels(monkeypatch, machine, state):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(gpu.platform, "machine", lambda: machine)
    facts = {n: value for n, value in FACTS.items() if n != "triton"} | {"triton_error": "none"}
    line = next(gpu.compiler_lines(facts))
    assert line.state == state and "Triton" in line.text


def test_gpus_are_asked_of_the_driver_for_a_bounded_time(monkeypatch):
    asked = answers(monkeypatch, "NVIDIA T4, 470.82\n", gpu)
    assert gpu.nvidia_gpus() == SMI and asked[0][1] <= 10
    answers(monkeypatch, RuntimeError("no nvidia-smi"), gpu)
    assert gpu.nvidia_gpus() == []


# --- memory, cores, disk -------------------------------------------------------------------------


@pytest.mark.parametrize("free, limit, count, wanted", [
    (1e9, 4e9, 4, ["problem", "ok"]), (20e9, float("inf"), 1, ["ok", "note"]),
    (float("inf"), float("inf"), 2, ["ok", "ok"])])  # fmt: skip
def test_memory_and_cores(monkeypatch, free, limit, count, wanted):
    monkeypatch.setattr(machine, "free_memory", lambda: free)
    monkeypatch.setattr(machine, "container_memory", lambda: (free, limit))
    monkeypatch.setattr(machine, "cores", lambda: count)
    lines = list(machine.check_machine())
    assert states(lines)[:2] == wanted
    assert ("limit is 4.0 GB" in lines[0].text) == (limit == 4e9)


@pytest.mark.parametrize("free, writable, state", [
    (1e9, True, "ok"), (1e8, True, "problem"), (1e9, False, "problem")])  # fmt: skip
def test_disk_is_that_of_the_folder_that_will_be_made(monkeypatch, tmp_path, free, writable, state):
    monkeypatch.setattr(machine.os, "access", lambda path, mode: writable)
    asked = []
    monkeypatch.setattr(machine.shutil, "disk_usage",
                        lambda path: asked.append(path) or Namespace(free=free))  # fmt: skip
    folder = tmp_path / "not" / "yet"
    line = only(machine.disk_lines("it", folder, 5e8, finding.problem, "free some"))
    assert line.state == state and str(tmp_path) in line.text
    assert not asked or asked == [tmp_path]


@pytest.mark.parametrize("variables, folder", [
    ({"HF_HUB_CACHE": "/big/hub", "HF_HOME": "/home"}, "/big/hub"),
    ({"HF_HOME": "/big"}, "/big/hub"), ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub")])
def test_the_cache_is_where_the_hubs_client_puts_it(monkeypatch, variables, folder):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hub.hub_cache() == Path(folder).absolute()


# --- Jupyter -------------------------------------------------------------------------------------


def environment(folder: Path) -> Path:
    """The Python of an environment, with a jupyter beside it."""
    python = folder / "bin" / "python3"
    python.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    (folder / "bin" / "jupyter").write_text(f"#!{python}\nimport sys\n")
    return python


@pytest.mark.parametrize("lab, widgets, state, words", [
    ("4.6.6", "3.0.16", "ok", "another JupyterLab 4.6.6"),
    ("4.6.6", None, "note", "jupyterlab_widgets>=3"), ("4.6.6", "1.1.0", "note", "no sliders"),
    (None, None, "ok", "make lab")])  # fmt: skip
def test_the_servers_environment_must_have_the_widgets(monkeypatch, tmp_path, lab, widgets, state,
                                                       words):
    python = environment(tmp_path)
    monkeypatch.setattr(jupyter.shutil, "which", lambda name: str(python.with_name("jupyter")))
    monkeypatch.setattr(jupyter, "kernel_python", lambda: None)
    said = json.dumps({"jupyterlab": lab, "jupyterlab_widgets": widgets})
    asked = answers(monkeypatch, said, jupyter)
    _, line, kernel = jupyter.check_jupyter()
    assert line.state == state and words in line.text
    assert asked[0][0][0] == str(python) and asked[0][1] <= 10
    assert kernel.state == "note" and "make kernel" in kernel.text


def test_a_server_that_cannot_be_asked_is_a_note(monkeypatch, tmp_path):
    python = environment(tmp_path)
    answers(monkeypatch, RuntimeError("no answer within 5 s"), jupyter)
    assert only(jupyter.server_lines(python)).state == "note"
    shim = python.with_name("jupyter")
    shim.write_text("#!/usr/bin/env bash\nexec something\n")
    assert jupyter.python_of(shim) is None
    monkeypatch.setattr(jupyter.shutil, "which", lambda name: str(shim))
    monkeypatch.setattr(jupyter, "kernel_python", lambda: None)
    assert states(jupyter.check_jupyter())[1:] == ["note", "note"]


def test_this_environments_own_jupyter_is_no_other(monkeypatch):
    own = Path(sys.executable).with_name("jupyter")
    monkeypatch.setattr(jupyter.shutil, "which", lambda name: str(own))
    monkeypatch.setattr(jupyter, "python_of", lambda script: Path(sys.executable))
    monkeypatch.setattr(jupyter, "kernel_python", lambda: None)
    assert states(jupyter.check_jupyter()) == ["ok"]


def test_the_kernel_must_start_this_python(monkeypatch, tmp_path):
    spec = tmp_path / "kernels" / "qlora-course" / "kernel.json"
    spec.parent.mkdir(parents=True)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    other = environment(tmp_path / "other")
    for python, state, words in ((sys.executable, "ok", "this Python"), (other, "note", "another"),
                                 (tmp_path / "gone", "note", "gone")):  # fmt: skip
        spec.write_text(json.dumps({"argv": [str(python), "-m", "ipykernel_launcher"]}))
        line = only(jupyter.kernel_lines(jupyter.kernel_python(), False))
        assert line.state == state and words in line.text


# --- hub and data --------------------------------------------------------------------------------


@pytest.mark.parametrize("offline, said, state, words", [
    ("1", "", "note", "unset"), ("0", "", "ok", "https://mirror"),
    ("", RuntimeError("no answer within 5 s"), "note", "HF_ENDPOINT")])  # fmt: skip
def test_the_hub_is_asked_once_and_briefly(monkeypatch, offline, said, state, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror")
    asked = answers(monkeypatch, said, hub)
    line = only(hub.check_hub())
    assert line.state == state and words in line.text
    assert len(asked) == (offline != "1") and all(seconds <= 10 for _, seconds in asked)


@pytest.mark.long
def test_a_hub_that_refuses_is_no_traceback(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert "refused" in only(hub.check_hub()).text


def test_the_listing_of_the_bundled_files_is_that_of_today():
    """After a change in data/: python -m experiments.data_hashes."""
    assert read_json(DATA / HASHES) == data_hashes()


@pytest.mark.parametrize("change, wanted", [
    (lambda data: None, ["ok"]),
    (lambda data: (data / "tiny-llama/model.safetensors").unlink(), ["problem"]),
    (lambda data: (data / "tiny-llama/model.safetensors").write_text("flipped"), ["problem"]),
    (lambda data: (data / "results/a.json").write_text("{}"), ["note"]),
    (lambda data: (data / "hashes.json").unlink(), ["problem"]),
])  # fmt: skip
def test_bundled_files_that_are_missing_or_changed_are_named(monkeypatch, tmp_path, change, wanted):
    for name in ("tiny-llama/model.safetensors", "results/a.json", "completions.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / HASHES).write_text(json.dumps(data_hashes(tmp_path)))
    monkeypatch.setattr(bundled, "DATA", tmp_path)
    change(tmp_path)
    lines = list(bundled.check_data())
    assert states(lines) == wanted
    assert wanted == ["ok"] or "clone" in lines[0].text
