"""GPT-2's Conv1D, a linear layer whose weight is stored as (in, out), turned into nn.Linear once,
when a model is made, so that nothing else has to know of it."""

from torch import nn

from ..lora.targets import replace_module


def linear_from_conv1d(model: nn.Module) -> list[str]:
    """Replace each Conv1D of transformers by an nn.Linear, in place; returns their paths.
    state_dict and load_state_dict of the model still speak (in, out), as save_pretrained must."""
    from transformers.pytorch_utils import Conv1D

    found = {path: m for path, m in model.named_modules() if isinstance(m, Conv1D)}
    for path, conv in found.items():
        linear = nn.Linear(*conv.weight.shape, device="meta")
        linear.weight = nn.Parameter(conv.weight.detach().t().contiguous())  # (out, in)
        linear.bias = conv.bias
        replace_module(model, path, linear)
    if not found:
        return []
    # A layer with an adapter has its dense weights under `base` and `merged`.
    turned = {f"{path}{part}.weight" for path in found for part in ("", ".base", ".merged")}

    def turn(state: dict, prefix: str) -> None:
        for name in turned:
            if prefix + name in state:
                state[prefix + name] = state[prefix + name].t().contiguous()

    model.register_state_dict_post_hook(lambda _, state, prefix, __: turn(state, prefix))
    model.register_load_state_dict_pre_hook(lambda _, state, prefix, *__: turn(state, prefix))
    return list(found)
