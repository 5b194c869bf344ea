"""A folder with a model, data and an adapter, and the options that name them."""

import json

import pytest


@pytest.fixture
def argv(tmp_path, monkeypatch, short_answers):
    from tests.support.small_models import small_model, small_tokenizer  # they import Triton:
    from tests.support.trained_adapter import make_adapter  # see the root's conftest

    monkeypatch.chdir(tmp_path)
    small_model().save_pretrained("model")
    small_tokenizer().save_pretrained("model")
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) for i in range(6)]
    for split in ("train", "dev", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    make_adapter(tmp_path / "adapter", seed=1)
    return ["--model", "model", "--data", "data", "--out", "table.json", "--adapter", "adapter"]
