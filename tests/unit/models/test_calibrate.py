"""What each layer is calibrated on, in models whose blocks and layers are called in other ways."""

import pytest
import torch

from qlora_lib.lora.inject import inject_lora
from qlora_lib.models.batches import real_tokens
from qlora_lib.models.calibrate import SharedInputs
from qlora_lib.models.merge_hessians import merge_hessians
from qlora_lib.models.quantize import quantize_model, quantized_layers
from qlora_lib.quant.gptq import GPTQOptions, gptq_quantize
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.quant.hessian import Hessian
from tests.support import families
from tests.support.small_models import small_model

SPEC = QuantSpec(3, 8, clip_search=False)
IDS = torch.randint(3, 300, (2, 2, 20), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, 1, 13:] = 0
BATCHES = [{"input_ids": i, "attention_mask": m} for i, m in zip(IDS, MASK)]
TARGETS = {"gemma3n": ("q_proj", "k_proj", "o_proj", "down_proj", "per_layer_projection")}


def own_inputs(model, paths) -> dict[str, list]:
    """What the layers get when the whole model runs, for each batch (tokens, in); no padding."""
    inputs, mask = {path: [] for path in paths}, None

    def see(path, x):
        rows = x.reshape(mask.numel(), -1)  # a row a token, in all of these models
        inputs[path].append(rows[mask.flatten()])

    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda m, a, path=path: see(path, a[0]))
        for path in paths
    ]
    for batch in BATCHES:
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs


def hessian_of(inputs, dense=(None, None)) -> Hessian:
    hessian = Hessian(inputs[0].shape[1])
    for x, before in zip(inputs, dense):
        hessian.update(x, before)
    return hessian


def same_codes(layer, want) -> bool:
    """Sums are taken in another order: a tie may flip."""
    return (layer.codes == want.codes).float().mean() > 0.97


@pytest.mark.long
@pytest.mark.parametrize("family", ["gemma3", "gemma3n", "gemma4", "opt", "deepseek", "falcon"])
def test_every_layer_of_every_block_is_calibrated_on_its_own_inputs(family):
    """Its codes are GPTQ's on what it gets when the whole quantized model runs."""
    model, dense = families.build(family), families.build(family)
    report = quantize_model(model, BATCHES, SPEC, target_modules=TARGETS.get(family, "all"))
    inputs = own_inputs(model, [row.name for row in report])
    assert sum("layers.2." in name or "h.2." in name for name in inputs) >= 4
    for row in report:
        weight = dense.get_submodule(row.name).weight.detach()
        want = gptq_quantize(weight, hessian_of(inputs[row.name]), SPEC)
        assert same_codes(model.get_submodule(row.name), want), row.name


def test_the_dense_models_inputs_stay_its_own():
    """Gemma 3n's last blocks use keys of earlier ones: dense ones in the dense model."""
    model, dense = families.build("gemma3n"), families.build("gemma3n")
    options = GPTQOptions(match_dense=True)
    given = {"options": options, "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")}
    paths = [row.name for row in quantize_model(model, BATCHES, SPEC, **given)]
    inputs, before = own_inputs(model, paths), own_inputs(dense, paths)
    for path in paths:
        hessian = hessian_of(inputs[path], before[path])
        want = gptq_quantize(dense.get_submodule(path).weight.detach(), hessian, SPEC, options)
        assert same_codes(model.get_submodule(path), want), path


def between_blocks(model):
    first = model.model.layers[0]
    first.register_forward_hook(lambda module, args, out: out * 2)


def from_earlier_blocks(model):
    def hand_on(module, args, kwargs):
        return args, kwargs | {"position_embeddings": (args[0], args[0])}

    model.model.layers[1].register_forward_pre_hook(hand_on, with_kwargs=True)


def test_blocks_that_are_no_chain_are_refused():
    for change, message in (
        (between_blocks, "LlamaForCausalLM does more between its 2 blocks.*'rtn'"),
        (from_earlier_blocks, "block 1 of LlamaForCausalLM is called with more that depends"),
    ):
        model = small_model()
        change(model)
        with pytest.raises(ValueError, match=message):
            quantize_model(model, BATCHES, SPEC)
        assert not quantized_layers(model)
        assert not any("forward" in vars(block) for block in model.model.layers)
        quantize_model(model, None, SPEC, "rtn")


@pytest.mark.parametrize("used", [False, True])
def test_what_a_block_gives_beside_its_hidden_states_must_not_reach_the_next(used):
    """Bamba's blocks give attention weights too, which nobody uses; GLM's choices of tokens, which
    the next block does."""
    model = small_model()

    def loop(hidden, **given):
        beside = None
        for block in model.model.layers:
            hidden, beside = block(hidden, beside=beside) if used else block(hidden)
        return hidden

    model.forward = lambda input_ids, **_: loop(model.model.embed_tokens(input_ids))
    for block in model.model.layers:
        block.forward = lambda x, own=block.mlp, beside=None: (own(x), x)
    targets = ("up_proj", "down_proj")
    if used:
        with pytest.raises(ValueError, match="does more between its 2 blocks"):
            quantize_model(model, BATCHES, SPEC, target_modules=targets)
    else:
        assert len(quantize_model(model, BATCHES, SPEC, target_modules=targets)) == 4


def test_a_layer_that_no_batch_reaches_stays_dense_and_is_named():
    model = families.build("opt")
    for block in model.model.decoder.layers:
        block.spare = torch.nn.Linear(32, 32)
    with pytest.warns(UserWarning, match="3 target layers stay dense.*layers.0.spare.*layers.2"):
        rows = quantize_model(model, BATCHES, SPEC)
    assert len(rows) == 18 and type(model.model.decoder.layers[1].spare) is torch.nn.Linear


def test_a_layer_that_is_called_twice_is_refused():
    model = small_model()
    for block in model.model.layers:
        block.mlp.forward = lambda x, up=block.mlp.up_proj: x + up(x)[..., :64] + up(x)[..., 64:]
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj is called more than once"):
        quantize_model(model, BATCHES, SPEC, target_modules=("up_proj",))


@pytest.mark.parametrize("shape", [(2, 5, 4), (10, 4), (2, 1, 5, 4)])
def test_the_rows_of_real_tokens(shape):
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    x = torch.arange(40.0).view(shape)
    assert torch.equal(real_tokens(x, mask, "a"), torch.arange(40.0).view(2, 5, 4)[mask])


@pytest.mark.parametrize("shape", [(5, 2, 4), (7, 4), (2, 3, 5, 4)])
def test_inputs_without_a_row_a_token_are_refused_by_the_layers_name(shape):
    """Experts get some of the tokens; (seq, batch, in) would be masked in the wrong order."""
    with pytest.raises(ValueError, match=r"mlp.up: its input \(.*does not hold a row for each"):
        real_tokens(torch.zeros(shape), torch.ones(2, 5).bool(), "mlp.up")


def test_a_layer_that_sees_only_some_tokens_is_refused():
    model = small_model()
    mlp = model.model.layers[1].mlp
    whole = mlp.forward
    mlp.forward = lambda x: torch.cat([whole(x[:, :7]), x[:, 7:]], 1)
    with pytest.raises(ValueError, match="layers.1.mlp.gate_proj: its input"):
        quantize_model(model, BATCHES, SPEC)
    model = small_model()
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: x + mlp.up_proj(x[0, :7]).sum()
    inject_lora(model, ("up_proj",), rank=2)
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj: its input"):
        merge_hessians(model, BATCHES)


def test_hessians_for_merging_are_those_of_the_layers_inputs():
    for family in ("opt", "deepseek"):
        model = families.build(family)
        layers = inject_lora(model, "all", rank=2)
        got, inputs = merge_hessians(model, BATCHES), own_inputs(model, layers)
        for path in layers:
            want = hessian_of(inputs[path]).matrix
            torch.testing.assert_close(got[path].matrix, want, rtol=1e-4, atol=1e-5)


def test_inputs_are_shared_where_the_numbers_are():
    shared, x = SharedInputs(), torch.ones(3, 4)
    assert [shared.first(p, t) for p, t in (("q", x), ("k", x.view(3, 4)), ("v", x))] == ["q"] * 3
    assert shared.first("copy", x.clone()) == "copy"  # equal, but nothing says it stays so
    assert shared.first("before", x) == "before"
    x.add_(1)  # the same tensor with other numbers in it
    assert shared.first("after", x) == "after"
    assert shared.first("rows", x[:2]) == "rows"
