"""Every causal language model that transformers knows, small and random, from folder to export.

VERDICTS says what becomes of each family. A family that starts or ceases to work turns a test red.

all               quantize_model, inject_lora and the rest take "all"
named             "all" is refused, as blocks have other matrices, experts mostly: the linears that
                  target_modules names are taken, the others stay dense
unused layers     linears that the model never calls (cross-attention without an encoder) stay dense,
                  and a warning names them
untrained layers  adapters that get no gradient, as what an indexer chooses has none
not calibrated    GPTQ is refused, as blocks are no chain or rows are no tokens; 'rtn' works
padding changes it  the family itself gives a row other logits alone than in a padded batch
not exported      a layer's shape is none that the GPTQ format can hold
not streamed      the folder calls tensors otherwise than the model: quantized in memory only
refused           by a ValueError that says why: no list of blocks, weights that are read instead of
                  called (RWKV), shared between blocks (Zamba), or no model of AutoModelForCausalLM
random            its own forward draws at random
not built         its default configuration can't be made small, or not be built at all
"""

import pytest
from transformers import __version__

from tests.support.family_models import FAMILIES, build
from tests.support.family_rehearsal import rehearse

VERSION = "5.23.0"  # of the transformers whose families these are
VERDICTS = {
    "all": (
        "apertus arcee bert bert-generation big_bird biogpt bitnet bloom camembert codegen cohere "
        "cohere2 cohere_compass_text ctrl cwm data2vec-text deepseek_v3 diffllama electra ernie "
        "ernie4_5 exaone4 falcon gemma gemma2 gemma3_text gemma4 gemma4_text gemma4_unified "
        "gemma4_unified_text git glm glm4 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox_japanese gptj "
        "granite granite_swa helium hunyuan_v1_dense hyperclovax internlm3 iquestcoder jais2 lfm2 "
        "llama megatron-bert minicpm3 ministral ministral3 mistral modernbert-decoder moshi "
        "moss_transcribe_diarize mpt nanochat nemotron olmo olmo2 olmo3 openai-gpt opt persimmon "
        "phi phi3 phi4_multimodal qwen2 qwen3 rembert roberta roberta-prelayernorm roc_bert "
        "roformer seed_oss smollm3 stablelm starcoder2 vaultgemma xglm xlm-roberta xlm-roberta-xl "
        "xmod youtu"
    ),
    "named, not streamed": (
        "afmoe aria_text axk1 bailing_hybrid beam cohere2_moe deepseek_v2 dots1 ernie4_5_moe "
        "exaone_moe flex_olmo glm4_moe glm4_moe_lite granitemoe granitemoehybrid granitemoeshared "
        "hunyuan_v1_moe hy_v3 inkling2_text jamba kimi_linear kolibri1 laguna lfm3 mellum "
        "mimo_v2_flash minimax minimax_m2 mixtral nemotron_h olmo_hybrid olmoe phimoe qwen2_moe "
        "qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next solar_open"
    ),
    "named": (
        "bamba dbrx falcon_h1 falcon_mamba gemma3n_text gpt_oss granitemoe_swa inkling_text "
        "jetmoe lfm2_moe llama4 llama4_text mamba mamba2 minimax_m3_vl_text qwen3_5 qwen3_5_text "
        "recurrent_gemma"
    ),
    "all, unused layers": (
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart trocr "
        "whisper"
    ),
    "not built": (
        "blt dots3_note dots3_note_text gemma3n gemma4_assistant gemma4_unified_assistant "
        "musicgen musicgen_melody qwen4_exp"
    ),
    "refused": (
        "emu3 hrm_text longcat_flash mllama rwkv zamba zamba2"
    ),
    "all, not streamed": (
        "flint fuyu gemma3 got_ocr2 gpt_neox"
    ),
    "named, untrained layers, not streamed": (
        "axk2 deepseek_v32 deepseek_v4"
    ),
    "named, not calibrated, untrained layers, not streamed": (
        "glm_moe_dsa hy_v4"
    ),
    "named, not calibrated": (
        "xlnet zaya"
    ),
    "padding changes it, all, not calibrated": (
        "cpmant"
    ),
    "all, not exported": (
        "doge"
    ),
    "padding changes it, all, not calibrated, untrained layers": (
        "prophetnet"
    ),
    "named, not calibrated, not exported, not streamed": (
        "qwen4_exp_text"
    ),
    "random": (
        "reformer"
    ),
    "all, not calibrated": (
        "xlm"
    ),
    "all, untrained layers, not exported": (
        "xlstm"
    ),
}
VERDICT = {family: verdict for verdict, names in VERDICTS.items() for family in names.split()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_as_far_as_its_verdict_says(family, tmp_path):
    if __version__ != VERSION:
        pytest.skip(f"these are the verdicts under transformers {VERSION}")
    verdict = VERDICT[family]
    if verdict in ("not built", "random"):
        with pytest.raises(Exception):
            build(family) if verdict == "not built" else rehearse(family, tmp_path)
    elif verdict == "refused":
        with pytest.raises(ValueError):
            rehearse(family, tmp_path)
    else:
        assert rehearse(family, tmp_path) == verdict
