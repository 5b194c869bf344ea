"""A recipe: the method that follows from it, what it refuses, and its JSON."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_lib.quant.fp4 import FP4Spec, quantize_fp4
from qlora_lib.quant.fp8 import FP8Spec
from qlora_lib.quant.gptq import GPTQOptions, gptq_quantize
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.quant.hessian import Hessian
from qlora_lib.quant.nf4 import NF4Spec, quantize_nf4
from qlora_lib.quant.recipe import Recipe
from tests.support.tensors import PROPERTY, ar1, normal

GRIDS = st.builds(
    QuantSpec, bits=st.sampled_from([2, 3, 4, 8]), group_size=st.sampled_from([None, 16, 64]),
    symmetric=st.booleans(), clip_search=st.booleans(),
)  # fmt: skip
OPTIONS = st.builds(
    GPTQOptions, desc_act=st.booleans(), static_groups=st.booleans(), match_dense=st.booleans(),
    damp_percent=st.sampled_from([None, 0.01, 0.1]), block_size=st.sampled_from([32, 128]),
    weigh_columns=st.booleans(), refit_scales=st.booleans(),
)  # fmt: skip
TARGETS = st.sampled_from(["all", "attention", ("q_proj", "v_proj")])
RECIPES = st.one_of(
    st.builds(Recipe, GRIDS, OPTIONS, TARGETS), st.builds(Recipe, GRIDS, st.none(), TARGETS),
    st.builds(
        Recipe, st.one_of(st.builds(FP4Spec, st.sampled_from(["mxfp4", "nvfp4"])),
                          st.builds(FP8Spec, st.sampled_from(["e4m3", "e5m2"]))),
        st.one_of(st.none(), st.builds(GPTQOptions, desc_act=st.booleans())), TARGETS,
    ),
    st.builds(Recipe, st.builds(NF4Spec, double_quant=st.booleans()), st.none(), TARGETS),
)  # fmt: skip


@PROPERTY
@given(RECIPES)
def test_what_json_holds_is_the_recipe(recipe):
    said = json.loads(json.dumps(recipe.as_json() | {"weights": "abc", "compute_dtype": "fp32"}))
    assert Recipe.from_json(said) == recipe
    assert said["method"] == recipe.method


def test_the_method_follows():
    assert Recipe.of().method == "gptq" and Recipe.of().options == GPTQOptions()
    assert Recipe().method == "rtn" and Recipe(NF4Spec()).method == "nf4"
    assert Recipe.of(NF4Spec()) == Recipe(NF4Spec())
    assert Recipe.of(QuantSpec(3), "rtn", GPTQOptions()) == Recipe(QuantSpec(3))


@pytest.mark.parametrize("given, message", [
    ((QuantSpec(), "awq"), "method='awq' must be one of gptq, rtn, nf4"),
    ((QuantSpec(), "nf4"), "does not go with QuantSpec"),
    ((NF4Spec(), "gptq"), "does not go with NF4Spec"),
    ((FP4Spec(), "nf4"), "method='nf4' does not go with FP4Spec"),
    ((FP4Spec(), "gptq", GPTQOptions.best()), "weigh_columns=True is for integer grids"),
    ((QuantSpec(), "rtn", GPTQOptions(match_dense=True)), "method='rtn' has no match_dense"),
    ((NF4Spec(), None, GPTQOptions.best()),
     "'nf4' has no damp_percent, weigh_columns, refit_scales"),
])
def test_what_does_not_go_together_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        Recipe.of(*given)


def test_specs_and_recipes_are_values():
    for a, b in ((Recipe(), Recipe(QuantSpec(4, 64), None, "all")), (NF4Spec(), NF4Spec(64, True))):
        assert {a: 1}[b] == 1  # equal, and fit to be keys
        with pytest.raises(AttributeError):
            a.bits = a.targets = 3


def test_json_holds_only_what_is_not_usual():
    assert Recipe(QuantSpec(3)).as_json().keys() == Recipe.of().as_json().keys() == {
        "method", "spec",
    }  # fmt: skip
    said = Recipe.of(targets=("a", "b"), options=GPTQOptions(match_dense=True)).as_json()
    assert said.keys() - {"method", "spec"} == {"targets", "match_dense"}
    assert said["targets"] == ["a", "b"] and Recipe.of(targets="mlp").as_json()["targets"] == "mlp"
    known = GPTQOptions(block_size=32)
    assert Recipe.of(options=known).options is known


def test_nf4_has_no_options_of_gptq():
    with pytest.raises(ValueError, match="do not go with an NF4Spec"):
        Recipe(NF4Spec(), GPTQOptions())


def test_it_quantizes_by_its_method():
    w, hessian = normal(32, 64), Hessian(64)
    hessian.update(ar1(256, 64))
    spec = QuantSpec(3, 16)
    for recipe, wanted in (
        (Recipe(spec), quantize_rtn(w, spec)),
        (Recipe.of(spec), gptq_quantize(w, hessian, spec)),
        (Recipe(FP4Spec("mxfp4")), quantize_fp4(w, FP4Spec("mxfp4"))),
        (Recipe.of(FP4Spec()), gptq_quantize(w, hessian, FP4Spec())),
        (Recipe(NF4Spec(32, False)), quantize_nf4(w, 32, False)),
    ):
        assert torch.equal(recipe.quantize(w, hessian).dequantize(), wanted.dequantize())


def test_halves_are_kept_only_for_a_damping_that_is_chosen():
    assert Recipe.of(QuantSpec(), "gptq", GPTQOptions.best()).needs_halves
    for recipe in (Recipe.of(), Recipe(), Recipe(NF4Spec())):
        assert not recipe.needs_halves and not recipe.matches_dense
    assert Recipe.of(QuantSpec(), "gptq", GPTQOptions(match_dense=True)).matches_dense
