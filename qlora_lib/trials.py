"""One training of a search: what is trained, and how; a model set up for it.

search.py runs trials, stores them and chooses among them.
"""

from dataclasses import dataclass, replace

import torch

from .blocks import linears_in_blocks
from .lora import find_linears, inject_lora, linear_layers, trainable_parameters
from .models import quantized_layers
from .schedule import TrainConfig

PLACES = ("all", "attention", "mlp", "embeddings")


@dataclass(frozen=True)
class Trial:
    """One training: what is trained, and how. None: as the search's TrainConfig says.

    steps or epochs, not both; either replaces what the search says of both. examples: train on
    the first so many pairs of the search alone; None: on all. alpha None: 2 rank.
    """

    method: str = "lora"  # or "full": every weight, or the embeddings alone
    rank: int | None = 8
    target_modules: str | tuple[str, ...] = "all"  # or one of PLACES
    lr: float | None = None
    steps: int | None = None
    epochs: int | None = None
    seed: int = 0
    examples: int | None = None
    alpha: float | None = None

    def __post_init__(self):
        if self.method not in ("lora", "full"):
            raise ValueError(f"method={self.method!r}; expected 'lora' or 'full'")
        if self.method == "lora" and (self.rank is None or self.rank < 1):
            raise ValueError(f"rank={self.rank} must be at least 1")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps={self.steps} and epochs={self.epochs}; give one of them")
        if self.method == "lora" and self.target_modules == "embeddings":
            raise ValueError("embeddings are trained whole: Trial(method='full', rank=None, "
                             "target_modules='embeddings')")  # fmt: skip

    def config(self, base: TrainConfig) -> TrainConfig:
        """The search's settings with this trial's."""
        if self.epochs is not None:
            base = replace(base, max_steps=None)  # which would win over epochs
        own = {"lr": self.lr, "max_steps": self.steps, "epochs": self.epochs, "seed": self.seed}
        return replace(base, **{name: value for name, value in own.items() if value is not None})

    def __str__(self) -> str:
        where = self.target_modules
        where = where if isinstance(where, str) else "+".join(where)
        words = [self.method, where] + ([f"r={self.rank}"] if self.method == "lora" else [])
        for name in ("alpha", "lr", "steps", "epochs", "examples"):
            if getattr(self, name) is not None:
                words.append(f"{name}={getattr(self, name):g}")
        return " ".join([*words, f"seed={self.seed}"])


def prepare(model, trial: Trial) -> int:
    """Set up the model, in place, for a trial; the number of parameters that it trains.

    LoRA without an alpha has alpha = 2 rank: a scale of 2 at every rank. At one learning rate a
    small rank then takes smaller steps: under Adam each number of B moves by about the rate, and
    an update sums over `rank` of them. Raises ValueError for "full" on a quantized model, and
    what inject_lora raises.
    """
    places = trial.target_modules
    if trial.method == "full":
        if quantized_layers(model) and places != "embeddings":
            raise ValueError("quantized weights can't be trained; method='lora' trains beside them")
        model.requires_grad_(places == "all")
        if places != "all":
            for module in _whole(model, places):
                module.requires_grad_(True)
    else:
        torch.manual_seed(trial.seed)
        names = mlp_names(model) if places == "mlp" else places
        alpha = 2 * trial.rank if trial.alpha is None else trial.alpha
        inject_lora(model, names, rank=trial.rank, alpha=alpha)
    return sum(p.numel() for p in trainable_parameters(model).values())


def _whole(model, places) -> list[torch.nn.Module]:
    if places == "embeddings":
        return [model.get_input_embeddings()]
    return list(find_linears(model, mlp_names(model) if places == "mlp" else places).values())


def mlp_names(model) -> tuple[str, ...]:
    """Last path components of the blocks' linears outside of attention."""
    linears = linear_layers(model)
    attention = set(linears_in_blocks(model, linears, "attention"))
    rest = [p for p in linears_in_blocks(model, linears, "all") if p not in attention]
    return tuple(dict.fromkeys(path.rpartition(".")[2] for path in rest))
