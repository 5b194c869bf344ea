"""Scoring, reports that resume, and generation from a real (random) model."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

from qlora_lib.data.gsm8k import PROMPT, parse_gold
from qlora_lib.data.sources import load_minigsm
from qlora_lib.evaluation.evaluate import EvalReport, evaluate, few_shot
from qlora_lib.evaluation.votes import with_scores
from qlora_lib.generation.generate import Completion, Decoding, Generator, generator
from qlora_lib.lora.inject import inject_lora
from qlora_lib.models.fingerprint import fingerprint
from tests.support.small_models import PAIRS, small_model, small_tokenizer

PROBLEMS = load_minigsm("test")[:200]
PROMPTS = [prompt for prompt, _ in PAIRS]


def silent(prompts):
    return [""] * len(prompts)


def answers_in_order(entries):
    """A model that gives the answer of entries[i] to the question of PROBLEMS[i]."""
    by_prompt = {
        PROMPT.format(question=q["question"]): a["answer"] for q, a in zip(PROBLEMS, entries)
    }
    return lambda prompts: [by_prompt[p] for p in prompts]


def test_silent_questions_stay_in_the_denominator():
    know = answers_in_order(PROBLEMS)

    def half(prompts):
        return [answer if i % 2 else "" for i, answer in enumerate(know(prompts))]

    report = evaluate(half, PROBLEMS)
    assert report.strict == 0.5 == report.format_rate


def test_only_the_prompt_reaches_the_model():
    seen = []
    evaluate(lambda prompts: seen.extend(prompts) or [""] * len(prompts), PROBLEMS)
    assert seen == [PROMPT.format(question=e["question"]) for e in PROBLEMS]


def test_report_files_and_table(tmp_path):
    def model(prompts):
        return [Completion("#### 1", 3, finished=i > 0) for i, _ in enumerate(prompts)]

    shown = []
    generate = Generator(model, {"compute_dtype": "bf16"})
    report = evaluate(generate, PROBLEMS, tmp_path, callback=shown.append, chunk=50)
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert shown == report.predictions == EvalReport.load(tmp_path).predictions
    rows = list(map(json.loads, lines))
    assert list(rows[0]) == [
        "question", "prompt", "completion", "gold", "strict_answer", "flexible_answer",
        "strict", "flexible", "tokens", "finished", "seconds", "proof"]  # fmt: skip
    assert [row | {"proof": 0} for row in rows] == [p.row() | {"proof": 0} for p in shown]
    assert shown[0]["gold"] == shown[0].gold == str(parse_gold(PROBLEMS[0]["answer"]))
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["n"] == 200 and saved["strict"] == report.strict and saved["tokens"] == 600
    assert report.truncation_rate == 4 / 200  # the first of each chunk
    low, high = report.strict_interval
    table = str(report)
    assert "200 questions" in table and "bf16" in table
    assert f"[{100 * low:.1f}%, {100 * high:.1f}%]" in table


def without_hashes(path, *names):
    """As older versions wrote it."""
    kept = json.loads(path.read_text())
    for name in ("format", "sha256", *names):
        kept.pop(name, None)
    path.write_text(json.dumps(kept))


def test_reports_of_before_seconds_and_samples_were_kept_are_read(tmp_path):
    report = evaluate(answers_in_order(PROBLEMS), PROBLEMS, tmp_path)
    rows = [p.row() for p in report.predictions]
    lines = [json.dumps({k: v for k, v in row.items() if k != "seconds"}) for row in rows]
    (tmp_path / "predictions.jsonl").write_text("\n".join(lines))
    without_hashes(tmp_path / "report.json", "predictions.jsonl")
    loaded = EvalReport.load(tmp_path)
    assert loaded.strict == 1 and without_clock(loaded).predictions == without_clock(report).predictions
    assert "samples" not in rows[0] and loaded.predictions[0].samples is None


def test_empty_and_unparsable_problems_are_errors():
    with pytest.raises(ValueError, match="no problems"):
        evaluate(silent, [])
    with pytest.raises(ValueError, match="gold"):
        evaluate(lambda prompts: pytest.fail("asked"), [{"question": "q", "answer": "x"}])
    with pytest.raises(ValueError, match="prompts gave"):
        evaluate(lambda prompts: [""], PROBLEMS)


def test_a_vote_makes_one_completion_of_several():
    def model(prompts):
        return [[Completion("#### 1", 3, True), Completion("#### 2", 4, False)] for _ in prompts]

    problems = [{"question": "q", "answer": "#### 2"}]
    report = evaluate(model, problems, vote=lambda samples: samples[-1])
    assert report.strict == 1 and report.tokens == 7 and report.truncated == 1
    assert report.predictions[0]["samples"] == ["#### 1", "#### 2"]
    with pytest.raises(ValueError, match="2 samples for one prompt; give `vote`"):
        evaluate(model, problems)


# --- A killed evaluation ------------------------------------------------------------------


class Killed(Exception):
    pass


def model(kill_after=10**6, seed=0):
    """Right on every third question; `asked` collects its prompts. Killed before it answers
    more than `kill_after` chunks."""

    def ask(prompts):
        if len(generate.chunks) == kill_after:
            raise Killed
        generate.chunks.append(list(prompts))
        said = [ANSWERS[p] if len(p) % 3 == seed else "5\ud800" for p in prompts]
        return [Completion(text, 7, True) for text in said]

    info = {"model": "m", "compute_dtype": "fp32", "decoding": {"stop": ("Question:",)}}
    generate = Weighed(ask, info)
    generate.chunks, generate.weights = [], f"weights {seed}"
    return generate


class Weighed(Generator):
    def fingerprint(self):
        return self.weights


ANSWERS = {PROMPT.format(question=e["question"]): e["answer"] for e in PROBLEMS}


def without_clock(report):
    predictions = [replace(p, seconds=0.0) for p in report.predictions]
    return replace(report, seconds=0.0, predictions=predictions)


@pytest.mark.long
@pytest.mark.parametrize(
    "left, kept",
    [
        (lambda lines: lines, 90),
        (lambda lines: [*lines, '{"question": "half a li'], 90),
        (lambda lines: [*lines[:-1], lines[-1][:-10]], 60),  # its chunk is not whole
        (lambda lines: lines[:70], 60),  # sampling depends on what is asked together
        (lambda lines: [], 0),
    ],
)
def test_a_killed_evaluation_goes_on_and_gives_the_same_report(tmp_path, left, kept):
    whole = evaluate(model(), PROBLEMS, tmp_path / "whole", chunk=30)
    with pytest.raises(Killed):
        evaluate(model(kill_after=3), PROBLEMS, tmp_path / "part", chunk=30)
    answers = tmp_path / "part" / "predictions.jsonl"
    assert not (tmp_path / "part" / "report.json").exists()
    with pytest.raises(FileNotFoundError, match="when it is finished"):
        EvalReport.load(tmp_path / "part")
    lines = answers.read_text().splitlines(keepends=True)
    assert len(lines) == 90
    answers.write_text("".join(left(lines)))
    again = model()
    resumed = evaluate(again, PROBLEMS, tmp_path / "part", chunk=30)
    assert sum(again.chunks, []) == list(ANSWERS)[kept:]
    assert without_clock(resumed) == without_clock(whole)
    assert 0 < whole.strict < 1
    loaded = EvalReport.load(tmp_path / "part")
    assert loaded.strict_correct == whole.strict_correct and loaded.n == 200
    assert [p["completion"] for p in loaded.predictions] == [
        p["completion"] for p in whole.predictions
    ]
    assert resumed.seconds == sum(p["seconds"] for p in loaded.predictions)


def test_a_question_that_is_too_long_is_found_before_the_first_is_asked(tmp_path, monkeypatch):
    asked = []
    counted = generator(small_model(), small_tokenizer(), Decoding(max_new_tokens=2))
    monkeypatch.setattr(type(counted), "__call__", lambda self, prompts: asked.append(prompts))
    problems = [{"question": question, "answer": "#### 1"} for question in ("1?", "2 " * 300)]
    scored = with_scores(counted, lambda prompts, said: [1.0] * len(said), "one")
    for ask in (counted, scored):
        with pytest.raises(ValueError, match="exceed the context of 256: 'Question: 2 2"):
            evaluate(ask, problems, tmp_path / "eval", chunk=1)
    assert asked == [] and not (tmp_path / "eval").exists()


@pytest.mark.parametrize("batch, chunk", [(None, 128), (32, 128), (100, 100), (60, 120), (300, 300)])
def test_a_chunk_is_whole_batches_of_the_generator(batch, chunk):
    ask = model()
    if batch:
        ask.info["decoding"]["batch_size"] = batch
    report = evaluate(ask, PROBLEMS)
    assert report.info["chunk"] == chunk and len(ask.chunks[0]) == min(chunk, 200)


def test_a_finished_evaluation_asks_nothing_again(tmp_path):
    evaluate(model(), PROBLEMS[:50], tmp_path, chunk=30)
    again = model()
    assert evaluate(again, PROBLEMS[:50], tmp_path, chunk=30).n == 50
    assert not again.chunks


@pytest.mark.long
@pytest.mark.parametrize(
    "name, change",
    [
        ("weights", lambda: (model(seed=1), PROBLEMS[:50], {})),
        ("problems_hash", lambda: (model(), PROBLEMS[:49], {})),
        ("problems_hash", lambda: (model(), [*PROBLEMS[1:50], PROBLEMS[0]], {})),
        ("prompts_hash", lambda: (model(), PROBLEMS[:50], {"prompt": few_shot(PAIR, 1)})),
        ("chunk", lambda: (model(), PROBLEMS[:50], {"chunk": 25})),
        ("vote", lambda: (model(), PROBLEMS[:50], {"vote": max})),
        ("decoding", lambda: (hotter(), PROBLEMS[:50], {})),
    ],
)
def test_a_folder_of_other_settings_is_refused_by_name(tmp_path, name, change):
    evaluate(model(), PROBLEMS[:50], tmp_path)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    generate, problems, options = change()
    with pytest.raises(ValueError, match=f"other settings .*{name} was .*, is .*restart"):
        evaluate(generate, problems, tmp_path, **options)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
    if name == "weights":
        report = evaluate(generate, problems, tmp_path, restart=True, **options)
        assert report.info["weights"] == "weights 1" and len(generate.chunks) == 1


PAIR = load_minigsm("train")[:1]


def hotter():
    generate = model()
    generate.info["decoding"] = {"temperature": 1.0}
    return generate


def test_predictions_of_unknown_settings_are_refused(tmp_path):
    (tmp_path / "predictions.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="without settings.json"):
        evaluate(silent, PROBLEMS, tmp_path)


def test_a_fingerprint_is_of_the_content():
    same = fingerprint(small_model())
    assert same == fingerprint(small_model()) != fingerprint(small_model(seed=1))
    changed = small_model()
    with torch.no_grad():
        changed.model.norm.weight[3] += 1e-3
    assert fingerprint(changed) != same
    assert fingerprint(small_model().bfloat16()) != same
    adapted = [small_model(), small_model()]
    for alpha, one in zip((8, 16), adapted):
        torch.manual_seed(0)
        inject_lora(one, ("q_proj",), rank=2, alpha=alpha)
    prints = [same, *map(fingerprint, adapted)]  # alpha stands in no tensor
    assert len(set(prints)) == 3


def test_reports_name_model_and_hashes(tmp_path):
    net, tokenizer = small_model(), small_tokenizer()
    generate = generator(net, tokenizer, Decoding(max_new_tokens=2))
    problems = [{"question": "Ava has 2?", "answer": "#### 2"}]
    info = evaluate(generate, problems, tmp_path).info
    assert info["weights"] == fingerprint(net) and "revision" in info
    assert info["decoding"]["temperature"] == 0 and len(info["problems_hash"]) == 64
    assert info == json.loads((tmp_path / "report.json").read_text())["info"] | {
        "decoding": info["decoding"]
    }
    assert "weights" not in evaluate(generate, problems).info  # nothing is hashed for no folder


# --- Prompts and generation ---------------------------------------------------------------


def test_few_shot():
    shots = load_minigsm("train")[:5]
    prompt, target = few_shot(shots, 3)(PROBLEMS[0])
    assert prompt.count("Question:") == 4 and prompt.count("####") == 3 and "<<" not in prompt
    assert prompt.endswith(PROMPT.format(question=PROBLEMS[0]["question"]))
    assert few_shot(shots, 0)(PROBLEMS[0])[0] == PROMPT.format(question=PROBLEMS[0]["question"])
    with pytest.raises(ValueError, match="k=6"):
        few_shot(shots, 6)


def test_a_batch_gives_the_completions_of_single_prompts_in_order():
    model, tokenizer = small_model(), small_tokenizer()
    many = generator(model, tokenizer, Decoding(max_new_tokens=12, batch_size=5))(PROMPTS)
    one = generator(model, tokenizer, Decoding(max_new_tokens=12, batch_size=1))
    assert many == [one([p])[0] for p in PROMPTS]
    assert len({len(tokenizer.encode(p)) for p in PROMPTS}) > 1 and len(set(many)) > 5


def test_completion_equals_a_plain_greedy_loop():
    model, tokenizer = small_model(), small_tokenizer()
    ids = [1, *tokenizer.encode(PROMPTS[1], add_special_tokens=False)]
    new = []
    for _ in range(12):
        new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    (completion,) = generator(model, tokenizer, Decoding(max_new_tokens=12))(PROMPTS[1:2])
    assert 2 not in new and completion == tokenizer.decode(new)
    assert completion.tokens == 12 and not completion.finished


def test_end_token_and_stop_string_end_a_completion():
    model, tokenizer = small_model(), small_tokenizer()
    plain = generator(model, tokenizer, Decoding(max_new_tokens=8))(PROMPTS[:1])[0]
    stop = plain[3:5]
    (cut,) = generator(model, tokenizer, Decoding(max_new_tokens=8, stop=(stop,)))(PROMPTS[:1])
    assert cut == plain[: plain.index(stop)] and cut.finished
    first = int(model(torch.tensor([[1, *tokenizer.encode(PROMPTS[0])]])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [first, 2]  # a chat model has several end tokens
    (ended,) = generator(model, tokenizer, Decoding(max_new_tokens=8))(PROMPTS[:1])
    assert ended == "" and ended.tokens == 1 and ended.finished


def test_checkpoints_own_sampling_settings_are_ignored(caplog):
    model, tokenizer = small_model(), small_tokenizer()
    greedy = generator(model, tokenizer, Decoding(max_new_tokens=8))
    expected = greedy(PROMPTS[:3])
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.3}
    for name, value in (own | {"max_length": 20}).items():
        setattr(model.generation_config, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert greedy(PROMPTS[:3]) == expected
    assert not caplog.records
    assert model.generation_config.temperature == 0.6 and model.generation_config.max_length == 20


def test_sampling_is_seeded_and_leaves_the_global_generator_alone():
    model, tokenizer = small_model(), small_tokenizer()

    def sample(seed):
        decoding = Decoding(temperature=1.0, top_p=0.9, samples=3, seed=seed, max_new_tokens=6)
        return generator(model, tokenizer, decoding)(PROMPTS[:4])

    state = torch.get_rng_state()
    first = sample(0)
    assert torch.equal(state, torch.get_rng_state())
    assert first == sample(0) != sample(1)
    assert len(first) == 4 and all(len(completions) == 3 for completions in first)
    with pytest.raises(ValueError, match="temperature"):
        Decoding(samples=3)


def test_mode_is_restored_and_dtype_named():
    model, tokenizer = small_model().train(), small_tokenizer()
    generate = generator(model, tokenizer, Decoding(max_new_tokens=2))
    generate(PROMPTS[:2])
    assert model.training and generate.info["compute_dtype"] == "fp32"
    generate = generator(model.bfloat16(), tokenizer, Decoding(max_new_tokens=2))
    assert len(generate(PROMPTS[:2])) == 2 and generate.info["compute_dtype"] == "bf16"


def test_prompt_that_fills_the_context_is_an_error():
    generate = generator(small_model(), small_tokenizer(), Decoding(max_new_tokens=10))
    with pytest.raises(ValueError, match="context of 256"):
        generate(["Ava " * 300])


def test_a_long_evaluation_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr("qlora_lib.base.progress.EVERY", 0.0)  # as if a chunk took a minute
    n = len(PROBLEMS)
    evaluate(lambda asked: ["#### 1"] * len(asked), PROBLEMS, chunk=n - 1, canaries=False)
    lines = [line for line in capsys.readouterr().err.splitlines() if "questions" in line]
    assert lines[0].startswith(f"evaluating: {n - 1} of {n} questions, ") and len(lines) == 2
    assert " right, " in lines[0] and "tokens/s" in lines[0] and lines[0].endswith(" left")


# --- What a folder proves ---------------------------------------------------------------------


def double(lines):
    return lines + lines[:8]


def reorder(lines):
    return [lines[1], lines[0], *lines[2:]]


def edit(lines):
    return [lines[0].replace('"finished": true', '"finished": false'), *lines[1:]]


def better(lines):
    return [line.replace('"strict": false', '"strict": true') for line in lines]


@pytest.mark.parametrize("change", [double, reorder, edit, better])
def test_answers_that_were_changed_are_not_counted(tmp_path, change):
    evaluate(model(), PROBLEMS[:24], tmp_path, chunk=8)
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    for read in (
        lambda: EvalReport.load(tmp_path),
        lambda: evaluate(model(), PROBLEMS[:24], tmp_path, chunk=8),
    ):
        with pytest.raises(ValueError, match="predictions.jsonl"):
            read()


@pytest.mark.long
def test_a_folder_of_an_older_version_is_read_with_its_verdicts_made_anew(tmp_path):
    whole = evaluate(model(), PROBLEMS[:24], tmp_path, chunk=8)
    path = tmp_path / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["proof"]
        row["strict"] = True  # by another rule, or by another hand
    for name in ("report.json", "settings.json"):
        without_hashes(tmp_path / name, "predictions.jsonl", "proof")

    def write(rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(rows)
    assert EvalReport.load(tmp_path).strict == whole.strict < 1
    again = evaluate(model(), PROBLEMS[:24], tmp_path, chunk=8)
    assert without_clock(again) == without_clock(whole)
    assert EvalReport.load(tmp_path).strict == whole.strict
    write(rows[:16])  # killed then, resumed now
    again = evaluate(model(), PROBLEMS[:24], tmp_path, chunk=8)
    assert without_clock(again) == without_clock(whole)
    assert without_clock(EvalReport.load(tmp_path)).predictions == without_clock(whole).predictions
    for changed in (rows + rows[:8], [rows[1], rows[0], *rows[2:]], 8 * [{"question": 3}], 8 * [[]]):
        write(changed)
        with pytest.raises(ValueError, match="predictions.jsonl, line"):
            evaluate(model(), PROBLEMS[:24], tmp_path, chunk=8)


@pytest.mark.long
@pytest.mark.parametrize("name", ["settings.json", "predictions.jsonl", "report.json"])
def test_flipped_bits_in_an_evaluation_never_change_what_is_counted(tmp_path, name):
    folder = tmp_path / "eval"
    whole = without_clock(evaluate(model(), PROBLEMS[:8], folder, chunk=4))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for at in range(0, len(before[name]), len(before[name]) // 40):
        for file, content in before.items():
            (folder / file).write_bytes(content)
        byte = bytes([before[name][at] ^ 1 << at % 8])
        (folder / name).write_bytes(before[name][:at] + byte + before[name][at + 1 :])
        for read in (EvalReport.load, lambda f: evaluate(model(), PROBLEMS[:8], f, chunk=4)):
            try:
                found = without_clock(read(folder))
            except ValueError as error:
                assert name in str(error)
            else:
                assert found.predictions == whole.predictions


@pytest.mark.parametrize("chunk", [0, -1, 2.5, "8"])
def test_a_chunk_is_a_whole_number(chunk):
    with pytest.raises(ValueError, match="chunk"):
        evaluate(silent, PROBLEMS[:4], chunk=chunk)
