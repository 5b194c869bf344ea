"""A folder of files that no command and no call should accept, and a good model and problems."""

import json
import os
import shutil
from pathlib import Path

from qlora_lib.serving.contract import write_contract
from tests.support.small_models import small_model, small_tokenizer

ROW = '{"question": "1 + 1?", "answer": "1+1=2\\n#### 2"}\n'
DEEP = b'{"a":' * 100_000
ROWS = {  # of files that should have a problem a line
    "empty": b"", "blank": b"\n \n", "number": b"5\n", "null": b"null\n", "list": b"[]\n",
    "numbers": b"[1, 2]\n", "deep": DEEP, "deep_list": b"[" * 100_000, "half": ROW[:20].encode(),
    "latin1": ROW.replace("1?", "caf\xe9?").encode("latin-1"), "utf16": ROW.encode("utf-16"),
    "zeros": bytes(1000), "no_answer": b'{"question": "1 + 1?"}\n', "other_keys": b'{"a": 1}\n',
    "null_answer": b'{"question": "1 + 1?", "answer": null}\n',
    "number_answer": b'{"question": "1 + 1?", "answer": 2}\n',
    "empty_question": b'{"question": "", "answer": "#### 2"}\n',
    "list_question": b'{"question": ["1 + 1?"], "answer": "#### 2"}\n',
    "surrogate": b'{"question": "\\ud800 1 + 1?", "answer": "#### 2"}\n',
    "key_twice": b'{"question": "1?", "question": "2?", "answer": "#### 2"}\n',
    "second_half": (ROW + ROW[:-3]).encode(),
    "long_line": json.dumps({"question": "1 " * 2_500_000, "answer": "#### 2"}).encode(),
}  # fmt: skip
GOLDS = {  # good to train on, but not to be asked
    "no_gold": b'{"question": "1 + 1?", "answer": "two"}\n',
    "gold_text": b'{"question": "1 + 1?", "answer": "#### two"}\n',
    "gold_nan": b'{"question": "1 + 1?", "answer": "#### nan"}\n',
}
TRAINED_ON = {  # rows of other formats to train on
    "no_turns": b'{"messages": []}\n', "turns_text": b'{"messages": "hello"}\n',
    "turns_numbers": b'{"messages": [1, 2]}\n', "no_template": json.dumps({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}).encode(),
    "strange_role": b'{"messages": [{"role": "robot", "content": "a"}]}\n',
    "text_number": b'{"text": 5}\n', "text_blank": b'{"text": "  "}\n',
    "null_completion": b'{"prompt": "a", "completion": null}\n',
    "list_prompt": b'{"prompt": ["a"], "completion": "b"}\n',
}  # fmt: skip
OBJECTS = {  # of files that should hold an object of JSON
    "list": b"[]", "five": b"5", "null": b"null", "nothing": b"", "half": b'{"a": ', "deep": DEEP,
    "latin1": b'{"a": "\xff\xfe"}', "zeros": b"\0\0\0", "object": b"{}",
    "twice": b'{"a": 1, "a": 2}',
}  # fmt: skip
CONFIGS = {  # changes of a model's config.json
    "negative_width": {"hidden_size": -64}, "no_width": {"hidden_size": 0},
    "text_width": {"hidden_size": "many"}, "list_width": {"hidden_size": [64]},
    "half_width": {"hidden_size": 64.5}, "huge_width": {"hidden_size": 10**9},
    "billion_blocks": {"num_hidden_layers": 10**9}, "text_blocks": {"num_hidden_layers": "2"},
    "negative_blocks": {"num_hidden_layers": -1}, "no_heads": {"num_attention_heads": 0},
    "negative_words": {"vocab_size": -1}, "unknown_type": {"model_type": "nothing"},
    "no_type": {"model_type": None}, "list_type": {"model_type": ["llama"]},
}  # fmt: skip
RUNS = {
    "path_up": b'{"method": "rtn", "path": "../../x", "trained": "qlora"}',
    "path_five": b'{"method": "rtn", "path": 5, "trained": "qlora"}',
    "path_absolute": b'{"method": "rtn", "path": "/etc", "trained": "qlora"}',
    "trained_so": b'{"method": "rtn", "path": "adapter", "trained": "nothing"}', **OBJECTS,
}  # fmt: skip


def make_place(folder: Path) -> None:
    """Write the files that the inputs name."""
    model = folder / "model"
    small_model(layers=1).save_pretrained(model)
    small_tokenizer().save_pretrained(model)
    (folder / "data").mkdir()
    for split in ("train", "dev", "test"):
        (folder / "data" / f"{split}.jsonl").write_text(ROW * 3)
    for name, content in (ROWS | GOLDS | TRAINED_ON).items():
        (folder / f"{name}.jsonl").write_bytes(content)
        shutil.copytree(folder / "data", folder / f"ask_{name}")
        (folder / f"ask_{name}" / "test.jsonl").write_bytes(content)
    config = json.loads((model / "config.json").read_text())
    configs = {name: json.dumps(config | changes).encode() for name, changes in CONFIGS.items()}
    for name, content in (configs | OBJECTS).items():
        shutil.copytree(model, folder / f"config_{name}")
        (folder / f"config_{name}" / "config.json").write_bytes(content)
    for name, content in OBJECTS.items():
        for file in ("tokenizer", "tokenizer_config"):
            shutil.copytree(model, folder / f"{file}_{name}")
            (folder / f"{file}_{name}" / f"{file}.json").write_bytes(content)
        for file in ("recipe", "quantization"):
            shutil.copytree(model, folder / f"{file}_{name}" / "base")
            (folder / f"{file}_{name}" / "base" / f"{file}.json").write_bytes(content)
        (folder / f"report_{name}").mkdir()
        (folder / f"report_{name}" / "report.json").write_bytes(content)
        (folder / f"report_{name}" / "predictions.jsonl").touch()
        (folder / f"contract_{name}").mkdir()
        (folder / f"contract_{name}" / "contract.json").write_bytes(content)
        (folder / f"adapter_{name}").mkdir()
        (folder / f"adapter_{name}" / "adapter_config.json").write_bytes(content)
    for name, content in RUNS.items():
        shutil.copytree(model, folder / f"run_{name}" / "base")
        (folder / f"run_{name}" / "run.json").write_bytes(content)
    shutil.copytree(model, folder / "no_weights")
    (folder / "no_weights" / "model.safetensors").unlink()
    shutil.copytree(model, folder / "cut_weights")
    os.truncate(folder / "cut_weights" / "model.safetensors", 1000)
    (folder / "contract").mkdir()  # of no model
    asked = {"golden": [{"ids": [1]}], "stop": [], "max_new_tokens": 1, "template": None}
    write_contract(asked, folder / "contract")
    (folder / "empty_folder").mkdir()
    (folder / "folder.jsonl").mkdir()
    (folder / "foreign").mkdir()
    (folder / "foreign" / "mine.txt").write_text("mine")
    (folder / "file").write_text("a file")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "fifo")
