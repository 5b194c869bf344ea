"""The house: a folder a subject, imports that go down only, what torch alone can run, lazy names."""

import ast
import re
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import qlora_lib

PACKAGE = Path(qlora_lib.__file__).parent
ROOT = PACKAGE.parent
# From the ground up: a folder imports from its own files and from folders before it.
ORDER = [
    "base", "quant", "layers", "lora", "models", "formats", "data", "generation", "train",
    "evaluation", "serving", "search", "runs", "cli",
]  # fmt: skip
TORCH_ALONE = ["quant", "layers"]  # folders that need torch and nothing else, Triton aside
PEERS = {"bitsandbytes", "peft", "gptqmodel", "auto_gptq", "optimum", "hqq", "torchao",
         "compressed_tensors"}  # fmt: skip
ABOVE = {"course", "experiments", "tests", "benchmarks"}


def module_name(path: Path) -> str:
    """Dotted name below the package; the package itself is ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


FILES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports(name: str) -> tuple[set[str], set[str]]:
    """Modules of this package that a file imports, inside functions too; and all others."""
    path = FILES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    inside, outside = set(), set()

    def add(dotted: str, names: list[str]) -> None:
        """`from dotted import names`, dotted below this package: modules or their contents."""
        for n in names:
            candidate = f"{dotted}.{n}".strip(".")
            inside.add(candidate if candidate in FILES else dotted)

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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


def folder(name: str) -> str:
    return name.partition(".")[0]


def test_the_reader_of_imports_reads_this_package():
    assert {"quant.grid", "quant.hessian"} <= imports("quant.gptq")[0]
    assert "torch" in imports("quant.grid")[1]
    assert "transformers" in imports("models.load")[1]  # in a function


def test_each_file_stands_in_a_folder_of_the_order():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] != "_"}
    assert folders == set(ORDER)
    assert {name for name in FILES if "." not in name} <= {"", "__main__", *ORDER}


@pytest.mark.parametrize("name", [name for name in FILES if "." in name])
def test_imports_go_down_only(name):
    # The package itself has the version, and gives names lazily: no file needs a folder above.
    there = {folder(other) for other in imports(name)[0] if other} - {folder(name)}
    upward = {other for other in there if ORDER.index(other) > ORDER.index(folder(name))}
    assert not upward, f"{name} imports from {upward}, which stand above {folder(name)}"


@pytest.mark.parametrize("name", FILES)
def test_the_library_knows_nothing_of_the_course(name):
    assert not imports(name)[1] & ABOVE


def test_there_are_no_cycles():
    done, path = set(), []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(imports(name)[0] & set(FILES) - {""}):
            visit(other)
        path.pop()
        done.add(name)

    for name in FILES:
        visit(name)


@pytest.mark.parametrize("name", FILES)
def test_the_work_is_done_by_hand(name):
    assert not imports(name)[1] & PEERS, "quantization and LoRA libraries are for tests alone"


@pytest.mark.parametrize("name", FILES)
def test_no_pickle(name):
    assert not imports(name)[1] & {"pickle", "cloudpickle", "dill", "joblib"}
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}


@pytest.mark.parametrize("name", FILES)
def test_text_files_are_utf_8_wherever_they_are_read(name):
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("read_text", "write_text"):
                assert "encoding" in {k.arg for k in node.keywords}, ast.unparse(node)


@pytest.mark.long
def test_numbers_and_layers_run_with_torch_alone():
    """In a process of its own, where whatever else the package uses can't be imported."""
    modules = [f"qlora_lib.{n}" for n in FILES if folder(n) in TORCH_ALONE and "triton" not in n]
    script = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

BLOCKED = {{"transformers", "tokenizers", "safetensors", "datasets", "accelerate", "tqdm", "peft",
           "bitsandbytes", "matplotlib", "PIL", "ipywidgets", "IPython", "huggingface_hub"}}
sys.meta_path.insert(0, Refuse())
from importlib import import_module
import torch
import qlora_lib
for module in {modules}:
    import_module(module)
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
    print("models need", error.name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["models", "need"]


def test_importing_the_package_imports_nothing_else():
    script = "import sys, qlora_lib; dir(qlora_lib); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("module", sorted(qlora_lib._HOME))
def test_each_name_lives_where_the_package_looks_for_it(module):
    for name in qlora_lib._HOME[module]:
        # A function or class, not a folder of that name that importing put in its place.
        assert callable(getattr(qlora_lib, name)) and name in qlora_lib.__all__
        assert getattr(import_module(f"qlora_lib.{module}"), name) is getattr(qlora_lib, name)
        assert name not in ORDER, f"{name} would be hidden by the folder {name}/"


@pytest.mark.parametrize("name", qlora_lib.__all__)
def test_a_public_name_has_a_use(name):
    """In a notebook, a document, a command, the road that the commands take, or as a result."""
    places = [*ROOT.glob("notebooks/*.ipynb"), ROOT / "README.md", *ROOT.glob("docs/*.md"),
              *PACKAGE.glob("cli/*.py"), *PACKAGE.glob("runs/*.py"), *PACKAGE.glob("models/load.py")]
    used = any(re.search(rf"\b{name}\b", p.read_text(encoding="utf-8")) for p in places)
    functions = [value for n in qlora_lib.__all__ if callable(value := getattr(qlora_lib, n))]
    assert used or name in str([getattr(f, "__annotations__", {}).get("return") for f in functions])


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        qlora_lib.quantise


def test_no_class_that_may_run_foreign_code_is_called_without_saying_no():
    """transformers asks otherwise, and whoever answers y runs what lies in a model's folder."""
    from nbformat import read

    sources = {path: path.read_text(encoding="utf-8")
               for folder in ("qlora_lib", "experiments", "benchmarks", "notebooks/course")
               for path in (ROOT / folder).rglob("*.py")}  # fmt: skip
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = [c.source for c in read(path, 4).cells if c.cell_type == "code"]
        sources[path] = "\n".join(re.sub(r"(?m)^[%!].*", "", cell) for cell in cells)
    found = []
    for path, source in sources.items():
        for call in ast.walk(ast.parse(source)):
            name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
            if re.fullmatch(r"Auto\w+\.from_\w+|pipeline", name):
                # A config that a notebook wrote itself names no code; **settings are not seen.
                own = path.suffix == ".ipynb" and name.endswith("from_config")
                said = {k.arg: ast.unparse(k.value) for k in call.keywords}
                if None not in said and not own:
                    assert said.get("trust_remote_code") == "False", f"{path}: {ast.unparse(call)}"
                found.append(name)
    assert len(found) > 5
