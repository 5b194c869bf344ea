"""What the commands share: options, the profile, a run's base and adapter."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..base.paths import given_path
from ..base.ranges import ANY_SEED, COUNT

# torch and transformers take seconds to import, so --help does without them, in all commands.


def text_of_path(text: str) -> str:
    """A path or another name, for argparse."""
    given_path(text)
    return text


SHARED = {  # options of most commands
    "profile": {"default": "tiny", "help": "tiny (default), smollm2 or llama2-7b"},
    "model": {"type": text_of_path, "help": "other weights: a hub id, a folder or a GGUF file; also $MODEL"},
    "data": {"type": text_of_path, "help": "gsm8k, or a folder with {split}.jsonl to use instead of the profile's "
             "problems; to train on, also metamathqa, mathinstruct, or a file or folder of your "
             "own (formats: qlora_lib/data/examples.py). GSM8K's folder is also $GSM8K_DIR"},
    "folder": {"type": given_path, "help": "of the run (default: checkpoints/PROFILE)"},
    "device": {"help": "cpu, cuda, cuda:1 ... (default: cuda where there is one)"},
    "compute-dtype": {"choices": ("auto", "bf16", "fp16", "fp32"), "help": "(default: profile's)"},
    "seed": {"type": ANY_SEED, "default": 0, "help": "(default: 0)"},
}  # fmt: skip
Needs = dict[str, tuple[str, Callable]]  # an option: with what it goes, and whether that is so


def add_command(commands, name: str, run, text: str, shared: str, *options, needs: Needs = {},
                asks: bool = False):  # fmt: skip
    """Add a command that calls run(args); returns what adds an option. shared: those of SHARED that
    it has. needs: options that go with others only. asks: a run's model."""
    command = commands.add_parser(name, parents=options, help=text)
    add = command.add_argument
    for option, how in SHARED.items():
        if option in shared.split():
            add(f"--{option}", **how)
    absent = {o.replace("-", "_"): how.get("default") for o, how in SHARED.items()}
    command.set_defaults(**absent, run=run, needs=needs, default=command.get_default)
    if "model" in shared.split():  # read now: where tests and notebooks set it
        command.set_defaults(model=os.environ.get("MODEL"))
    if asks:
        add("--dense", action="store_true", help="for a run made with --method none")
        add("--no-adapter", action="store_true", help="the base model alone")
        add("--max-new-tokens", type=COUNT, help="(default: the profile's)")
        add("--cache-bits", type=int, choices=(8, 4), help="of the keys and values of old tokens")
    return add


def check_needs(args: argparse.Namespace, needs: Needs, default: Callable) -> None:
    """Raise ValueError for an option that is given beside others with which it would do nothing.
    default: gives the value of one that is not given."""
    for name, (what, holds) in needs.items():
        if getattr(args, name) != default(name) and not holds(args):
            raise ValueError(f"--{name.replace('_', '-')} goes only {what}; leave it out, or change "
                             "the other")  # fmt: skip


def grid(bits: int | None, group_size: int | None):
    """The QuantSpec that --bits and --group-size mean; 4 and 64 where they are not given."""
    from ..quant.grid import QuantSpec

    size = 64 if group_size is None else group_size
    return QuantSpec(4 if bits is None else bits, size or None)


def check_device(device: str | None) -> None:
    """Raises ValueError for a device that torch does not know or that is not here."""
    import torch

    try:
        wanted = torch.device("cpu" if device is None else device)
        if wanted.type != "cuda":  # which would take memory of the first GPU
            torch.zeros(1, device=wanted).cpu()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: expected cpu, cuda, cuda:1 ...") from error
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted.type == "cuda" and (wanted.index or 0) >= here:
        raise ValueError(f"--device {device}: this torch sees {here} CUDA devices")


@dataclass(frozen=True)
class Opened:
    """What the options of every command name."""

    profile: object  # runs/profiles.py
    folder: Path  # of the run
    source: str | None  # what to train on; None: the profile's problems
    device: str | None
    compute_dtype: str

    def command(self, name: str) -> str:
        """A command for this profile, as errors advise it."""
        return f"`python -m qlora_lib {name} --profile {self.profile.name}`"

    def base(self, remedy: str) -> Path:
        """The run's quantized base; FileNotFoundError, with the command that makes it, for none."""
        from ..base.paths import short_path
        from ..runs.run_folder import BASE

        base, remedy = self.folder / BASE, self.command(remedy)
        if not base.is_dir():
            raise FileNotFoundError(f"there is no quantized base {short_path(base)}; {remedy}")
        return base


def open_options(args) -> Opened:
    from transformers.utils.logging import disable_progress_bar

    from ..runs.profiles import load_profile

    disable_progress_bar()
    problems, folder, source = read_data_option(args)
    profile = load_profile(args.profile, args.model, folder, problems)
    folder = args.folder or Path("checkpoints") / profile.name
    dtype = args.compute_dtype or profile.compute_dtype
    return Opened(profile, folder, source, args.device, dtype)


def read_data_option(args) -> tuple[str | None, str | None, str | None]:
    """(kind of problems, None for the profile's; their folder; what to train on, None for them).
    Training sets go with GSM8K's problems, your own files with the profile's."""
    from ..data.sources import TRAINING_SETS, data_file, holds_problems

    data, gsm8k = args.data, os.environ.get("GSM8K_DIR")
    if data == "gsm8k" or data in TRAINING_SETS:
        return "gsm8k", gsm8k, None if data == "gsm8k" else data
    if data is not None and not Path(data).exists():
        names = ", ".join(("gsm8k", *TRAINING_SETS))
        raise FileNotFoundError(f"there is no folder or file {data}; --data also takes {names}")
    if data and not (Path(data).is_file() or Path(data).is_dir()):
        raise ValueError(f"--data {data} is neither a file nor a folder")
    if data and holds_problems(Path(data)):
        return None, data, None
    if data and Path(data).is_dir():
        data_file(Path(data))  # which says what is missing
    if data and args.command not in ("quantize", "finetune", "export"):
        raise ValueError(f"--data {data} is something to train on; {args.command} asks problems: "
                         "name a folder with test.jsonl (question, answer), or leave it out")
    return None, None if args.profile == "tiny" else gsm8k, data


def make_decoding(opened: Opened, args, **settings):
    from ..generation.generate import Decoding

    length = args.max_new_tokens or opened.profile.max_new_tokens
    return Decoding(max_new_tokens=length, cache_bits=args.cache_bits, **settings)


def open_run(opened: Opened, dense: bool, adapter: bool):
    """(model, tokenizer) of the run's base, quantized unless `dense`, with its adapter or bare."""
    from ..base.lock import check_free
    from ..base.paths import short_path
    from ..lora.files import load_adapter
    from ..models.quantize import quantized_layers
    from ..runs.run_folder import check_base, load_base, read_run

    folder, remedy = opened.folder, opened.command("finetune")
    check_free(folder)
    try:
        about = read_run(folder) if adapter else None
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {remedy}") from None
    if about and (about["trained"] == "lora") != dense:
        found = "quantized base; leave out --dense"
        if not dense:
            found = f"dense base: its layers are not quantized; give --dense, or {remedy}"
        raise ValueError(f"the adapter in {short_path(folder)} was trained on a {found}")
    where = {"device": opened.device, "compute_dtype": opened.compute_dtype}
    if dense:
        model, tokenizer = opened.profile.load(**where)
    else:
        opened.base("finetune")
        if about:
            check_base(folder)
        try:
            model, tokenizer = load_base(folder, **where)
        except ValueError as error:
            raise ValueError(f"{error}; {remedy}") from error
        layers = quantized_layers(model).values()
        specs = ", ".join(sorted({str(layer.spec) for layer in layers}))
        print(f"checked: all {len(layers)} linear layers are quantized, {specs}")
    if about:
        adapted = load_adapter(model, folder / about["path"])
        print(f"adapter on {len(adapted)} layers")
    return model, tokenizer
