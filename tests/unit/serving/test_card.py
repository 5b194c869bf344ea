"""README.md and Modelfile of an exported folder."""

import pytest

from qlora_lib.data.gsm8k import PROMPT
from qlora_lib.evaluation.evaluate import evaluate
from qlora_lib.generation.generate import Completion, Generator
from qlora_lib.serving.card import licence_of, write_card, write_modelfile

CONTRACT = {"golden": [1, 2], "stop_tokens": {"</s>": 2}, "stop": ["Question:"],
            "max_new_tokens": 64}  # fmt: skip
ABOUT = {"base model": "some/model", "licence": "apache-2.0", "method": "gptq"}


def test_the_modelfile(tmp_path):
    write_modelfile(tmp_path, CONTRACT, PROMPT, 1024)
    text = (tmp_path / "Modelfile").read_text()
    assert text.startswith("FROM ./base.gguf\nTEMPLATE ")
    assert '"""Question: {{ .Prompt }}\nAnswer:\n"""' in text
    assert 'PARAMETER stop "</s>"\nPARAMETER stop "Question:"' in text
    assert "PARAMETER num_ctx 1024\nPARAMETER num_predict 64" in text
    (tmp_path / "adapter.gguf").touch()
    write_modelfile(tmp_path, CONTRACT, None, 1024)
    text = (tmp_path / "Modelfile").read_text()
    assert "ADAPTER ./adapter.gguf" in text and "TEMPLATE" not in text


def test_the_card_says_what_was_measured_with_its_interval(tmp_path):
    problems = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(4)]

    def answer(prompts):
        return [Completion("#### 1", 2, True) for _ in prompts]

    report = tmp_path / "report"
    evaluate(Generator(answer, {"compute_dtype": "fp32"}), problems, report, canaries=False)
    write_card(tmp_path, ABOUT, CONTRACT, report)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith('---\nbase_model: "some/model"\nlicense: "apache-2.0"\n')
    assert "25.0% of 4 problems (95% interval 4.6% to 69.9%), greedy, fp32, by a report" in text
    assert "| method | gptq |" in text and "holds 2 questions" in text


@pytest.mark.parametrize("gguf", [True, False])
def test_a_card_of_nothing_measured(gguf, tmp_path):
    if gguf:
        (tmp_path / "base.gguf").touch()
    write_card(tmp_path, ABOUT | {"licence": ""}, CONTRACT, None)
    text = (tmp_path / "README.md").read_text()
    assert "Nothing was measured of these weights." in text and 'license: "other"' in text
    assert f'library_name: "{"llama.cpp" if gguf else "transformers"}"' in text
    assert "| licence | not named there" in text


def test_the_licence_of_a_base(tmp_path):
    assert licence_of("hub/name") is None and licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("# no head\nlicense: none\n")
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: 'mit'\n---\n# A\n")
    assert licence_of(str(tmp_path)) == "mit"
