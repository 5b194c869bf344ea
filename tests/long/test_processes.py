"""Two processes that share a run give what one gives."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from qlora_lib.__main__ import main
from qlora_lib.base import processes
from qlora_lib.base.paths import ROOT
from tests.support.shared_run import COMMANDS, train_and_evaluate
from tests.support.small_models import small_model, small_tokenizer

pytestmark = pytest.mark.long


def free_ports(n: int) -> list[str]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the results of one process and of two."""
    folder = tmp_path_factory.mktemp("processes")
    one, two = folder / "one", folder / "two"
    (one / "data").mkdir(parents=True)
    small_model().save_pretrained(one / "model")
    small_tokenizer().save_pretrained(one / "model")
    for k, split in enumerate(("train", "dev", "test")):
        entries = [
            {"question": f"{i} + {k}?", "answer": f"{i}+{k}\n#### {i + k}"} for i in range(11)
        ]
        (one / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, entries)))
    shutil.copytree(one, two)
    ports = free_ports(3)
    common = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]),
    }  # fmt: skip
    command = [sys.executable, ROOT / "tests" / "support" / "shared_run.py", folder, *ports]
    both = subprocess.Popen(command, env=common, stderr=subprocess.PIPE, text=True)
    try:
        before = os.getcwd()
        os.chdir(one)
        alone = train_and_evaluate(one)
        for argv in COMMANDS.values():
            assert main(argv) == 0
    finally:
        os.chdir(before)
        _, errors = both.communicate(timeout=300)
    assert both.returncode == 0, errors
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return folder, alone, results, [(folder / f"{rank}.out").read_text() for rank in range(2)]


def close(a, b):
    """1e-4: fp32 sums in another order, 1e-6, which Adam's division magnifies where a gradient is
    small, and four steps of lr 1e-2 carry on."""
    return a == pytest.approx(b, abs=1e-4)


def test_losses_and_norms_are_those_of_one_process(place):
    _, alone, results, _ = place
    for result in results:
        for name in ("losses", "norms"):
            assert len(result[name]) == 4 and close(result[name], alone[name])
        assert close([loss for _, loss in result["dev"]], [loss for _, loss in alone["dev"]])
        assert result["resumed"] == alone["resumed"] == 2
    assert alone["losses"][3] < alone["losses"][1]  # the same single example twice


def test_both_processes_end_with_the_same_bits(place):
    _, _, results, _ = place
    assert results[0] == results[1] | {name: results[0][name] for name in ("asked", "share")}
    assert results[0]["weights"] == results[1]["weights"]


def test_chunks_are_asked_by_turns_and_answers_are_those_of_one_process(place):
    folder, alone, results, _ = place
    assert alone["asked"] == [4, 4, 3] and [r["asked"] for r in results] == [[4, 3], [4]]
    assert len(set(alone["completions"])) > 5  # sampled
    for result in results:
        assert result["completions"] == alone["completions"]
        assert result["strict"] == alone["strict"]
    assert len((folder / "two/eval/predictions.jsonl").read_text().splitlines()) == 11


def test_shares_sums_and_errors(place):
    _, _, (zero, one), _ = place
    assert zero["share"] == [0, 2, 4] and one["share"] == [1, 3]
    assert zero["summed"] == [[3.0, 3.0], [1.0, 1.0], None]
    assert zero["errors"][0].startswith("ValueError: processes 0 and 1 differ in rank: 0, 1")
    assert zero["errors"][1] == "FileNotFoundError: no such file"


def test_command_line(place):
    folder, _, _, (out, silent) = place
    one, two = (folder / name / "checkpoints/tiny" for name in ("one", "two"))
    assert "shared by 2 processes" in out and out.count("   gold ") == 11 and not silent
    assert out.count("base: quantizing") == 1
    losses = [
        [json.loads(line)["loss"] for line in open(run / "training/metrics.jsonl")]
        for run in (one, two)
    ]
    assert len(losses[0]) == 2 and close(*losses)
    saved = [load_file(run / "adapter/adapter_model.safetensors") for run in (one, two)]
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[0].items():
        torch.testing.assert_close(saved[1][name], tensor, rtol=0, atol=1e-4)
    reports = [json.loads((folder / n / "cli/report.json").read_text()) for n in ("one", "two")]
    assert reports[0]["strict_correct"] == reports[1]["strict_correct"]


def test_one_process_gives_back_what_it_is_given():
    assert processes.gather({"a": 1}) == [{"a": 1}] and processes.on_first(lambda: 3) == 3
    assert processes.share("abc") == "abc" and processes.total(2.5, "cpu") == 2.5
    assert processes.first() and processes.world() == 1
    processes.agree("nothing", 1)


def test_what_cannot_be_shared_is_said(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["generate", "1 + 1?"]) == 2
    assert "generate runs in one process, 2 were launched" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match="no GPU of its own"):
            processes.start(device)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="RANK expected"):
        processes.start("cpu")
