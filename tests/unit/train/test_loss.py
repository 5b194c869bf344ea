"""The loss in chunks: the plain loss and gradients, without all logits at once."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)  # fmt: skip

from experiments.measured_step import AllocationMeter
from qlora_lib.data.tokens import collate, encode_example
from qlora_lib.lora.inject import inject_lora, trainable_parameters
from qlora_lib.train.loss import CHUNK, chunk_for, loss_sum, token_losses
from tests.support.small_models import PAIRS, small_model, small_tokenizer

TINY = {
    "vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def batch():
    tokenizer = small_tokenizer()
    return collate([encode_example(tokenizer, p, t, 512) for p, t in PAIRS[:5]], 0)


def capped():
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**TINY, final_logit_softcapping=2.0))


def adapted():
    model = small_model()
    inject_lora(model, ("q_proj", "down_proj"), rank=2, dropout=0.3)
    return model


def trained_head():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=False))
    model.model.requires_grad_(False)
    return model


def adapted_head():
    model = trained_head().requires_grad_(False)
    inject_lora(model, ("lm_head", "v_proj"), rank=2, init="gaussian")
    for name, p in trainable_parameters(model).items():
        torch.nn.init.normal_(p, std=0.1) if "lora_B" in name else None
    return model


MODELS = {"lora": adapted, "tied": small_model, "head": trained_head, "head lora": adapted_head,
          "capped": capped}  # fmt: skip


def run(model, chunk, dtype=torch.float32):
    model.train().zero_grad(set_to_none=True)
    torch.manual_seed(3)
    loss = loss_sum(model, batch(), dtype, chunk)
    loss.backward()
    return loss, {n: p.grad for n, p in trainable_parameters(model).items()}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_whole(name):
    model = MODELS[name]()
    assert chunk_for(model, torch.float32) == CHUNK
    expected, gradients = run(model, None)
    assert gradients and any(g.any() for g in gradients.values())
    for chunk in (7, CHUNK):  # many, the last one short; and all in one
        loss, found = run(model, chunk)
        torch.testing.assert_close(loss, expected)
        for path, gradient in gradients.items():  # sums in another order
            torch.testing.assert_close(
                found[path], gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item()
            )


@pytest.mark.parametrize("name", MODELS)
def test_losses_token_by_token_are_those_of_the_logits(name):
    model = MODELS[name]().eval()
    pairs = [(prompt, target * (i + 1)) for i, (prompt, target) in enumerate(PAIRS[:4])]
    given = collate([encode_example(small_tokenizer(), *pair) for pair in pairs], 0)
    with torch.no_grad():
        logits = model(given["input_ids"], attention_mask=given["attention_mask"]).logits
    for chunk in (None, 7, CHUNK):
        rows = token_losses(model, given, chunk)
        assert len(rows) == len(given["labels"])
        for row, scores, labels in zip(rows, logits[:, :-1], given["labels"][:, 1:]):
            log_p = scores.log_softmax(-1)[labels != -100]
            expected = -log_p.gather(-1, labels[labels != -100].unsqueeze(-1)).squeeze(-1)
            torch.testing.assert_close(row, expected)


def test_scoring_completions_never_holds_all_logits():
    """Twelve rows of one length, all supervised; beside the fp32 logits of a chunk their
    log-softmax."""
    vocab, seq = 8192, 64
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY | {"vocab_size": vocab}))
    ids = torch.randint(3, vocab, (12, seq + 1))
    with AllocationMeter() as meter:
        token_losses(model, {"input_ids": ids, "labels": ids}, 16)
    assert 4 * 16 * vocab < meter.peak < 4 * ids.numel() * vocab / 8


def test_sixteen_bits_under_autocast():
    model = adapted()
    expected, gradients = run(model, None, torch.bfloat16)
    loss, found = run(model, 7, torch.bfloat16)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    for path, gradient in gradients.items():  # 8 bits of mantissa, over some hundred sums
        assert found[path].dtype == torch.float32
        assert (found[path] - gradient).norm() <= 0.02 * gradient.norm()


def test_models_that_scale_their_logits_take_the_plain_path():
    torch.manual_seed(0)
    settings = {k: v for k, v in TINY.items() if k != "head_dim"}
    model = GraniteForCausalLM(GraniteConfig(**settings, logits_scaling=3.0)).train()
    assert chunk_for(model, torch.float32) is None and model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_is_twelve_bytes_a_logit_of_one_chunk(dtype):
    """log-softmax, its gradient and the gradient of the logits, in fp32 each."""
    vocab, seq, chunk = 4096, 65, 16
    config = LlamaConfig(**TINY | {"vocab_size": vocab}, tie_word_embeddings=False)
    model = LlamaForCausalLM(config).to(dtype)
    inject_lora(model, rank=2)
    ids = torch.randint(3, vocab, (4, seq))
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    peaks = {}
    for size in (None, chunk):
        with AllocationMeter() as meter:
            loss_sum(model, data, dtype, size).backward()
        peaks[size] = meter.peak
    logits = 12 * chunk * vocab
    assert logits <= peaks[chunk] < 1.6 * logits  # beside it, what the block keeps
    assert peaks[None] > 12 * 4 * (seq - 1) * vocab > 9 * peaks[chunk]
