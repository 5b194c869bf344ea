"""The house: four floors, imports that go down only, files that stay small, lazy imports."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import qlora_lib

PACKAGE = Path(qlora_lib.__file__).parent
FLOOR_1 = {
    "packing", "grid", "nf4", "hessian", "damping", "gptq", "gptq_layout", "refit", "adam8bit",
}  # fmt: skip
FLOOR_2 = {
    "blocks", "linear", "kernels", "choosing", "lora", "lora_layer", "lora_init", "merge",
    "compose", "variants", "triton_kernels",
}  # fmt: skip
LONGEST = 320  # lines
LONGEST_EXERCISES = 380  # many wrong functions, each with its message
PEERS = {"bitsandbytes", "peft", "gptqmodel", "auto_gptq", "optimum", "hqq", "torchao"}


def module_name(path: Path) -> str:
    """Dotted name below the package; the package itself is ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


FILES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py"))}


def floor(name: str) -> int:
    """1 tensors, 2 layers, 3 models, 4 classroom. The package itself imports by name, lazily."""
    first = name.partition(".")[0]
    return 1 if first in FLOOR_1 else 2 if first in FLOOR_2 else 4 if first == "classroom" else 3


def imports(name: str, path: Path) -> tuple[set[str], set[str]]:
    """Modules of this package that a file imports, inside functions too; and all others."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    inside, outside = set(), set()

    def add(dotted: str, names: list[str]) -> None:
        """`from dotted import names`, dotted below this package: modules or their contents."""
        for n in names:
            candidate = f"{dotted}.{n}".strip(".")
            inside.add(candidate if candidate in FILES else dotted)

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, _, rest = alias.name.partition(".")
                if top == "qlora_lib":
                    inside.add(rest)
                else:
                    outside.add(top)
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if node.level:
                base = package[: len(package) - node.level + 1]
                add(".".join([*base, *(node.module or "").split(".")]).strip("."), names)
            elif node.module.partition(".")[0] == "qlora_lib":
                add(node.module.partition(".")[2], names)
            else:
                outside.add(node.module.partition(".")[0])
    return inside - {name}, outside


GRAPH = {name: imports(name, path) for name, path in FILES.items()}


def test_the_reader_of_imports_reads_this_package():
    assert {"grid", "packing"} <= GRAPH["gptq"][0] | GRAPH["grid"][0]
    assert "torch" in GRAPH["grid"][1] and "transformers" in GRAPH["loading"][1]  # in a function
    assert FLOOR_1 <= set(FILES) and {"linear", "lora"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down_only(name):
    upward = {other for other in GRAPH[name][0] if other and floor(other) > floor(name)}
    assert not upward, f"{name or 'qlora_lib'} (floor {floor(name)}) imports {upward} from above"


def test_there_are_no_cycles():
    done, path = set(), []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(GRAPH[name][0] & set(FILES) - {""}):
            visit(other)
        path.pop()
        done.add(name)

    for name in FILES:
        visit(name)


@pytest.mark.parametrize("name", FILES)
def test_files_stay_small(name):
    lines = len(FILES[name].read_text().splitlines())
    longest = LONGEST_EXERCISES if "exercises" in name else LONGEST
    assert lines <= longest, f"{FILES[name].name} has {lines} lines; split it"


@pytest.mark.parametrize("name", FILES)
def test_the_work_is_done_by_hand(name):
    assert not GRAPH[name][1] & PEERS, "quantization and LoRA libraries are for tests alone"


@pytest.mark.parametrize("name", FILES)
def test_no_pickle(name):
    assert not GRAPH[name][1] & {"pickle", "cloudpickle", "dill", "joblib"}
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}


@pytest.mark.parametrize("name", FILES)
def test_text_files_are_utf_8_wherever_they_are_read(name):
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("read_text", "write_text"):
                assert "encoding" in {k.arg for k in node.keywords}, ast.unparse(node)


@pytest.mark.parametrize("name", sorted(FLOOR_1 | (FLOOR_2 & set(FILES))))
def test_floors_1_and_2_import_torch_alone(name):
    outside = GRAPH[name][1] - set(sys.stdlib_module_names)
    assert outside <= ({"torch"} if name != "triton_kernels" else {"torch", "triton"})


def test_floors_1_and_2_run_with_torch_alone():
    """In a process of its own, where whatever else the package uses can't be imported."""
    script = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

BLOCKED = {"transformers", "tokenizers", "safetensors", "datasets", "accelerate", "tqdm", "peft",
           "bitsandbytes", "matplotlib", "PIL", "ipywidgets", "IPython", "huggingface_hub"}
sys.meta_path.insert(0, Refuse())
import torch
import qlora_lib
from qlora_lib import *  # noqa
""".replace("from qlora_lib import *  # noqa\n", "")
    names = [n for m in sorted(FLOOR_1 | FLOOR_2 & set(FILES)) for n in qlora_lib._HOME.get(m, [])]
    script += f"for name in {names}: getattr(qlora_lib, name)\n"
    script += """
import qlora_lib.packing, qlora_lib.grid, qlora_lib.nf4, qlora_lib.gptq, qlora_lib.linear
model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 8))
x, h = torch.randn(40, 16), qlora_lib.Hessian(16)
h.update(x)
q = qlora_lib.gptq_quantize(model[0].weight.detach(), h, qlora_lib.QuantSpec(4, 8))
model[0] = qlora_lib.QuantizedLinear.from_linear(model[0], q)
qlora_lib.inject_lora(model, ("0", "1"), rank=2)
model(x).sum().backward()
try:
    qlora_lib.load_quantized
except ModuleNotFoundError as error:
    print("floor 3 needs", error.name)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:3] == ["floor", "3", "needs"]


def test_importing_the_package_imports_nothing_else():
    script = "import sys, qlora_lib; dir(qlora_lib); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.stdout.strip() == "False", done.stderr


PUBLIC = """
QuantSpec NF4Spec GPTQOptions QuantizedTensor NF4Tensor pack unpack quantize_rtn quantize_nf4
Hessian gptq_quantize quant_matmul QuantizedLinear decoding_layout quantize_model quantize_checkpoint
dequantize_model inject_lora
trainable_parameters use_adapter set_adapter merge_lora merge_into_original merge_report
merge_hessians unmerge_lora save_adapter load_adapter load_bnb_4bit save_quantized load_quantized
load_profile format_gsm8k finetune TrainConfig Decoding generator evaluate extract_answer
is_correct compare drop load_gsm_hard run_canaries export_gptq import_gptq majority best_score
weighted_vote with_scores likelihood pass_at_k Verifier train_verifier Adam8bit
memory_ledger decoding_ledger check_fits NotEnoughMemory adapter_names adapter_table delete_adapter
combine_adapters prune_adapter allocate_ranks train_scales freeze_scales lora_plus_groups
AdapterServer ServerFull ServerStopped RequestTimeout CacheSpec PackedCache
Finetuner find_optimal_rank AdapterLog load_task score refit_scales choose_damping
""".split()


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_name_is_importable_from_the_package(name):
    value = getattr(qlora_lib, name)
    # A function, not the submodule of the same name that importing it put in its place.
    assert callable(value)
    assert name in qlora_lib.__all__


@pytest.mark.parametrize("module", sorted(qlora_lib._HOME))
def test_each_name_lives_where_the_package_looks_for_it(module):
    for name in qlora_lib._HOME[module]:
        assert hasattr(import_module(f"qlora_lib.{module}"), name), f"{module}.{name}"
        assert name not in FILES, f"{name} would be hidden by the submodule {name}.py"


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        qlora_lib.quantise
