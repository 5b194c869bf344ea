"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354, section 4): B learns faster than A."""

from torch import nn


def lora_plus_groups(parameters: dict[str, nn.Parameter], lr: float, ratio: float) -> list[dict]:
    """Parameter groups for an optimizer, with "params", "lr" and "lr_ratio", by which a schedule
    multiplies its rate: B, and DoRA's magnitudes as in PEFT, learn `ratio` (about 16) times as fast
    as all others. Raises ValueError for a ratio that is not above 0, and when there is no B."""
    if not 0 < ratio < float("inf"):
        raise ValueError(f"ratio={ratio} must be a number above 0; LoRA+ recommends about 16")
    fast = [n for n in parameters if ".lora_B." in f".{n}" or ".magnitude." in f".{n}"]
    if not any(".lora_B." in f".{n}" for n in fast):
        raise ValueError("there is no lora_B among the parameters; call inject_lora first")
    slow = [n for n in parameters if n not in fast]
    return [
        {"params": [parameters[n] for n in names], "lr": lr * r, "lr_ratio": r}
        for names, r in ((slow, 1.0), (fast, float(ratio))) if names
    ]  # fmt: skip
