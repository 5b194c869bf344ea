"""One object from a model and data to a saved result: full fine-tuning, LoRA or QLoRA.

    tuner = Finetuner("data/tiny-llama", method="qlora", folder="outputs/mine")
    tuner.fit("my.jsonl", config=TrainConfig(epochs=2), callback=print)
    tuner.generate(["Question: ..."]);  tuner.save();  Finetuner.load("outputs/mine")

Thin over load_model, quantize_model, inject_lora, finetune, generator and save_adapter: what
these check and raise holds here. Of a run the parameters at the lowest dev loss are kept.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..base.files import atomic_folder, check_place, open_tensors, read_json, write_json_atomic
from ..base.paths import short_path
from ..data.examples import hold_out, read_examples
from ..data.tokens import Pair
from ..evaluation.tasks import Score, Task, score
from ..generation.generate import Decoding, generator
from ..lora.files import load_adapter, save_adapter
from ..lora.inject import inject_lora, set_adapter, trainable_parameters
from ..lora.layer import adapter_names
from ..models.load import load_model
from ..models.quantize import quantize_model, quantized_layers
from ..quant.nf4 import NF4Spec
from ..train.config import TrainConfig
from ..train.finetune import History, finetune
from ..train.snapshots import load_parameters

METHODS = ("full", "lora", "qlora")
ABOUT = "finetuner.json"
Callback = Callable[[dict], None]


class Finetuner:
    """A model that learns by one of three methods.

    model: a hub id, a folder or a GGUF file, or a causal model itself (then give `tokenizer`);
    a model that is handed over is changed in place, and the adapter becomes its default. method:
    "full" trains every weight; "lora" an adapter beside dense weights; "qlora" beside quantized
    ones: quantized here to `spec` (NF4, or a QuantSpec rounded to nearest), unless the model that
    is handed over already is (by GPTQ, say). folder: for metrics.jsonl, checkpoints and the
    result; None: nothing is kept on disk. Further keywords go to inject_lora, such as rank,
    alpha, target_modules and init.
    Raises ValueError for another method, a module without a tokenizer, LoRA's settings with
    "full", and a quantized model with "full" or "lora"; and what the parts raise.
    """

    def __init__(
        self, model, tokenizer=None, method: str = "qlora", folder: str | Path | None = None,
        spec=NF4Spec(), adapter: str = "default", seed: int = 0, device=None,
        compute_dtype: str = "auto", **lora,
    ):  # fmt: skip
        if method not in METHODS:
            raise ValueError(f"method={method!r}; expected one of {', '.join(METHODS)}")
        if method == "full" and lora:
            raise ValueError(f"{sorted(lora)} are LoRA's; method='full' trains every weight")
        self.source = None
        if isinstance(model, (str, Path)):
            # A folder's whole path, so that the result is read from any working directory.
            self.source = str(Path(model).resolve()) if Path(model).exists() else str(model)
            model, own = load_model(model, device, compute_dtype)
            tokenizer = tokenizer or own
        elif tokenizer is None:
            raise ValueError("a model that is handed over needs its tokenizer too")
        quantized = bool(quantized_layers(model))
        if quantized and method != "qlora":
            raise ValueError(
                f"the model is quantized: method='qlora' trains beside it, {method!r} needs "
                "dense weights"
            )
        if method == "qlora" and not quantized:
            how = "nf4" if isinstance(spec, NF4Spec) else "rtn"
            quantize_model(model, None, spec, how, target_modules="all")
        if method == "full":
            model.requires_grad_(True)
        else:
            torch.manual_seed(seed)
            lora = {"target_modules": "all", "rank": 16} | lora
            if "alpha" not in lora:
                if isinstance(lora["rank"], dict):
                    raise ValueError("a rank a layer needs one alpha for all of them; give alpha=")
                lora["alpha"] = 2 * lora["rank"]
            inject_lora(model, adapter=adapter, **lora)
            set_adapter(model, adapter)  # what is trained is what calls use
        self.model, self.tokenizer, self.method = model, tokenizer, method
        self.spec, self.adapter = (spec if method == "qlora" and not quantized else None), adapter
        self.folder = None if folder is None else Path(folder)
        self.history: History | None = None

    def fit(self, train, dev=None, config: TrainConfig = TrainConfig(),
            callback: Callback | Sequence[Callback] = ()) -> History:  # fmt: skip
        """Train; then put back the parameters of the lowest dev loss.

        train, dev: as read_examples takes them; without dev the last tenth of train is held out
        (at most 256). callback: called with each step's metrics, or several that are. Before the
        first step, saving and reading back is tried in the folder. Raises ValueError for no
        examples, for fewer than two without a dev set, and for a folder that can't be written.
        """
        train = read_examples(train, self.tokenizer)
        if dev is None:
            if len(train) < 2:
                raise ValueError(f"{len(train)} example can't be split; give a dev set")
            train, dev = hold_out(train, at_least=1)
        else:
            dev = read_examples(dev, self.tokenizer)
        callbacks = [callback] if callable(callback) else list(callback)
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            if self.folder is not None:
                place = self.folder / "training"
                self.try_saving()
            config = dataclasses.replace(config, folder=place)
            self.history = finetune(
                self.model, self.tokenizer, train, config, dev,
                lambda metrics: [call(metrics) for call in callbacks],
            )  # fmt: skip
            load_parameters(place / "best.safetensors", trainable_parameters(self.model))
        return self.history

    def try_saving(self) -> None:
        """Save into the folder, read back, remove: what would fail at the end fails now.

        Raises ValueError where the folder can't be written, gives back something else, or has
        other files where the result should be.
        """
        trial = self.folder / "trial"
        try:
            check_place(self.folder / "result", ABOUT)
            self._write(trial)
            wanted = self._tensors()
            found = {}
            for file in sorted(trial.rglob("*.safetensors")):
                with open_tensors(file) as tensors:
                    found |= {n: tensors.get_slice(n).get_shape() for n in tensors.keys()}
        except OSError as error:
            raise ValueError(
                f"{short_path(self.folder)} can't hold the result ({error}); name another folder"
            ) from error
        finally:
            if trial.exists():
                shutil.rmtree(trial)
        if len(found) < wanted:
            raise ValueError(f"of {wanted} tensors, only {len(found)} were read back from a trial")

    def _tensors(self) -> int:
        """How many tensors the saved result has at least."""
        trained = trainable_parameters(self.model)
        return len({p.data_ptr() for p in trained.values()})  # tied ones are stored once

    def _write(self, folder: Path) -> None:
        if self.method == "full":
            self.model.save_pretrained(folder / "model")
            self.tokenizer.save_pretrained(folder / "model")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            save_adapter(self.model, folder / "adapter", self.adapter)

    def save(self, folder: str | Path | None = None) -> Path:
        """Write the result: the model (full), or the adapter, and what it stands on. Its path.

        Raises ValueError without a folder, here or when the tuner was made.
        """
        folder = Path(folder) if folder is not None else self.folder
        if folder is None:
            raise ValueError("there is no folder to save in; give one")
        with atomic_folder(folder / "result", ABOUT) as scratch:
            self._write(scratch)
            write_json_atomic(scratch / ABOUT, {
                "method": self.method,
                "model": self.source,
                "adapter": self.adapter,
                "spec": self.spec and {type(self.spec).__name__: dataclasses.asdict(self.spec)},
            })  # fmt: skip
        return folder / "result"

    @classmethod
    def load(cls, folder: str | Path, model=None, tokenizer=None, **options):
        """(model, tokenizer) of what `save` wrote, in eval mode.

        model, tokenizer: the base that was handed over to the tuner, for which no name is known;
        a dense one is quantized in place, where the tuner did that. options: device and
        compute_dtype. Raises FileNotFoundError, and ValueError where the base is not known or
        another one.
        """
        from ..quant.grid import QuantSpec

        folder = Path(folder) / "result"
        about = read_json(folder / ABOUT)
        if about["method"] == "full":
            return load_model(folder / "model", **options)
        if model is None:
            if about["model"] is None:
                raise ValueError(f"{short_path(folder)}: the base was handed over as a module; "
                                 "give model= and tokenizer=")  # fmt: skip
            model, tokenizer = load_model(about["model"], **options)
        for kind, settings in (about["spec"] or {}).items() if not quantized_layers(model) else ():
            spec = {"NF4Spec": NF4Spec, "QuantSpec": QuantSpec}[kind](**settings)
            how = "nf4" if kind == "NF4Spec" else "rtn"
            quantize_model(model, None, spec, how, target_modules="all")
        if bool(quantized_layers(model)) != (about["method"] == "qlora"):
            kinds = {"qlora": "a quantized", "lora": "a dense"}
            raise ValueError(f"{short_path(folder)}: the adapter was trained on "
                             f"{kinds[about['method']]} base; give that one")  # fmt: skip
        name = about["adapter"]
        if name in adapter_names(model):
            raise ValueError(f"the model has an adapter {name!r} already; give its bare base")
        load_adapter(model, folder / "adapter", name)
        set_adapter(model, name)
        return model.eval(), tokenizer

    def generate(self, prompts: Sequence[str], **decoding) -> list:
        """Completions of the prompts; keywords are those of Decoding.

        They end before "Question:", as answers to data.PROMPT should; for chats and prompts of
        your own give stop=().
        """
        return generator(self.model, self.tokenizer, Decoding(**decoding))(prompts)

    def score(self, task: Task, pairs: Sequence[Pair]) -> Score:
        """Exact match on pairs of a task, by its rule."""
        return score(generator(self.model, self.tokenizer, task.decoding()), task, pairs)


def tensorboard(folder: str | Path) -> Callback:
    """A callback that writes each step's metrics for TensorBoard.

    Raises ModuleNotFoundError, with the command that helps, where it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "TensorBoard is not installed: python -m pip install tensorboard", name="tensorboard"
        ) from error
    writer = SummaryWriter(str(folder))

    def write(metrics: dict) -> None:
        for name in ("loss", "dev_loss", "lr", "grad_norm", "tokens_per_second", "peak_memory"):
            if metrics.get(name) is not None:
                writer.add_scalar(name, metrics[name], metrics["step"])
        writer.flush()

    return write
