"""The verifier: what it reads, what it trains, what it leaves alone."""

import pytest
import torch
from safetensors.torch import save_file

from qlora_lib.data.tokens import collate
from qlora_lib.evaluation.verifier import Verifier, train_verifier
from qlora_lib.evaluation.votes import encode_solutions
from qlora_lib.generation.generate import Decoding, generator
from qlora_lib.lora.inject import set_adapter
from qlora_lib.lora.layer import adapter_names
from qlora_lib.models.quantize import quantize_model
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.train.config import TrainConfig
from tests.support.lora_models import IDS, adapted, logits
from tests.support.small_models import small_model, small_tokenizer

PROMPTS = [f"Question: {i} + 1?\nAnswer:\n" for i in range(12)] * 2
SAID = [f"#### {i + 1}" for i in range(12)] + ["none"] * 12
RIGHT = [True] * 12 + [False] * 12


def new(model=None, seed=0) -> Verifier:
    torch.manual_seed(seed)
    return Verifier(model or small_model(), small_tokenizer(), rank=4)


def test_a_new_verifier_knows_nothing_and_the_model_is_as_before():
    model = small_model()
    before = logits(model)
    verifier = new(model)
    assert verifier(PROMPTS[:3], SAID[:3]) == [0.5] * 3
    assert torch.equal(logits(model), before)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["dense", "quantized", "beside an adapter"])
def test_training_separates_right_from_wrong_and_changes_no_output(kind):
    model = small_model()
    if kind == "quantized":
        quantize_model(model, None, QuantSpec(4, 16), "rtn")
    elif kind == "beside an adapter":
        adapted(model)
    before = logits(model)
    verifier = new(model)
    steps = train_verifier(
        verifier, PROMPTS, SAID, RIGHT, TrainConfig(max_steps=30, batch_size=24, lr=1e-2)
    )
    assert steps[-1]["loss"] < 0.2 < steps[0]["loss"]  # ln 2 at the start
    scores = verifier(PROMPTS, SAID)
    assert min(scores[:12]) > 0.5 > max(scores[12:])
    assert torch.equal(logits(model), before)
    assert not any(p.requires_grad for p in model.parameters())


def test_only_the_adapter_and_the_head_get_a_gradient():
    model = adapted(small_model())
    verifier = new(model)
    for p in verifier.parameters.values():
        p.requires_grad_(True)
    torch.nn.init.normal_(verifier.head.weight)
    batch = collate(encode_solutions(verifier.model, verifier.tokenizer, PROMPTS[:4], SAID[:4]))
    verifier.loss(batch, torch.ones(4)).backward()
    own = {id(p) for p in verifier.parameters.values()}
    assert all(p.grad is not None for p in verifier.parameters.values())
    assert {id(p) for p in model.parameters() if p.grad is not None} <= own
    assert len(own) == 2 * 14 + 2


def test_the_loss_reads_each_solution_after_its_end_token():
    verifier = new()
    torch.nn.init.normal_(verifier.head.weight)
    said = ["#### 1", "#### 1,000", "no"]
    encoded = encode_solutions(verifier.model, verifier.tokenizer, PROMPTS[:3], said)
    values = []
    for (ids, _), right in zip(encoded, (1, 0, 1)):
        assert ids[-1] == small_tokenizer().eos_token_id
        with torch.no_grad():
            hidden = verifier.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        odds = verifier.head(hidden)  # B is 0: the adapter changes nothing yet
        values.append(torch.nn.functional.softplus(-odds if right else odds))
    loss = verifier.loss(collate(encoded), torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(loss, torch.cat(values).mean())


def test_padding_and_order_do_not_change_a_score():
    verifier = new()
    torch.nn.init.normal_(verifier.head.weight)
    together = verifier(PROMPTS[:6], SAID[:3] + ["a much longer solution. #### 12345"] + SAID[4:6])
    alone = verifier(PROMPTS[:1], SAID[:1]) + verifier(PROMPTS[5:6], SAID[5:6])
    assert [together[0], together[5]] == pytest.approx(alone, abs=1e-5)


def test_generation_goes_without_the_verifier(tmp_path):
    model, tokenizer = small_model(), small_tokenizer()
    ask = generator(model, tokenizer, Decoding(max_new_tokens=8))
    before = ask(PROMPTS[:4])
    verifier = new(model)
    train_verifier(verifier, PROMPTS, SAID, RIGHT, TrainConfig(max_steps=4, batch_size=8, lr=1e-2))
    verifier(PROMPTS[:4], SAID[:4])
    assert ask(PROMPTS[:4]) == before


@pytest.mark.parametrize("others", [False, True])
def test_saved_and_loaded(tmp_path, others):
    def base():
        return adapted(small_model()) if others else small_model()

    verifier = new(base())
    train_verifier(verifier, PROMPTS, SAID, RIGHT, TrainConfig(max_steps=4, batch_size=8, lr=1e-2))
    verifier.save(tmp_path)
    verifier.save(tmp_path)  # over itself
    model = base()
    before = logits(model)
    again = Verifier.load(model, small_tokenizer(), tmp_path)
    assert again(PROMPTS, SAID) == verifier(PROMPTS, SAID)
    assert again.fingerprint() == verifier.fingerprint() != new().fingerprint()
    assert torch.equal(logits(model), before)
    assert adapter_names(model) == ["default", "verifier"][not others :]


def test_refusals(tmp_path):
    verifier = new()
    with pytest.raises(ValueError, match="has a verifier already"):
        Verifier(verifier.model, small_tokenizer())
    with pytest.raises(ValueError, match="right and wrong solutions"):
        train_verifier(verifier, PROMPTS[:3], SAID[:3], [True] * 3)
    with pytest.raises(ValueError, match="3 prompts, 2 completions"):
        train_verifier(verifier, PROMPTS[:3], SAID[:2], [True, False, True])
    with pytest.raises(FileNotFoundError):
        Verifier.load(small_model(), small_tokenizer(), tmp_path)
    verifier.save(tmp_path)
    with pytest.raises(ValueError, match="another base"):
        Verifier.load(small_model(seed=1), small_tokenizer(), tmp_path)
    set_adapter(verifier.model, None)
    assert logits(verifier.model).shape[:2] == IDS.shape


def test_a_changed_verifier_is_never_loaded(tmp_path):
    new().save(tmp_path / "v", {"solutions": 24})
    files = [p for p in sorted((tmp_path / "v").rglob("*")) if p.is_file()]
    assert len(files) == 6
    for path in files:
        whole = path.read_bytes()
        for at in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(ValueError, match=path.name):
                Verifier.load(small_model(), small_tokenizer(), tmp_path / "v")
        path.write_bytes(whole)
    assert Verifier.load(small_model(), small_tokenizer(), tmp_path / "v")


def test_a_verifier_with_nan_is_neither_saved_nor_loaded(tmp_path):
    verifier = new()
    verifier.save(tmp_path / "v")
    (tmp_path / "v" / "hashes.json").unlink()  # as older versions wrote it
    Verifier.load(small_model(), small_tokenizer(), tmp_path / "v")
    verifier.head.weight.data[0, 3] = float("nan")
    with pytest.raises(ValueError, match="head holds NaN"):
        verifier.save(tmp_path / "v")
    head = {"weight": verifier.head.weight.detach(), "bias": verifier.head.bias.detach()}
    save_file(head, tmp_path / "v" / "head.safetensors")
    with pytest.raises(ValueError, match="head.safetensors holds NaN"):
        Verifier.load(small_model(), small_tokenizer(), tmp_path / "v")
