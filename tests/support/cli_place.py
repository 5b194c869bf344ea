"""A working directory in which the command line is tried, on a small random model."""

import json

import pytest

from qlora_lib.__main__ import main
from tests.support.small_models import small_model, small_tokenizer


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory with a model of one block and 12 problems a split."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MODEL", raising=False)
    small_model(layers=1).save_pretrained("model")
    small_tokenizer().save_pretrained("model")
    (tmp_path / "data").mkdir()
    for k, split in enumerate(("train", "dev", "test")):
        entries = [
            {"question": f"{i} + {k}?", "answer": f"{i}+{k}=<<{i}+{k}={i + k}>>\n#### {i + k}"}
            for i in range(12)
        ]
        lines = "\n".join(map(json.dumps, entries))
        (tmp_path / "data" / f"{split}.jsonl").write_text(lines)
    return tmp_path


COMMON = ["--model", "model", "--data", "data"]
SHORT = ["--limit", "2", "--max-new-tokens", "2"]
FAST = [*COMMON, "--max-steps", "2", "--batch-size", "4", "--accumulation", "1", "--rank", "2"]


def run(*argv):
    return main(list(argv))
