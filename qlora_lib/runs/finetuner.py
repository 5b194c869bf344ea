"""One object from a model and data to a saved result: full fine-tuning, LoRA or QLoRA.

    tuner = Finetuner("data/tiny-llama", method="qlora", folder="outputs/mine")
    tuner.fit("my.jsonl", config=TrainConfig(epochs=2), callback=print)
    tuner.generate(["Question: ..."]);  tuner.save();  Finetuner.load("outputs/mine")
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..base import processes
from ..base.files import open_tensors, write_proved_json
from ..base.folders import atomic_folder, check_place
from ..base.lock import held
from ..base.paths import short_path
from ..base.stamp import stamp
from ..data.examples import hold_out, read_examples
from ..data.tokens import Pair
from ..evaluation.tasks import Score, Task, score
from ..generation.generate import Decoding, generator
from ..lora.files import ADAPTER_CONFIG, save_adapter
from ..lora.fingerprint import residual_fingerprint
from ..lora.init import LOST_INITS, RESIDUAL_INITS
from ..lora.inject import inject_lora, set_adapter, trainable_parameters
from ..lora.layer import lora_layers
from ..lora.targets import find_linears
from ..models.checkpoint import QUANTIZATION, base_state, save_quantized, save_settings
from ..models.quantize import apply_recipe, quantized_layers
from ..models.stored_weights import WEIGHTS
from ..quant.nf4 import NF4Spec
from ..quant.recipe import Recipe
from ..train.config import TrainConfig
from ..train.finetune import History, finetune
from ..train.memory import METHODS
from ..train.snapshots import load_best
from .base import ABOUT, BASE, RECIPE, BasePlan, quantized_base, read_recipe, tell_of_orphan
from .lost_start import check_lost_start, dense_linears, start_from_lost
from .run_folder import ADAPTER, MODEL, TRAINING, load_run, result_hash

Callback = Callable[[dict], None]


def _with_defaults(lora: dict) -> dict:
    lora = {"target_modules": "all", "rank": 16} | lora
    if "alpha" not in lora:
        if isinstance(lora["rank"], dict):
            raise ValueError("a rank a layer needs one alpha for all of them; give alpha=")
        lora["alpha"] = 2 * lora["rank"]
    return lora


class Finetuner:
    """A model that learns by one of three methods.

    model: a hub id, a folder or a GGUF file; the plan of a base (runs/base.py); or a causal model
    itself (then give `tokenizer`), which is changed in place. method: "full" trains every weight,
    in fp32; "lora" an adapter beside dense weights; "qlora" beside quantized ones: quantized here
    to `spec` (None: NF4; or a QuantSpec, rounded to nearest) or by the plan's recipe, unless the
    model already is. folder: of the run (run_folder.py); None: nothing is kept on disk. Further
    keywords (rank, alpha ...) go to inject_lora. Raises ValueError for settings that do not go
    together.
    """

    def __init__(self, model, tokenizer=None, method: str = "qlora",
                 folder: str | Path | None = None, spec=None, adapter: str = "default",
                 seed: int = 0, device=None, compute_dtype: str = "auto", **lora):  # fmt: skip
        if method not in METHODS:
            raise ValueError(f"method={method!r}; expected one of {', '.join(METHODS)}")
        if method == "full" and lora:
            raise ValueError(f"{sorted(lora)} are LoRA's; method='full' trains every weight")
        if spec is not None and (method != "qlora" or isinstance(model, BasePlan)):
            raise ValueError(f"spec={spec} says how method='qlora' quantizes a model here; "
                             f"{'a plan has its recipe' if method == 'qlora' else method} has none")
        self.method, self.adapter, self.seed = method, adapter, seed
        self.folder = None if folder is None else Path(folder)
        self.history: History | None = None
        spec = spec or NF4Spec()
        self.recipe = Recipe.of(spec, "nf4" if isinstance(spec, NF4Spec) else "rtn")
        if isinstance(model, (str, Path)):
            # A folder's whole path, so that the result is read from any working directory.
            name = str(Path(model).resolve()) if Path(model).exists() else str(model)
            dtype = "fp32" if method == "full" else compute_dtype
            model = BasePlan(name, self.recipe, compute_dtype=dtype, device=device)
        self.plan = model if isinstance(model, BasePlan) else None
        if self.plan:
            self.recipe = self.plan.recipe
        self.lora = _with_defaults(lora) if method != "full" else {}
        self.residual = self.lora.get("init") in RESIDUAL_INITS  # starts from the dense weights
        self.from_lost = self.lora.get("init") in LOST_INITS  # from what rounding them lost
        self._check()
        if self.plan is None and tokenizer is None:
            raise ValueError("a model that is handed over needs its tokenizer too")
        if self.plan and method == "qlora" and not self.residual:
            before, (model, own) = None, quantized_base(self.plan, self.folder)
        else:
            model, own = self.plan.dense() if self.plan else (model, tokenizer)
            before = dense_linears(model, self.lora) if self.from_lost else None
            self._quantize(model)
        if self.plan:  # and not the run's own copy, which a second run finds
            model.config._name_or_path = self.plan.model
        self.model, self.tokenizer, self.layers = model, tokenizer or own, []
        if method == "full":
            model.float().requires_grad_(True)
        else:
            torch.manual_seed(seed)
            if self.from_lost:
                self.layers = start_from_lost(model, self.tokenizer, self.recipe, self.plan,
                                              self.lora, adapter, before)  # fmt: skip
            else:
                self._inject()
            set_adapter(model, adapter)  # what is trained is what calls use

    def _check(self) -> None:
        """Refuse inits that don't go with the base, and places that can't be written."""
        if self.plan and self.plan.stream and (self.residual or self.method != "qlora"):
            raise ValueError("stream quantizes block by block, and here the whole dense model is "
                             "needed; leave stream out")  # fmt: skip
        taken_apart = self.residual and self.method == "qlora"
        if taken_apart and self.plan and self.recipe.method == "gptq":
            raise ValueError(f"init {self.lora['init']} quantizes W - B A by itself, and GPTQ's "
                             "codes are made by calibration of the whole W; take nf4 or rtn")
        if self.lora.get("init") == "loftq" and self.method == "lora":
            raise ValueError("init loftq mends what quantization breaks, and a dense base has "
                             "nothing quantized; take nf4 or rtn, or init pissa")  # fmt: skip
        if self.from_lost:
            check_lost_start(self.lora["init"], self.method, self.plan, self.recipe)
        if self.folder and self.method != "full":
            check_place(self.folder / ADAPTER, ADAPTER_CONFIG)
        if self.folder and taken_apart:
            check_place(self.folder / BASE, QUANTIZATION)

    def _quantize(self, model) -> None:
        """Quantize a dense module if it is to be, and if no adapter takes it apart."""
        if self.method == "qlora" and quantized_layers(model):
            self.recipe = None  # it was given so
        elif quantized_layers(model):
            raise ValueError("the model is quantized: method='qlora' trains beside it, "
                             f"{self.method!r} needs dense weights")  # fmt: skip
        elif self.method == "qlora" and not self.residual:
            apply_recipe(model, self.recipe)

    def _inject(self) -> None:
        """Add the adapter; where it starts from the weights, the base becomes what it leaves."""
        lora, recipe = self.lora, self.recipe
        if not self.residual or self.method == "lora":
            self.layers = inject_lora(self.model, adapter=self.adapter, **lora)
            return
        if self.plan:
            print(f"base: {short_path(Path(self.plan.model))} taken apart by {lora['init']}, "
                  f"quantized with {recipe.method}")  # fmt: skip
        spec = recipe and recipe.spec
        self.layers = inject_lora(self.model, adapter=self.adapter, spec=spec, **lora)
        last = {path: path.rpartition(".")[2] for path in find_linears(self.model, "all")}
        others = tuple(sorted(set(last.values()) - {last[path] for path in self.layers}))
        if others:
            apply_recipe(self.model, dataclasses.replace(recipe, targets=others))
        if processes.world() > 1:  # each has made it; adapters are copied, this must be the same
            processes.agree("the residual base", residual_fingerprint(lora_layers(self.model)))
        if self.folder is not None and processes.first():
            how = {k: lora[k] for k in ("init", "rank")} | {"targets": lora["target_modules"]}
            said = self.plan.record() if self.plan else recipe.as_json()
            tell_of_orphan(self.folder)
            beside = {RECIPE: said | {"residual": how}}
            save_quantized(self.model, self.tokenizer, self.folder / BASE, beside)

    def fit(self, train, dev=None, config: TrainConfig = TrainConfig(),
            callback: Callback | Sequence[Callback] = (), best: bool = True) -> History:
        """Train; then, with `best`, put back the parameters of the lowest dev loss. train, dev: as
        read_examples takes them; without dev the last tenth of train is held out (at most 256),
        with an empty one nothing is. callback: one or several, that get each step's metrics.
        Raises ValueError for too few examples and a folder that can't be written."""
        train = read_examples(train, self.tokenizer)
        if dev is None:
            if len(train) < 2:
                raise ValueError(f"{len(train)} example can't be split; give a dev set")
            train, dev = hold_out(train, at_least=1)
        elif dev:
            dev = read_examples(dev, self.tokenizer)
        callbacks = [callback] if callable(callback) else callback
        alone = held(self.folder) if self.folder else nullcontext()
        with alone, tempfile.TemporaryDirectory() as scratch:
            place = self.folder / TRAINING if self.folder else Path(scratch)
            if self.folder:
                processes.on_first(self.try_saving)
            config = dataclasses.replace(config, folder=place)
            self.history = finetune(self.model, self.tokenizer, train, config, dev or None,
                                    lambda metrics: [call(metrics) for call in callbacks])
            if best and dev:
                processes.on_first(lambda: None)  # it has written them
                load_best(place, trainable_parameters(self.model), self.history.best)
        return self.history

    def try_saving(self) -> None:
        """Save, read back, remove: what would fail at the end fails now, with a ValueError."""
        trial, found = self.folder / "trial", 0
        try:
            self._write(trial)
            for file in trial.rglob("*.safetensors"):
                with open_tensors(file) as tensors:
                    found += len([tensors.get_slice(n).get_shape() for n in tensors.keys()])
        except OSError as error:
            raise ValueError(f"{short_path(self.folder)} can't hold the result ({error}); name "
                             "another folder") from error  # fmt: skip
        finally:
            if trial.is_dir():
                shutil.rmtree(trial)
        # Tied ones are stored once
        wanted = len({p.data_ptr() for p in trainable_parameters(self.model).values()})
        if found < wanted:
            raise ValueError(f"of {wanted} tensors, only {found} were read back from a trial")

    def _write(self, folder: Path) -> None:
        if self.method != "full":
            folder.mkdir(parents=True, exist_ok=True)
            save_adapter(self.model, folder / ADAPTER, self.adapter)
            return
        state = base_state(self.model)
        with atomic_folder(folder / MODEL, "config.json") as scratch:
            save_file(state, scratch / WEIGHTS, metadata={"format": "pt"})
            dtype = self.model.dtype
            save_settings(self.model, self.tokenizer, state, scratch, dtype=dtype)

    def save(self, folder: str | Path | None = None, **facts) -> Path:
        """Write the model (full) or the adapter, and run.json with further `facts`, to a folder,
        None for the tuner's, which is returned; ValueError for neither."""
        if folder is None and self.folder is None:
            raise ValueError("there is no folder to save in; give one")
        folder = Path(folder or self.folder)
        method = self.recipe.method if self.recipe else "given"
        method = method if self.method == "qlora" else "none"
        about = {
            "trained": self.method,
            "method": method,  # of the base's quantization
            "model": self.plan and self.plan.model,
            "adapter": self.adapter,
            "path": MODEL if self.method == "full" else ADAPTER,
            "targets": self.lora.get("target_modules"),
            "lora": {k: v for k, v in self.lora.items() if k != "target_modules"},
            "training": self.history and str(self.history),
        }
        if self.folder and self.method == "qlora" and (base := read_recipe(self.folder)):
            about["base"] = base
        elif method in ("nf4", "rtn"):
            about["recipe"] = self.recipe.as_json()  # the base is made again from it
        with held(folder):
            self._write(folder)
            about["result"] = result_hash(folder / about["path"])
            write_proved_json(folder / ABOUT, about | facts | {"stamp": stamp(self.seed)})
        return folder

    @classmethod
    def load(cls, folder: str | Path, model=None, tokenizer=None, **options):
        """(model, tokenizer) of what `save` wrote, as `load_run` gives it."""
        return load_run(folder, model, tokenizer, **options)

    def generate(self, prompts: Sequence[str], **decoding) -> list:
        """Completions of the prompts, with the keywords of Decoding: up to "Question:", as for
        gsm8k.PROMPT; for chats and prompts of your own give stop=()."""
        return generator(self.model, self.tokenizer, Decoding(**decoding))(prompts)

    def score(self, task: Task, pairs: Sequence[Pair]) -> Score:
        """Exact match on pairs of a task, by its rule."""
        return score(generator(self.model, self.tokenizer, task.decoding()), task, pairs)
