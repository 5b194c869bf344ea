"""`python -m qlora_lib verify`: whether what serves an exported folder answers as was measured."""

from contextlib import nullcontext
from pathlib import Path

from ..base.paths import given_path
from .common import add_command

LOCAL = "llama.cpp", "transformers"
NEEDS = {
    "adapter": ("with --with transformers", lambda args: args.engine == "transformers"),
    "no_adapter": ("with --with llama.cpp", lambda args: args.engine in (None, "llama.cpp")),
}


def add_commands(commands) -> None:
    text = "ask what serves an exported folder its golden questions; name what went wrong"
    add = add_command(commands, "verify", verify, text, "device", needs=NEEDS)
    add("exported", type=given_path, metavar="FOLDER", help="that export wrote")
    add("--with", dest="engine", metavar="ENGINE",
        help="llama.cpp (default, for GGUF), transformers (default, for GPTQ), or the http:// "
             "address of a server on this machine: vLLM, Ollama, llama-server")  # fmt: skip
    add("--adapter", type=given_path, help="the adapter beside a GPTQ checkpoint")
    add("--no-adapter", action="store_true", help="llama.cpp takes base.gguf alone")


def verify(args) -> None:
    from ..models.gguf_folder import is_gguf_folder
    from ..serving.contract import read_contract
    from ..serving.engines import URL, llama_cpp, open_local
    from ..serving.verify import REMEDIES, changed_file, compare_with

    folder: Path = args.exported
    contract = read_contract(folder)
    if said := changed_file(folder):
        raise ValueError(f"changed file: {said}; {REMEDIES['changed file']}")
    name = args.engine or ("llama.cpp" if is_gguf_folder(folder) else "transformers")
    if name not in LOCAL and "://" not in name:
        raise ValueError(f"--with {name:.80}: expected llama.cpp, transformers, or http://...")
    if name == "llama.cpp":
        opened = llama_cpp(folder, contract, adapter=not args.no_adapter)
    elif name == "transformers":
        opened = nullcontext(open_local(folder, contract, args.device, args.adapter))
    else:
        opened = nullcontext(URL(name, contract))
    with opened as engine:
        print(f"asking {engine.info} {len(contract['golden'])} questions")
        verdict = compare_with(contract, engine)
    print(verdict)
    if not verdict.ok:
        raise ValueError(f"{folder} is not served as it was measured: {', '.join(verdict.found)}")
