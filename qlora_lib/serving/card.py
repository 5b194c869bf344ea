"""What stands beside exported weights for people and for Ollama: README.md and Modelfile."""

import json
from pathlib import Path

from ..base.files import read_text
from ..base.hashes import file_hash
from ..evaluation.evaluate import REPORT, EvalReport
from ..formats.compressed_tensors import MARKER, METHOD
from ..models.gguf_folder import ADAPTER, BASE
from .contract import CONTRACT

CARD, MODELFILE = "README.md", "Modelfile"


def write_modelfile(folder: Path, contract: dict, template: str | None, context: int) -> None:
    """Write Ollama's Modelfile: files, template, stop tokens, greedy decoding. template: a text
    with one {question}; None: Ollama takes the chat template that is in the file."""
    stops = [*contract["stop_tokens"], *contract["stop"]]
    lines = [f"FROM ./{BASE}"]
    lines += [f"ADAPTER ./{ADAPTER}"] if (folder / ADAPTER).is_file() else []
    if template is not None:
        lines.append('TEMPLATE """' + template.replace("{question}", "{{ .Prompt }}") + '"""')
    lines += [f"PARAMETER stop {json.dumps(stop)}" for stop in stops]
    lines += ["PARAMETER temperature 0", f"PARAMETER num_ctx {context}",
              f"PARAMETER num_predict {contract['max_new_tokens']}"]  # fmt: skip
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_card(folder: Path, about: dict[str, str], contract: dict, report: Path | None) -> None:
    """Write README.md as the hub reads it: what it was made of, and what it scored.

    about: what the lines say, "base model" and "licence" among them. report: the folder of an
    evaluation of this very model; None: the card says that nothing was measured."""
    kinds = ((BASE, "gguf"), (MARKER, METHOD), ("", "gptq"))
    kind = next(kind for file, kind in kinds if (folder / file).exists())
    head = {
        "base_model": about["base model"], "license": about["licence"] or "other",
        "library_name": "llama.cpp" if kind == "gguf" else "transformers",
        "pipeline_tag": "text-generation", "tags": [kind, "qlora_lib"],
    }  # fmt: skip
    rows = {**about, "licence": about["licence"] or "not named there; look it up before sharing"}
    text = "---\n" + "".join(f"{k}: {json.dumps(v)}\n" for k, v in head.items()) + "---\n\n"
    text += f"# {about['base model']} in {kind if kind == METHOD else kind.upper()}\n\n| | |\n|---|---|\n"
    text += "".join(f"| {name} | {said} |\n" for name, said in rows.items())
    text += "\n" + (_scores(report) if report else "Nothing was measured of these weights.\n")
    text += (f"\n{CONTRACT} holds {len(contract['golden'])} questions with the answers of the model"
             " that was measured. `python -m qlora_lib verify FOLDER` asks what serves these files "
             "the same, and names the cause where it answers otherwise.\n")  # fmt: skip
    (folder / CARD).write_text(text, encoding="utf-8")


def _scores(report: Path) -> str:
    found = EvalReport.load(report)
    low, high = found.strict_interval
    return (f"Exact match: {found.strict:.1%} of {found.n} problems (95% interval {low:.1%} to "
            f"{high:.1%}), greedy, {found.info.get('compute_dtype')}, by a report with SHA-256 "
            f"{file_hash(report / REPORT)}.\n")  # fmt: skip


def licence_of(model: str) -> str | None:
    """The licence that a model's folder names in the head of its README.md; None for none."""
    readme = Path(model) / CARD
    head = read_text(readme).split("---") if readme.is_file() else []
    lines = head[1].splitlines() if len(head) > 2 and not head[0].strip() else []
    said = (line.partition(":") for line in lines)
    return next((v.strip().strip("\"'") for k, _, v in said if k == "license"), None)
