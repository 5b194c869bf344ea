"""A run as a folder that others serve; the command's own tests take it whole."""

from types import SimpleNamespace

from qlora_lib.runs.export import golden_questions


def test_questions_of_a_contract_where_the_problems_are_not_here(capsys):
    def gone(split):
        raise FileNotFoundError("no GSM8K here\nmore")

    asked = golden_questions(SimpleNamespace(examples=gone))
    assert len(set(asked)) == 20 and "the contract asks sums" in capsys.readouterr().out
