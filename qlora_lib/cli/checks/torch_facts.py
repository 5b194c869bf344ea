"""What torch says of itself and its devices, for the doctor.

The doctor runs this text in a process of its own, since a broken build or driver may end or hang
the process that asks; so it imports nothing of this package.
"""

import json
import warnings
from importlib import import_module


def torch_facts() -> dict:
    """Return versions, the CPU's and the GPUs' abilities, and the errors met; as JSON holds it."""
    try:
        import torch
    except BaseException as error:  # whatever a broken build raises
        return {"error": f"{type(error).__name__}: {error}"}
    facts = {
        "torch": torch.__version__,
        "built_for": f"CUDA {torch.version.cuda}" if torch.version.cuda
        else f"ROCm {torch.version.hip}" if torch.version.hip else "the CPU",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpu_bf16": torch.cpu._is_avx512_bf16_supported(),
    }  # fmt: skip
    with warnings.catch_warnings(record=True) as said:  # such as a driver that is too old
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts["warning"] = str(said[0].message).splitlines()[0] if said else ""
    facts["gpus"] = [_gpu(torch, index) for index in range(count)]
    for name in ("triton", "transformers"):
        try:
            facts[name] = import_module(name).__version__
        except BaseException as error:
            facts[f"{name}_error"] = f"{type(error).__name__}: {error}"
    return facts


def _gpu(torch, index: int) -> dict:
    """Return what a GPU is, after computing something on it."""
    about = torch.cuda.get_device_properties(index)
    gpu = {"name": about.name, "capability": f"{about.major}.{about.minor}"}
    try:
        (torch.ones(2, device=f"cuda:{index}") + 1).sum().item()
        gpu["free"], gpu["memory"] = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            gpu["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    except RuntimeError as error:  # built without kernels for it, or no memory left
        gpu["error"] = str(error).splitlines()[0]
    return gpu


if __name__ == "__main__":
    print(json.dumps(torch_facts()))
