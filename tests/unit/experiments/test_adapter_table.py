"""The memory that adapters and their base are said to take, against the tensors themselves."""

from course.nb07.prune import prune_adapter
from experiments.adapter_table import adapter_table
from qlora_lib import inject_lora
from qlora_lib.lora.layer import lora_layers
from tests.support.lora_models import base_of, family
from tests.support.small_models import small_model


def test_the_table_adds_up():
    model = family("grid4", ranks=(4, 2))
    inject_lora(model, ("q_proj",), rank=6, adapter="q")
    base, a, b, q = adapter_table(model)
    bare = base_of("grid4")
    want = {id(t): t.nbytes for t in [*bare.parameters(), *bare.buffers()]}
    assert (base.name, base.ranks, base.layers) == (None, (), 15)  # 14 and the head
    assert base.nbytes == sum(want.values())
    assert base.parameters == sum(p.numel() for p in small_model().parameters())
    assert (a.name, a.ranks, a.layers) == ("a", (4,), 14)
    count = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert (a.parameters, a.nbytes) == (count, 4 * count) and b.parameters == count // 2
    assert (q.ranks, q.layers, q.parameters) == ((6,), 2, 2 * 6 * 128)
    prune_adapter(model, "a", {p: 1 + i % 2 for i, p in enumerate(lora_layers(model))})
    assert adapter_table(model)[1].ranks == (1, 2)
    assert adapter_table(small_model())[0].parameters == base.parameters
