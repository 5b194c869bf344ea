"""The training loop: gradients, accumulation, schedules, checkpoints, resuming."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from qlora_lib.base.devices import DTYPES
from qlora_lib.base.lock import held
from qlora_lib.data.tokens import encode_example
from qlora_lib.generation.generate import Decoding, generator
from qlora_lib.lora.inject import inject_lora, trainable_parameters, use_adapter
from qlora_lib.lora.layer import lora_layers
from qlora_lib.lora.targets import ALL_LINEAR
from qlora_lib.models.quantize import quantize_model
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.train import adam8bit, step
from qlora_lib.train.config import TrainConfig, epoch_order, learning_rate, schedule
from qlora_lib.train.finetune import finetune, validation_loss
from qlora_lib.train.snapshots import load_best, load_parameters
from tests.support.small_models import PAIRS, small_model, small_tokenizer


def adapted(quantized: bool = False, dropout: float = 0.0):
    model = small_model()
    if quantized:
        quantize_model(model, None, QuantSpec(group_size=32, clip_search=False), "rtn")
    inject_lora(model, ALL_LINEAR, rank=4, alpha=8, dropout=dropout)
    return model


def config(**changes) -> TrainConfig:
    settings = {"max_steps": 6, "batch_size": 4, "lr": 1e-2, "compute_dtype": "fp32"}
    return TrainConfig(**(settings | changes))


def run(model, settings, **options):
    return finetune(model, small_tokenizer(), PAIRS, settings, **options)


def weights(model):
    return {n: p.detach().clone() for n, p in trainable_parameters(model).items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.long
@pytest.mark.parametrize("quantized", [False, True])
def test_loss_falls_and_only_adapters_move(quantized):
    model = adapted(quantized)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    history = run(model, config(max_steps=20, batch_size=8))
    assert history.losses[-1] < 0.7 * history.losses[0]
    assert history.compute_dtype == "fp32" and "fp32" in str(history)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("lora_" not in name), name
    for name, parameter in model.named_parameters():
        assert "lora_" in name or (not parameter.requires_grad and parameter.grad is None), name
    assert not model.training


@pytest.mark.parametrize("quantized", [False, True])
def test_checkpointing_changes_no_gradient(quantized, monkeypatch):
    calls = []
    monkeypatch.setattr(step, "checkpoint", lambda *a, **k: calls.append(k) or checkpoint(*a, **k))
    plain, checkpointed = adapted(quantized), adapted(quantized)
    one = run(plain, config(max_steps=2))
    two = run(checkpointed, config(max_steps=2, gradient_checkpointing=True))
    assert len(calls) == 2 * 2 and one.losses == pytest.approx(two.losses, rel=1e-6)
    grads = {n: p.grad for n, p in trainable_parameters(checkpointed).items()}
    assert len(grads) == 2 * 2 * 7
    for name, p in trainable_parameters(plain).items():
        assert grads[name].abs().sum() > 0, name  # every lora_B, and after a step every lora_A
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-7)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in checkpointed.modules())


def test_checkpointing_keeps_the_adapter_that_was_chosen_before_training():
    """In autograd's own thread, as on CUDA, where no context variable is seen."""
    model = adapted()
    inject_lora(model, ALL_LINEAR, rank=2, adapter="second")
    ids = torch.arange(3, 30).unsqueeze(0)
    with use_adapter(model, "second"), step.training_mode(model, True):
        loss = model(ids, labels=ids).loss
        thread = Thread(target=loss.backward)
        thread.start()
        thread.join()
    trained = [n for n, p in trainable_parameters(model).items() if p.grad is not None]
    assert len(trained) == 2 * 2 * 7 and all(n.endswith(".second") for n in trained)


def test_accumulated_batches_equal_one_large_batch():
    lengths = {len(encode_example(small_tokenizer(), *pair).input_ids) for pair in PAIRS}
    assert len(lengths) > 3
    whole, parts = adapted(), adapted()
    one = run(whole, config(max_steps=3, batch_size=8, lr=1e-3))
    two = run(parts, config(max_steps=3, batch_size=4, accumulation=2, lr=1e-3))
    assert one.losses == pytest.approx(two.losses, rel=1e-5)
    expected = trainable_parameters(whole)
    for name, p in trainable_parameters(parts).items():
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-3, atol=1e-6)


def test_full_fine_tuning():
    model = small_model()
    before = model.state_dict()["model.embed_tokens.weight"].clone()
    history = run(model, config(max_steps=10, lr=1e-3))
    assert history.losses[-1] < history.losses[0]
    assert history.trained_parameters == sum(p.numel() for p in model.parameters())
    assert not torch.equal(before, model.state_dict()["model.embed_tokens.weight"])


class Killed(Exception):
    pass


def kill_at(step):
    def callback(metrics):
        if metrics["step"] == step:
            raise Killed

    return callback


@pytest.mark.long
@pytest.mark.parametrize("killed, optimizer", [(3, "adam8bit"), (5, "adamw")])
def test_resumed_run_equals_the_uninterrupted_one_to_the_bit(
    tmp_path, killed, optimizer, monkeypatch
):
    monkeypatch.setattr(adam8bit, "SMALLEST", 256)  # 8 bits, though the adapters are small
    settings = {"max_steps": 8, "batch_size": 4, "accumulation": 2, "save_every": 2}
    settings |= {"eval_every": 3, "weight_decay": 0.01, "optimizer": optimizer}
    whole = adapted(quantized=True, dropout=0.2)
    expected = run(whole, config(folder=tmp_path / "a", **settings), dev=PAIRS[:5])
    model, folder = adapted(quantized=True, dropout=0.2), tmp_path / "b"
    with pytest.raises(Killed):
        run(model, config(folder=folder, **settings), dev=PAIRS[:5], callback=kill_at(killed))
    fresh = adapted(quantized=True, dropout=0.2)
    torch.manual_seed(123)  # whatever state a new process is in
    history = run(fresh, config(folder=folder, resume=True, **settings), dev=PAIRS[:5])
    assert history.resumed_from == killed - 1
    assert history.losses == expected.losses and history.dev == expected.dev
    assert equal(weights(fresh), weights(whole))
    states = [load_file(tmp_path / name / "last.safetensors") for name in ("a", "b")]
    assert equal(*states)
    dtypes = {t.dtype for n, t in states[0].items() if n.startswith("exp_avg/")}
    assert (torch.uint8 in dtypes) == (optimizer == "adam8bit")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))
    # A finished run resumes to itself.
    again = run(adapted(True, 0.2), config(folder=folder, resume=True, **settings), dev=PAIRS[:5])
    assert again.losses == expected.losses


def test_resume_refuses_another_run_and_damaged_files(tmp_path):
    run(adapted(), config(folder=tmp_path))
    with pytest.raises(ValueError, match="lr was 0.01, is 0.02"):
        run(adapted(), config(folder=tmp_path, resume=True, lr=0.02))
    with pytest.raises(ValueError, match="examples"):
        finetune(
            adapted(), small_tokenizer(), PAIRS[:8], config(folder=tmp_path, resume=True)
        )
    other = small_model()
    inject_lora(other, rank=2)
    with pytest.raises(ValueError, match="rank of adapter 'default' was 4, is 2"):
        run(other, config(folder=tmp_path, resume=True))
    with pytest.raises(ValueError, match="other parameters"):
        load_parameters(tmp_path / "last.safetensors", trainable_parameters(other))
    (tmp_path / "metrics.jsonl").write_text("")  # for readers: the checkpoint holds what counts
    assert run(adapted(), config(folder=tmp_path, resume=True)).resumed_from == 6
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    path = tmp_path / "last.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        run(adapted(), config(folder=tmp_path, resume=True))
    assert run(adapted(), config(folder=tmp_path)).resumed_from == 0  # and anew without resume
    with pytest.raises(ValueError, match="folder"):
        TrainConfig(resume=True)


@pytest.mark.long
@pytest.mark.parametrize(
    "bits, lora, message",
    [
        (4, {"alpha": 80}, "alpha of adapter 'default' was 8, is 80"),
        (4, {"use_rslora": True}, "use_rslora of adapter 'default' was False, is True"),
        (4, {"dropout": 0.5}, "dropout of adapter 'default' was 0.0, is 0.5"),
        (2, {}, "base was "),
    ],
)
def test_resume_refuses_an_adapter_or_a_base_made_otherwise(tmp_path, bits, lora, message):
    def made(bits=4, **lora):
        model = small_model()
        quantize_model(model, None, QuantSpec(bits, 32, clip_search=False), "rtn")
        inject_lora(model, ALL_LINEAR, **{"rank": 4, "alpha": 8} | lora)
        return model

    run(made(), config(folder=tmp_path, max_steps=2))
    again = config(folder=tmp_path, max_steps=2, resume=True)
    with pytest.raises(ValueError, match=f"belongs to another run: {message}"):
        run(made(bits, **lora), again)
    assert run(made(), again).resumed_from == 2


def test_best_checkpoint_is_the_lowest_dev_loss(tmp_path):
    model, dev = adapted(), [("Question: 9?\nAnswer:\n", "something else\n#### 7")]
    settings = config(max_steps=12, eval_every=2, lr=5e-2, folder=tmp_path)
    history = run(model, settings, dev=dev)
    step, loss = history.best
    assert loss == min(value for _, value in history.dev) and [s for s, _ in history.dev][0] == 2
    best = load_parameters(tmp_path / "best.safetensors", trainable_parameters(model))
    assert best["step"] == step
    assert validation_loss(model, small_tokenizer(), dev, settings) == pytest.approx(loss, rel=1e-6)
    saved = load_file(tmp_path / "last.safetensors")
    kinds = {name.partition("/")[0] for name in saved}
    assert kinds == {"parameter", "exp_avg", "exp_avg_sq", "step"}


def test_validation_loss_is_weighted_by_tokens():
    model, tokenizer = small_model(), small_tokenizer()
    pairs = [("Question: 1?\nAnswer:\n", "#### 1"), ("Question: 2?\nAnswer:\n", "apples " * 30)]
    total = count = 0
    for pair in pairs:
        ids, labels = map(torch.tensor, encode_example(tokenizer, *pair, 512))
        n = int((labels != -100).sum())
        total += model(input_ids=ids[None], labels=labels[None]).loss.item() * n
        count += n
    for size in (1, 2):
        loss = validation_loss(model, tokenizer, pairs, config(batch_size=size))
        assert loss == pytest.approx(total / count, rel=1e-5)


def test_metrics_lines_and_callback(tmp_path):
    seen = []
    history = run(adapted(), config(folder=tmp_path), callback=seen.append)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == seen == history.steps
    keys = {"step", "loss", "lr", "grad_norm", "tokens_per_second", "peak_memory", "seconds"}
    assert keys <= seen[0].keys() and seen[0]["peak_memory"] > 1e6


def test_clipping_bounds_the_gradient():
    model = adapted()
    history = run(model, config(max_steps=1, max_grad_norm=1e-3))
    norm = torch.stack([p.grad.norm() for p in trainable_parameters(model).values()]).norm()
    assert history.steps[0]["grad_norm"] > 1e-3 and norm.item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_compute_keeps_adapters_in_fp32(dtype):
    """Base weights and the outputs of all layers in 16 bits; adapters, gradients, moments not."""
    model, seen = small_model().to(DTYPES[dtype]), set()
    inject_lora(model, ALL_LINEAR, rank=4, alpha=8)
    for layer in lora_layers(model).values():
        layer.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    history = run(model, config(max_steps=8, compute_dtype=dtype))
    assert history.compute_dtype == dtype and history.losses[-1] < history.losses[0]
    assert seen == {DTYPES[dtype]} == {p.dtype for p in model.parameters() if not p.requires_grad}
    for p in trainable_parameters(model).values():
        assert p.dtype == p.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_small_steps_of_full_fine_tuning_are_not_rounded_away(dtype):
    """At this rate bf16 weights hardly move; as fp32 weights under autocast they follow fp32."""
    settings = config(max_steps=20, batch_size=8, lr=1e-5, warmup_ratio=0.0)
    model, twin = small_model().to(DTYPES[dtype]), small_model().to(DTYPES[dtype]).float()
    before = {n: p.detach().clone() for n, p in twin.named_parameters()}
    run(model, dataclasses.replace(settings, compute_dtype=dtype))
    run(twin, settings)
    losses = [validation_loss(m, small_tokenizer(), PAIRS, settings) for m in (model, twin)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    moved = sum(int((p != before[n]).sum()) for n, p in model.named_parameters())
    assert moved > 0.95 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("part", ["embed_tokens", "lm_head", "norm"])
@pytest.mark.parametrize("quantized", [False, True])
def test_what_is_trained_beside_adapters_is_fp32_too(quantized, part, checkpointing, tmp_path):
    model, tokenizer = small_model(), small_tokenizer()
    if part == "lm_head":  # a head of its own
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.to(torch.bfloat16)
    if quantized:
        quantize_model(model, None, QuantSpec(group_size=32, clip_search=False), "rtn")
    inject_lora(model, ALL_LINEAR, rank=4)
    beside = {n: p for n, p in model.named_parameters() if part in n}
    seen = set()
    for p in beside.values():
        p.requires_grad_(True)
    settings = config(compute_dtype="bf16", lr=1e-5, folder=tmp_path, max_steps=3,
                      gradient_checkpointing=checkpointing)  # fmt: skip
    with pytest.raises(ValueError, match=f"{part}.* beside frozen weights of 16 bits"):
        run(model, dataclasses.replace(settings, compute_dtype="fp32"))
    run(model, settings, dev=PAIRS[:3],
        callback=lambda _: seen.update((p.dtype, p.grad.dtype)
                                       for p in beside.values()))  # fmt: skip
    assert beside and seen == {(torch.float32, torch.float32)}
    last = load_file(tmp_path / "last.safetensors")
    for name, p in beside.items():  # in 16 bits again, as the layers that it meets
        assert last[f"parameter/{name}"].dtype == torch.float32 and p.dtype == torch.bfloat16
        assert torch.equal(last[f"parameter/{name}"].to(torch.bfloat16), p)
    assert len(generator(model, tokenizer, Decoding(max_new_tokens=2))([PAIRS[0][0]])) == 1


def test_long_training_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr("qlora_lib.base.progress.EVERY", 0.0)  # as if each step took a minute
    history = run(adapted(), config(max_steps=3))
    lines = capsys.readouterr().err.splitlines()
    first = history.steps[0]
    said = f"training: 1 of 3 steps, loss {first['loss']:.4f}, {first['tokens_per_second']:,.0f} "
    said += f"tokens/s, {first['peak_memory'] / 1e9:.1f} GB at the peak, 0:00:0"
    assert len(lines) == 3 and lines[0].startswith(said) and lines[0].endswith(" left")
    run(adapted(), config(max_steps=3, progress=False))
    assert capsys.readouterr().err == ""


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="no examples"):
        finetune(adapted(), small_tokenizer(), [], config())
    with pytest.raises(ValueError, match="inject_lora"):
        run(small_model().requires_grad_(False), config())
    with pytest.raises(ValueError, match="fills the context"):
        run(adapted(), config(max_length=8))
    with pytest.raises(ValueError, match="token id 308, but the model has embeddings of 308"):
        finetune(adapted(), small_tokenizer(), [([1, 308], [-100, 308])], config())
    with pytest.raises(ValueError, match="max_length=0: expected a whole number of at least 1"):
        TrainConfig(max_length=0)
    with pytest.raises(ValueError, match="at least 1"):
        TrainConfig(batch_size=0)
    with pytest.raises(ValueError, match="optimizer='sgd' must be one of adamw, adam8bit"):
        TrainConfig(optimizer="sgd")
    with pytest.raises(ValueError, match="lr=0: expected a number above 0"):
        TrainConfig(lr=0)


def test_diverged_loss_is_an_error_and_leaves_finite_weights():
    model = adapted()
    next(m for m in model.modules() if hasattr(m, "variance_epsilon")).weight.data[0] = math.nan
    before = weights(model)
    with pytest.raises(ValueError, match="not finite at step 1.*lower lr"):
        run(model, config())
    assert equal(before, weights(model))


def test_learning_rate_warms_up_then_falls_as_a_cosine():
    settings = TrainConfig(lr=1.0, warmup_ratio=0.1)
    rates = [learning_rate(step, 100, settings) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert all(a > b > 0 for a, b in zip(rates[9:], rates[10:]))
    assert rates[54] == pytest.approx(0.5, abs=0.02) and rates[-1] < 1e-3
    assert learning_rate(1, 1, TrainConfig(warmup_ratio=0.0)) > 0


def test_epochs_are_shuffled_whole_and_grouped_by_length():
    lengths = [7 * i % 101 for i in range(500)]
    epochs = [epoch_order(lengths, 8, seed=0, epoch=e) for e in (0, 1)]
    for steps in epochs:
        assert sorted(i for step in steps for i in step) == list(range(500))
    assert epochs[0] != epochs[1] and epochs[0] == epoch_order(lengths, 8, seed=0, epoch=0)
    assert epochs[0] != epoch_order(lengths, 8, seed=1, epoch=0)
    padded = sum(len(step) * max(lengths[i] for i in step) for step in epochs[0])
    assert padded < 1.25 * sum(lengths)  # about 1.8 without grouping


def test_schedule_continues_where_it_stopped():
    lengths = list(range(30))
    whole = list(schedule(lengths, 4, seed=0, total=20))
    assert [step for step, _, _ in whole] == list(range(1, 21)) and whole[-1][1] == 2
    assert list(schedule(lengths, 4, seed=0, total=20, done=13)) == whole[13:]
    assert list(schedule(lengths, 4, seed=0, total=20, done=20)) == []


def test_a_new_run_keeps_the_old_checkpoints_until_it_has_its_own(tmp_path):
    run(adapted(), config(folder=tmp_path, eval_every=3), dev=PAIRS[:3])
    before = {n: (tmp_path / n).read_bytes() for n in ("last.safetensors", "best.safetensors")}
    with pytest.raises(Killed):
        run(adapted(), config(folder=tmp_path, lr=0.02), dev=PAIRS[:3], callback=kill_at(2))
    assert {n: (tmp_path / n).read_bytes() for n in before} == before
    again = run(adapted(), config(folder=tmp_path, resume=True), dev=PAIRS[:3])
    assert again.resumed_from == 6  # the old one can still be resumed


def test_a_best_checkpoint_of_another_run_is_never_taken_for_ones_own(tmp_path):
    run(adapted(), config(folder=tmp_path, eval_every=3), dev=PAIRS[:3])
    other = config(folder=tmp_path, lr=0.02, eval_every=2)
    with pytest.raises(Killed):  # it has a best, and no last yet
        run(adapted(), other, dev=PAIRS[:3], callback=kill_at(2))
    with pytest.raises(ValueError, match="best.safetensors belongs to another run"):
        run(adapted(), config(folder=tmp_path, resume=True), dev=PAIRS[:3])
    model = adapted()
    with pytest.raises(ValueError, match="best.safetensors is of step 2, .* of step 6"):
        load_best(tmp_path, trainable_parameters(model), (6, 1.0))


def test_flipped_bits_in_checkpoints_are_never_silent(tmp_path):
    settings = config(folder=tmp_path, max_steps=2, resume=True)
    run(adapted(), settings, dev=PAIRS[:3])
    for name in ("last.safetensors", "best.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for at in range(0, len(whole), len(whole) // 7):
            changed = whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
            (tmp_path / name).write_bytes(changed)
            with pytest.raises(ValueError, match=name):
                run(adapted(), settings, dev=PAIRS[:3])
        (tmp_path / name).write_bytes(whole)


@pytest.mark.parametrize("dev", [None, PAIRS[:3]])
def test_a_training_that_diverges_is_stopped_before_anything_is_saved(tmp_path, dev):
    run(adapted(), config(folder=tmp_path), dev=dev)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.safetensors")}
    for steps in (1, 6):
        with pytest.raises(ValueError, match="is not finite at step 1.*lower lr"):
            run(adapted(), config(folder=tmp_path, lr=1e30, max_steps=steps), dev=dev)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.safetensors")} == before


def test_a_dev_loss_that_is_not_finite_is_an_error():
    model = adapted()
    next(m for m in model.modules() if hasattr(m, "variance_epsilon")).weight.data[0] = math.nan
    with pytest.raises(ValueError, match="loss on 3 examples is not finite"):
        validation_loss(model, small_tokenizer(), PAIRS[:3], config())


@pytest.mark.parametrize("name, value", [
    ("max_steps", 2.5), ("max_steps", True), ("epochs", "3"), ("batch_size", None),
    ("save_every", 1.0), ("eval_every", 0), ("seed", -1), ("seed", 2**64), ("seed", 0.5),
    ("lr", math.nan), ("lr", math.inf), ("weight_decay", -1.0), ("weight_decay", math.nan),
    ("warmup_ratio", math.nan), ("max_grad_norm", math.nan), ("lora_plus_ratio", math.nan),
    ("compute_dtype", "int8"),
])
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{name: value})


@pytest.mark.long
def test_one_process_trains_in_a_folder(tmp_path):
    script = "import sys; from qlora_lib.base.lock import held\nwith held(sys.argv[1]): input()"
    with held(tmp_path), held(tmp_path):  # this process may take it again
        done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True)
    assert done.returncode and f"is in use by process {os.getpid()}" in done.stderr.decode()
    other = subprocess.Popen(
        [sys.executable, "-c", script.replace("input", "print(flush=True) or input"), tmp_path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    other.stdout.readline()  # it holds the folder now
    with pytest.raises(ValueError, match=f"in use by process {other.pid}"):
        run(adapted(), config(folder=tmp_path))
    other.kill()
    other.wait()
    assert run(adapted(), config(folder=tmp_path, max_steps=1)).steps  # the dead hold nothing
