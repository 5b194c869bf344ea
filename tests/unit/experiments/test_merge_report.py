"""What a merge costs: measured in logits, on the tokens that count, with the model given back."""

from functools import partial

import pytest
import torch

from experiments.merge_report import merge_report
from qlora_lib.lora.inject import inject_lora
from qlora_lib.lora.layer import lora_layers
from qlora_lib.lora.merge import merge_lora, unmerge_lora
from qlora_lib.lora.targets import ATTENTION
from qlora_lib.models.merge_hessians import merge_hessians
from tests.support.lora_models import adapted, base_of, logits, trained
from tests.support.small_models import small_model


def batches(count=2, seed=0, rows=4, length=24, lengths=None, words=257):
    """Random tokens out of so many, each row padded on the right after its length."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(3, 3 + words, (rows, length), generator=g)
        ends = torch.tensor(lengths or [length] * rows).unsqueeze(1)
        mask = (torch.arange(length) < ends).long()  # (batch, seq)
        made.append({"input_ids": ids * mask, "attention_mask": mask})
    return made


def all_logits(model, data):
    """(tokens, vocab) of the real tokens, in fp64."""
    with torch.no_grad():
        return torch.cat([model(**b).logits[b["attention_mask"].bool()] for b in data]).double()


def some_model(kind="grid4"):
    model = base_of(kind)
    inject_lora(model, rank=4)
    return trained(model, std=0.05)


def test_each_row_is_what_its_definition_says():
    model, data = some_model(), batches(lengths=[24, 5, 17, 1])
    rows = {row.method: row for row in merge_report(model, data)}
    assert list(rows) == ["base", "dense", "rtn"]
    old = all_logits(model, data)
    for method, row in rows.items():
        if method == "base":
            new = all_logits(base_of("grid4"), data)
            assert row.update_lost == 1
        else:
            layers = merge_lora(model, method)
            new = all_logits(model, data)
            unmerge_lora(model)
            assert row.update_lost == sum(r.lost for r in layers) / len(layers)
        # fp32 sums against fp64 ones of the same logits
        assert abs(row.logit_error - float((new - old).norm() / old.norm())) < 1e-6
        kl = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=old), torch.distributions.Categorical(logits=new)
        )
        assert abs(row.kl - float(kl.mean())) < 1e-6
        assert row.same_token == float((old.argmax(-1) == new.argmax(-1)).double().mean())
    assert rows["dense"].logit_error < 1e-5 < rows["rtn"].logit_error < rows["base"].logit_error
    assert rows["dense"].same_token == 1


def test_padding_changes_nothing():
    data = batches(lengths=[24, 5, 17, 1])
    noisy = [dict(b) for b in data]
    for batch in noisy:
        batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)
    model = some_model()
    assert merge_report(model, data) == merge_report(model, noisy)


def test_a_batch_without_a_mask_has_no_padding():
    model, data = some_model(), batches()
    bare = [{"input_ids": batch["input_ids"]} for batch in data]
    for a, b in zip(merge_report(model, data), merge_report(model, bare), strict=True):
        assert abs(a.kl - b.kl) < 1e-6 and abs(a.logit_error - b.logit_error) < 1e-6


def test_gptq_loses_less_than_rounding_on_other_tokens():
    """3 bits, where rounding hurts; few different tokens, so that inputs correlate."""
    model = base_of("grid3")
    inject_lora(model, ATTENTION, rank=4)
    trained(model, std=0.05)
    calibration = batches(8, seed=2, rows=8, words=12)
    rows = merge_report(model, batches(seed=1, words=12), ("rtn", "gptq"), calibration)
    assert rows[1].logit_error < 0.9 * rows[0].logit_error and rows[1].kl < 0.9 * rows[0].kl


def test_measure_sees_the_merged_model_and_its_answer_is_kept():
    model, data, seen = some_model(), batches(1), []

    def measure(m):
        seen.append(m)
        return logits(m)

    rows = merge_report(model, data, ("base", "dense", "rtn"), measure=measure)
    assert all(m is model for m in seen)
    assert torch.equal(rows[0].measured, logits(base_of("grid4")))
    for row in rows[1:]:
        merge_lora(model, row.method)
        assert torch.equal(row.measured, logits(model))
        unmerge_lora(model)


def test_the_model_comes_back_as_it_was_also_from_an_error():
    model, data = some_model().train(), batches(1)
    before = logits(model)

    def fail(m):
        raise RuntimeError("measure failed")

    merge_report(model, data)
    for method in ("base", "rtn"):
        with pytest.raises(RuntimeError, match="measure failed"):
            merge_report(model, data, (method,), measure=fail)
        assert torch.equal(logits(model), before) and model.training
        assert all(layer.merged is None for layer in lora_layers(model).values())


def test_bad_arguments_are_named():
    model, data = some_model(), batches(1)
    for match, call in {
        r"methods=\['int4'\] are not among": lambda: merge_report(model, data, ("rtn", "int4")),
        "no batches to compare": lambda: merge_report(model, []),
        "'gptq' needs calibration batches": lambda: merge_report(model, data, ("gptq",)),
        "no layer has an active adapter": lambda: merge_report(base_of("grid4"), data),
        "q_proj is dense; merge into": lambda: merge_report(adapted(small_model()), data, ("rtn",)),
        "no calibration batches": lambda: merge_hessians(model, []),
        "but needs input_ids": lambda: merge_hessians(model, [{"labels": torch.ones(1, 2)}]),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    merge_lora(model)
    for call in (lambda: merge_report(model, data), lambda: merge_hessians(model, data)):
        with pytest.raises(ValueError, match="merged; call unmerge_lora first"):
            call()


def test_hessians_are_those_of_the_adapted_layers_inputs():
    model, data = some_model(), batches(2, lengths=[24, 5, 17, 1])
    got, inputs, handles = merge_hessians(model, data), {}, []
    for path, layer in lora_layers(model).items():
        inputs[path] = []
        see = partial(lambda seen, module, args: seen.append(args[0]), inputs[path])
        handles.append(layer.register_forward_pre_hook(see))
    all_logits(model, data)
    for handle in handles:
        handle.remove()
    assert set(got) == set(lora_layers(model))
    for path, hessian in got.items():
        real = [x[b["attention_mask"].bool()] for x, b in zip(inputs[path], data)]
        x = torch.cat(real).double()  # (tokens, in)
        assert hessian.tokens == len(x) == 2 * (24 + 5 + 17 + 1)
        assert torch.allclose(hessian.matrix.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    attention = "model.layers.1.self_attn."
    assert got[attention + "q_proj"] is got[attention + "k_proj"] is got[attention + "v_proj"]
    assert got[attention + "o_proj"] is not got[attention + "q_proj"]


def test_an_untrained_adapter_loses_nothing_in_dense_weights():
    model = base_of("nf4")
    inject_lora(model, rank=4)
    base, dense = merge_report(model, batches(1), ("base", "dense"))
    assert base.kl == 0 and base.logit_error == 0
    assert dense.update_lost < 1e-5 and dense.logit_error < 1e-5


def test_batches_may_have_different_lengths():
    model = some_model()
    data = batches(1, length=24) + batches(1, length=9, seed=3)
    assert {h.tokens for h in merge_hessians(model, data).values()} == {4 * 24 + 4 * 9}
    assert len(merge_report(model, data, ("dense",))) == 1
