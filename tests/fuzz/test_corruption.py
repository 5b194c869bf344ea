"""Files that this project writes, damaged at random: what loads is what was saved, else the error
names the damaged file.

Each try copies the files of a format, damages one of them (a flipped bit, a truncation, a block of
zeros, a block of elsewhere) or several (two swapped, one deleted), and reads them again.
"""

import random
import shutil
from pathlib import Path

import pytest
import torch

from course.kit import OUTPUTS_VARIABLE
from course.kit.record import Recorder, merge
from experiments.table import Table
from qlora_lib.evaluation.evaluate import EvalReport, evaluate
from qlora_lib.evaluation.tasks import Task
from qlora_lib.evaluation.verifier import Verifier, train_verifier
from qlora_lib.formats.compressed_tensors import export_compressed, import_compressed
from qlora_lib.formats.gguf_checkpoint import export_gguf
from qlora_lib.formats.gptq_checkpoint import export_gptq, import_gptq
from qlora_lib.generation.generate import Completion, Generator
from qlora_lib.lora.files import load_adapter
from qlora_lib.lora.inject import inject_lora
from qlora_lib.lora.layer import lora_layers
from qlora_lib.models.checkpoint import load_quantized, save_quantized
from qlora_lib.models.gguf_folder import ADAPTER, read_gguf_adapter
from qlora_lib.models.load import load_model
from qlora_lib.models.quantize import quantize_model
from qlora_lib.quant.fp4 import FP4Spec
from qlora_lib.quant.fp8 import FP8Spec
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.quant.nf4 import NF4Spec
from qlora_lib.runs.finetuner import Finetuner
from qlora_lib.runs.run_folder import load_run, read_run
from qlora_lib.search.rank_search import Search, Trial
from qlora_lib.train.config import TrainConfig
from qlora_lib.train.finetune import finetune
from tests.support.fuzzing import Tally, TooLong, deadline, model_and_tokenizer, plain
from tests.support.small_models import PAIRS, small_model, small_tokenizer
from tests.support.streamed_models import store, stream
from tests.support.trained_adapter import make_adapter

FORMATS = {}
GRID = QuantSpec(4, 32, clip_search=False)
TRAINING = TrainConfig(max_steps=2, batch_size=4, lr=1e-2, compute_dtype="fp32", save_every=1,
                       progress=False)  # fmt: skip
PROBLEMS = [{"question": f"{i} + {i}?", "answer": f"#### {2 * i}"} for i in range(6)]
TASK = Task("toy", lambda said, target: said == target, 2)
CLOCK = ("seconds", "tokens_per_second", "peak_memory")  # never twice the same


def format_of(name: str, together: bool = True):
    """Register a class as a format: write(folder) makes its files, and what read(folder) returns
    is compared. together: a file that is missing is missed; False: each file stands alone."""

    def register(made):
        FORMATS[name], made.together = made, together
        return made

    return register


def timeless(rows) -> list:
    return plain([{k: v for k, v in row.items() if k not in CLOCK} for row in rows])


@format_of("quantized grid")
class Quantized:
    spec = GRID

    @classmethod
    def write(cls, folder):
        model = small_model(layers=1)
        quantize_model(model, None, cls.spec, "nf4" if cls.spec == NF4Spec() else "rtn")
        save_quantized(model, small_tokenizer(), folder)

    @staticmethod
    def read(folder):
        return model_and_tokenizer(load_quantized(folder, "cpu", "fp32"))


@format_of("quantized nf4")
class QuantizedNF4(Quantized):
    spec = NF4Spec()


@format_of("quantized mxfp4")
class QuantizedMXFP4(Quantized):
    spec = FP4Spec("mxfp4")


@format_of("quantized nvfp4")
class QuantizedNVFP4(Quantized):
    spec = FP4Spec("nvfp4")


@format_of("quantized e4m3")
class QuantizedE4M3(Quantized):
    spec = FP8Spec()


@format_of("streamed")
class Streamed(Quantized):
    @staticmethod
    def write(folder):
        stream(store(folder.with_name("dense"), shard_size="100kB"), folder)


class Killed(Exception):
    pass


@format_of("streamed, unfinished")
class Unfinished(Quantized):
    """Killed after the first of two blocks; to read is to go on."""

    @staticmethod
    def write(folder):
        def kill(row):
            if ".layers.1." in row.name:
                raise Killed

        folder.mkdir()
        with pytest.raises(Killed):
            stream(store(folder.with_name("dense")), folder / "out", progress=kill)
        assert (folder / "out.unfinished").is_dir()

    @classmethod
    def read(cls, folder):
        stream(folder.with_name("dense"), folder / "out")
        return super().read(folder / "out")


@format_of("gptq export")
class Exported:
    @staticmethod
    def write(folder):
        model = small_model(layers=1)
        quantize_model(model, None, GRID, "rtn")
        export_gptq(model, folder, tokenizer=small_tokenizer(), max_shard_size="50kB")

    @staticmethod
    def read(folder):
        return model_and_tokenizer(import_gptq(folder, "cpu", "fp32"))


@format_of("compressed-tensors export")
class ExportedFP4:
    @staticmethod
    def write(folder):
        model = small_model(layers=1)
        quantize_model(model, None, FP4Spec("nvfp4"), "rtn", target_modules=("o_proj", "up_proj"))
        export_compressed(model, folder, small_tokenizer(), max_shard_size="50kB")

    @staticmethod
    def read(folder):
        return model_and_tokenizer(import_compressed(folder, "cpu", "fp32"))


@format_of("gguf export")
class ExportedGGUF:
    @staticmethod
    def write(folder):
        model = small_model(layers=1)
        quantize_model(model, None, GRID, "rtn")
        inject_lora(model, ("q_proj", "down_proj"), rank=2)
        export_gguf(model, folder, small_tokenizer())

    @staticmethod
    def read(folder):
        model, tokenizer = load_model(folder, "cpu", "fp32")
        read_gguf_adapter(model, folder / ADAPTER)
        return model_and_tokenizer((model, tokenizer))


@format_of("adapter")
class Adapter:
    @staticmethod
    def write(folder):
        make_adapter(folder, seed=0)

    @staticmethod
    def read(folder):
        model = small_model()
        load_adapter(model, folder)
        return plain([model, {name: layer.configs for name, layer in lora_layers(model).items()}])


def adapted():
    model = small_model(layers=1)
    torch.manual_seed(0)
    inject_lora(model, ("q_proj", "down_proj"), rank=2)
    return model


@format_of("training checkpoint")
class Checkpoint:
    """Two steps of four; to read is to resume."""

    @staticmethod
    def write(folder):
        def kill(metrics):
            if metrics["step"] == 2:
                raise Killed

        with pytest.raises(Killed):
            Checkpoint.train(folder, callback=kill)

    @staticmethod
    def train(folder, **given):
        config = TrainConfig(**vars(TRAINING) | {"max_steps": 4, "folder": folder, "resume": True})
        model = adapted()
        return model, finetune(model, small_tokenizer(), PAIRS[:12], config, PAIRS[12:15], **given)

    @classmethod
    def read(cls, folder):
        model, history = cls.train(folder)
        return plain(model), timeless(history.steps)


@format_of("run folder")
class Run:
    @staticmethod
    def write(folder):
        dense = folder.with_name("dense")
        small_model(layers=1).save_pretrained(dense)
        small_tokenizer().save_pretrained(dense)
        tuner = Finetuner(dense, method="qlora", folder=folder, compute_dtype="fp32", rank=2)
        tuner.fit(PAIRS[:8], PAIRS[8:10], TRAINING)
        tuner.save()

    @staticmethod
    def read(folder):
        return model_and_tokenizer(load_run(folder, None, None, "cpu", "fp32")), read_run(folder)


@format_of("run folder, full")
class FullRun(Run):
    @staticmethod
    def write(folder):
        model = small_model(layers=1)
        tuner = Finetuner(model, small_tokenizer(), method="full", folder=folder)
        tuner.fit(PAIRS[:8], PAIRS[8:10], TRAINING)
        tuner.save()


@format_of("verifier")
class Judge:
    @staticmethod
    def write(folder):
        verifier = Verifier(small_model(layers=1), small_tokenizer(), rank=2)
        said = [target for _, target in PAIRS[:8]]
        train_verifier(verifier, [PAIRS[0][0]] * 8, said, [True, False] * 4, TRAINING)
        verifier.save(folder)

    @staticmethod
    def read(folder):
        return plain(Verifier.load(small_model(layers=1), small_tokenizer(), folder).parameters)


@format_of("evaluation")
class Evaluation:
    asked = len(PROBLEMS)

    @staticmethod
    def answer(prompts):
        return [Completion(f"it is\n#### {len(prompt) % 7}", 5, True) for prompt in prompts]

    @classmethod
    def write(cls, folder):
        evaluate(Generator(cls.answer, {"model": "toy"}), PROBLEMS, folder, chunk=2, canaries=False)

    @staticmethod
    def read(folder):
        return plain(EvalReport.load(folder))


@format_of("evaluation, unfinished")
class UnfinishedEvaluation(Evaluation):
    """Killed after four of six questions; to read is to go on."""

    @classmethod
    def write(cls, folder):
        def kill(prediction):
            if prediction.question == PROBLEMS[3]["question"]:
                raise Killed

        with pytest.raises(Killed):
            evaluate(Generator(cls.answer, {"model": "toy"}), PROBLEMS, folder, chunk=2,
                     canaries=False, callback=kill)  # fmt: skip

    @classmethod
    def read(cls, folder):
        super().write(folder)
        report = EvalReport.load(folder)
        return timeless(map(vars, report.predictions)), timeless([report.summary()])


@format_of("rank search", together=False)
class Trials:
    @staticmethod
    def search(folder):
        config = TrainConfig(max_steps=1, batch_size=4, compute_dtype="fp32", progress=False)
        return Search(small_model(layers=1), small_tokenizer(), TASK, PAIRS[:6], PAIRS[6:9],
                      config, folder / "search.json")  # fmt: skip

    @classmethod
    def write(cls, folder):
        folder.mkdir()
        for rank in (1, 2):
            cls.search(folder).run(Trial(rank=rank))

    @classmethod
    def read(cls, folder):
        return plain(cls.search(folder).rows)


@format_of("experiment's table", together=False)
class Results:
    @staticmethod
    def write(folder):
        folder.mkdir()
        table = Table(folder / "table.json", seed=3)
        for i, name in enumerate("abc"):
            table.keep(name, {"accuracy": i / 7, "n": 100 * i})

    @staticmethod
    def read(folder):
        return plain(Table(folder / "table.json", seed=3).rows)


@format_of("record of run-all", together=False)
class Record:
    @staticmethod
    def write(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(OUTPUTS_VARIABLE, str(folder))
            for book in ("01_a", "02_b"):
                record = Recorder(book, "tiny", 0)
                for i in range(5):
                    record(f"{book} number {i}", i / 3)

    @staticmethod
    def read(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(OUTPUTS_VARIABLE, str(folder))
            (folder / "tiny" / "metrics.json").unlink(missing_ok=True)  # made by what follows
            return plain(merge("tiny"))


def damage(folder: Path, draw: random.Random, together: bool) -> tuple[list[str], str]:
    """Damage files of `folder`, and return their names and what was done."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    path = draw.choice(files)
    name, data = path.relative_to(folder).as_posix(), bytearray(path.read_bytes())
    kinds = ["bit"] * 6 + ["cut", "zeros", "block"]
    kinds += ["swap"] * (len(files) > 1) + ["delete"] * together
    kind = draw.choice(kinds)
    at = draw.randrange(len(data))
    size = draw.choice((1, 16, 512))
    if kind == "delete":
        path.unlink()
        return [path.name, folder.name], f"{name} deleted"
    if kind == "swap":
        other = draw.choice([p for p in files if p != path])
        theirs = other.read_bytes()
        other.write_bytes(data)
        path.write_bytes(theirs)
        return [path.name, other.name], f"{name} and {other.relative_to(folder)} swapped"
    if kind == "bit":
        bit = draw.randrange(8)
        data[at] ^= 1 << bit
        said = f"bit {bit} of byte {at} of {name} flipped"
    elif kind == "cut":
        del data[at:]
        said = f"{name} cut to {at} bytes"
    elif kind == "zeros":
        data[at : at + size] = bytes(len(data[at : at + size]))
        said = f"{size} bytes from {at} of {name} zeroed"
    else:
        source = draw.randrange(len(data))
        block = data[source : source + size]
        data[at : at + len(block)] = block
        said = f"{size} bytes of {name} copied from {source} to {at}"
    path.write_bytes(data)
    names = [path.name]
    if path.name == "hashes.json":  # what it says of another file was changed
        names += [p.name for p in files]
    return names, said


@pytest.mark.parametrize("name", FORMATS)
def test_what_loads_is_what_was_saved(name, tmp_path, tries, seed, capfd):
    kept, made = FORMATS[name], tmp_path / "made"
    kept.write(made)
    shutil.copytree(made, folder := tmp_path / "tried")
    saved, tally = kept.read(folder), Tally(seed)
    for number in range(tries):
        shutil.rmtree(folder)
        shutil.copytree(made, folder)
        names, done = damage(folder, random.Random(f"{seed} {name} {number}"), kept.together)
        try:
            with deadline(30):
                loaded = kept.read(folder)
        except (ValueError, OSError) as error:
            named = any(n in str(error) for n in names)
            tally.add(number, "ok refused" if named else "unnamed", f"{done}: {error}")
        except TooLong as error:
            tally.add(number, "hang", f"{done}: {error}")
        except Exception as error:
            tally.add(number, "traceback", f"{done}: {type(error).__name__}: {error}")
        else:
            tally.add(number, "ok same" if loaded == saved else "silent", done)
    capfd.readouterr()
    tally.check()
