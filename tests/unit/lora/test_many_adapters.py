"""Many named adapters on one base: switched, deleted, counted, refused."""

import pytest
import torch

from qlora_lib import inject_lora, use_adapter
from qlora_lib.lora.files import load_adapter, save_adapter
from qlora_lib.lora.inject import delete_adapter, set_adapter
from qlora_lib.lora.layer import adapter_names, lora_layers
from qlora_lib.lora.targets import ALL_LINEAR
from tests.support.lora_models import IDS, adapted, base_of, family, logits, under
from tests.support.small_models import small_model


@pytest.mark.long
@pytest.mark.parametrize("kind", ["dense", "grid4", "nf4"])
def test_switching_leaves_no_trace(kind, tmp_path):
    """Bit for bit what a model gives that only ever had that adapter."""
    model = family(kind, ranks=(4, 2, 8, 4))
    for name in "abcd":
        save_adapter(model, tmp_path / name, name)
    for name in "abcdbdac":
        under(model, name)
        set_adapter(model, name)
        logits(model)
    with use_adapter(model, "d"):
        model(IDS, labels=IDS).loss.backward()
    for name in "abcd":
        alone = base_of(kind)
        load_adapter(alone, tmp_path / name, name)
        assert torch.equal(under(model, name), logits(alone)), name
    assert torch.equal(under(model, None), logits(base_of(kind)))


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_deleting_the_last_adapter_puts_the_base_back(kind):
    model, bare = family(kind, ranks=(4, 2)), base_of(kind)
    b = under(model, "b")
    assert len(delete_adapter(model, "a")) == 14 and adapter_names(model) == ["b"]
    assert torch.equal(logits(model), logits(bare))  # its default is gone: the base
    assert torch.equal(under(model, "b"), b)
    delete_adapter(model, "b")
    assert not lora_layers(model) and list(model.state_dict()) == list(bare.state_dict())
    assert torch.equal(logits(model), logits(bare))
    with pytest.raises(ValueError, match="no adapter 'a'"):
        delete_adapter(model, "a")


def test_an_adapter_with_more_layers_leaves_the_default(tmp_path):
    """One default for the whole model: no mixture of the old one and the new."""
    for name, targets in (("a", "attention"), ("b", "all")):
        save_adapter(adapted(small_model(), targets=targets, adapter=name), tmp_path / name, name)
    model = small_model()
    load_adapter(model, tmp_path / "a", "a")
    want = logits(model)
    load_adapter(model, tmp_path / "b", "b")
    assert len(lora_layers(model)) == 14 and torch.equal(logits(model), want)
    assert not torch.equal(under(model, "b"), want)


def test_the_base_alone_stays_the_default():
    model = adapted(small_model(), targets="attention", adapter="a")
    set_adapter(model, None)
    adapted(model, targets="all", adapter="b")
    assert torch.equal(logits(model), logits(small_model()))


def test_no_layer_remembers_a_default_that_is_gone():
    model = adapted(small_model(), targets="attention", adapter="a")
    adapted(model, targets="all", adapter="b")
    delete_adapter(model, "a")
    adapted(model, targets="all", adapter="a")
    assert {layer.active for layer in lora_layers(model).values()} == {None}


def test_a_merged_adapter_is_unmerged_before_it_is_deleted():
    from qlora_lib.lora.merge import merge_lora, unmerge_lora

    model = adapted(small_model())
    merge_lora(model)
    with pytest.raises(ValueError, match="merged.*unmerge_lora"):
        delete_adapter(model, "default")
    unmerge_lora(model)
    assert len(delete_adapter(model, "default")) == 14


def test_two_adapters_of_one_name_with_other_settings_are_refused():
    model = family(ranks=(4,))
    with pytest.raises(ValueError, match="adapter 'a' exists with .*rank=4.* not .*rank=2"):
        inject_lora(model, ALL_LINEAR, rank=2, adapter="a")
    with pytest.raises(ValueError, match="adapter 'a' exists with .*alpha=16.* not .*alpha=8"):
        inject_lora(model, ALL_LINEAR, rank=4, alpha=8, adapter="a")


def test_an_adapter_of_another_base_is_refused(tmp_path):
    save_adapter(adapted(small_model(seed=1)), tmp_path / "a")
    model = family(ranks=(4,))
    with pytest.raises(ValueError, match="was trained on another base model"):
        load_adapter(model, tmp_path / "a", "other")
    assert adapter_names(model) == ["a"]
