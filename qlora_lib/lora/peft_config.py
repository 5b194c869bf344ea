"""adapter_config.json as PEFT 0.21 has it: which layers, of what rank, and what is refused."""

import math
from contextlib import suppress
from pathlib import Path
from statistics import mode

import regex
from torch import nn

from .layer import LoRAConfig, lora_layers, named
from .targets import linear_layers

REQUIRED = ("r", "lora_alpha", "target_modules")
READ = {
    *REQUIRED, "peft_type", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights",
    "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
}  # fmt: skip
# They say where an adapter comes from, or have a meaning only together with one of REFUSED.
HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "runtime_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size",
}  # fmt: skip
# They make the adapter more, or other, than what layer.py computes on linear layers.
REFUSED = {
    "bias", "lora_bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices",
    "ensure_weight_tying", "layer_replication", "target_parameters", "use_qalora",
    "alora_invocation_tokens", "megatron_config", "arrow_config", "use_bdlora", "kasa_config",
    "monteclora_config", "velora_config",
}  # fmt: skip
# Initializations that leave the base alone; the others move a part of it into the adapter.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# What an expression in a file may cost: characters, repeats ({2}{3} are 6), seconds at a path
LONGEST, MOST_REPEATS, PATIENCE = 10_000, 1_000, 1.0
PLACES = ("target_modules", "exclude_modules", "layers_pattern")
PATTERNS = ("rank_pattern", "alpha_pattern")
KINDS = {
    **dict.fromkeys(PLACES, (str, list)),
    **dict.fromkeys(PATTERNS, (dict,)),
    **dict.fromkeys(("lora_alpha", "lora_dropout"), (int, float)),
    **dict.fromkeys(("use_rslora", "use_dora"), (bool,)),
    "layers_to_transform": (int, list),
    "r": (int,),
}


def read_config(path: Path, described: dict, model: nn.Module) -> dict[str, LoRAConfig]:
    """The layers of `model`, each with its configuration, that the content of adapter_config.json
    names; `path` is for errors. Raises ValueError for settings that are missing, unknown or not
    supported here, and when no layer matches."""
    configs = {}
    with named(str(path)):
        _refuse(described)
        init = "gaussian" if described.get("init_lora_weights") == "gaussian" else "kaiming"
        shared = {"dropout": described.get("lora_dropout") or 0.0, "init": init}
        shared |= {flag: described.get(flag) or False for flag in ("use_rslora", "use_dora")}
        for name in _targets(described, model):
            rank = _by_pattern(described.get("rank_pattern"), name, described["r"])
            alpha = _by_pattern(described.get("alpha_pattern"), name, described["lora_alpha"])
            if type(rank) is not int or type(alpha) not in (int, float):
                raise ValueError(f"rank {rank!r} and alpha {alpha!r} of {name} must be numbers")
            configs[name] = LoRAConfig(rank, alpha, **shared)
    return configs


def describe(model: nn.Module, configs: dict[str, LoRAConfig]) -> dict:
    """The settings of adapter_config.json from which PEFT makes these layers (configurations by
    path) again. Raises ValueError when they differ in what PEFT has one value for."""
    configs = dict(sorted(configs.items()))  # of equally many the first counts, in any model
    for field in ("dropout", "use_rslora", "use_dora"):
        values = {getattr(config, field) for config in configs.values()}
        if len(values) > 1:
            raise ValueError(f"the layers differ in {field}, {sorted(values)}; PEFT's file holds "
                             "one value: put the layers into adapters of their own")  # fmt: skip
    first, inits = next(iter(configs.values())), {config.init for config in configs.values()}
    rank, alpha = mode(c.rank for c in configs.values()), mode(c.alpha for c in configs.values())
    described = {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.use_rslora,
        "use_dora": first.use_dora,
        "init_lora_weights": "gaussian" if inits == {"gaussian"} else True,
        "target_modules": sorted({path.rpartition(".")[2] for path in configs}),
        "bias": "none",
    }
    ranks = {path: c.rank for path, c in configs.items() if c.rank != rank}
    alphas = {path: c.alpha for path, c in configs.items() if c.alpha != alpha}
    described |= {"rank_pattern": ranks} if ranks else {}
    described |= {"alpha_pattern": alphas} if alphas else {}
    wanted = {path: (c.rank, c.alpha) for path, c in configs.items()}
    for targets in (described["target_modules"], sorted(configs)):  # short names, else whole paths
        described["target_modules"] = targets
        with suppress(ValueError):  # a short name may be that of other modules, too
            found = read_config(Path(), {"peft_type": "LORA", **described}, model)
            if {path: (c.rank, c.alpha) for path, c in found.items()} == wanted:
                return described
    raise ValueError(f"PEFT's patterns cannot tell the layers {sorted(configs)} apart; rename them")


def _refuse(described: dict) -> None:
    if described.get("peft_type") != "LORA":
        raise ValueError(f"this is a {described.get('peft_type')} adapter; only LORA is read")
    for key, value in described.items():
        if key in READ | HARMLESS or not value or (key, value) == ("bias", "none"):
            continue
        why = "adapts otherwise than this package" if key in REFUSED else "unknown to this version"
        raise ValueError(f"{key}={value!r} is not supported ({why}); merge it with PEFT "
                         "(merge_and_unload) and load that, or train without it")  # fmt: skip
    init = described.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        raise ValueError(f"init_lora_weights={init!r} is not supported (it changes the base); save "
                         "again with PEFT's path_initial_model_for_weight_conversion")  # fmt: skip
    for key, kinds in KINDS.items():
        if not isinstance(described.get(key), (*kinds, type(None))) or (
            isinstance(described.get(key), bool) and bool not in kinds
        ):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{key}={described[key]!r} should be {names}")
    lacking = [key for key in REQUIRED if described.get(key) in (None, [], "")]
    if lacking:
        raise ValueError(f"the file lacks {lacking}; save the adapter again")
    for key in PLACES + PATTERNS:
        given = described.get(key) or []
        if isinstance(given, list) and key != "layers_pattern":  # of paths, not of expressions
            continue
        for expression in [given] if isinstance(given, str) else given:
            _check_expression(key, str(expression))


def _check_expression(key: str, expression: str) -> None:
    """Raises ValueError for an expression that is none, or that is long to read."""
    counts = [int(n or 1) for n in regex.findall(r"(\d+)\}", expression)]
    if len(expression) > LONGEST or math.prod(counts) > MOST_REPEATS:
        raise ValueError(f"{key} holds {expression!r:.60}, which is too long, or repeats too often")
    try:
        regex.compile(expression)
    except (regex.error, RecursionError) as error:
        raise ValueError(f"{key} holds {expression!r:.60}, no valid regular expression "
                         f"({error})") from None  # fmt: skip


def _match(expression: str, name: str, whole: bool = False):
    """The match of an expression from a file, at the start of a path, or whole. Raises ValueError
    for one that takes too long."""
    try:
        find = regex.fullmatch if whole else regex.match
        return find(expression, name, timeout=PATIENCE)
    except TimeoutError:
        raise ValueError(f"the expression {expression!r:.60} takes too long at {name}; name the "
                         "modules in a list") from None  # fmt: skip


def _targets(described: dict, model: nn.Module) -> list[str]:
    """Paths of the linear layers that are chosen; ValueError for other kinds of modules."""
    targets, linears = described["target_modules"], linear_layers(model)
    numbered = described.get("layers_to_transform") is not None or described.get("layers_pattern")
    if isinstance(targets, str) and numbered:
        raise ValueError("layers_to_transform and layers_pattern go with a list of target_modules; "
                         f"put the layers into the expression {targets!r}")  # fmt: skip
    if isinstance(targets, str) and targets.lower() == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        chosen = [name for name, layer in linears.items() if layer is not head]
    else:
        adapted = lora_layers(model)  # what is inside of them was chosen with them
        names = [n for n, _ in model.named_modules() if n and n.rpartition(".")[0] not in adapted]
        chosen = [name for name in names if _is_target(described, name)]
    excluded = described.get("exclude_modules") or []
    chosen = [name for name in chosen if not _fits(excluded, name)]
    others = [name for name in chosen if name not in linears]
    if others:
        kind = type(model.get_submodule(others[0])).__name__
        raise ValueError(f"target_modules={targets!r} choose {others[0]} ({kind}); adapters go on "
                         "linear layers only: name these")  # fmt: skip
    if not chosen:
        short = sorted({name.rpartition(".")[2] for name in linears})
        raise ValueError(f"target_modules={targets!r} choose no linear layer of this model, which "
                         f"has {short}; is it the adapter's base?")  # fmt: skip
    return chosen


def _fits(given: str | list[str], name: str) -> bool:
    """A string is an expression for whole paths; in a list are paths or their last components."""
    if isinstance(given, str):
        return bool(_match(given, name, whole=True))
    return any(name == end or name.endswith(f".{end}") for end in given)


def _is_target(described: dict, name: str) -> bool:
    targets, layers = described["target_modules"], described.get("layers_to_transform")
    # An expression, or a whole path in a list, needs no layer number.
    fits = _fits(targets, name)
    if not fits or isinstance(targets, str) or name in targets or layers in (None, []):
        return fits
    given = described.get("layers_pattern") or []
    patterns = [rf"(?:.*?\.)?{p}" for p in ([given] if isinstance(given, str) else given)]
    for pattern in patterns or [r".*?\.[^.]*"]:  # the name of the list of blocks, or any
        # The first number after it: in layers.1.experts.0 the 1.
        if found := _match(rf"{pattern}\.(?P<index>\d+)\.", name):
            return int(found["index"]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _by_pattern(patterns: dict | None, name: str, default):
    """The value of the first pattern that fits the end of the path, after a dot or whole."""
    fitting = (v for p, v in (patterns or {}).items() if _match(rf"(.*\.)?({p})$", name))
    return next(fitting, default)
