"""The command line in child processes, which may be killed at a chosen moment.

`Commands()` starts one process (python -m tests.support.child_commands) that imports all there is
to import, once, and forks off a child for each command. Linux only.
"""

import builtins
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# In the folder that make_place makes
OPTIONS = "--model model --data data"
QUANTIZE = f"quantize {OPTIONS} --method rtn"
STREAM = f"quantize {OPTIONS} --group-size 32 --stream"
TRAIN = f"finetune {OPTIONS} --method rtn --max-steps 5 --batch-size 4 --accumulation 1 --rank 2"
JUDGE = (f"verifier {OPTIONS} --limit 6 --samples 4 --temperature 2 --max-new-tokens 4 --rank 2 "
         "--batch-size 8")  # fmt: skip
ASK = f"evaluate {OPTIONS} --max-new-tokens 2"
EXPORT = "export --model model"
VOTE = f"{ASK} --samples 2 --vote verifier"
LONGEST = 120  # seconds that a command may take; then SIGALRM ends it


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int  # its exit code; -9: killed, -14: took longer than LONGEST
    said: str  # on stdout and stderr
    operations: int  # that change files, if it came to its end
    cpu: float  # seconds

    @property
    def error(self) -> str:
        """The line of an error; "traceback ..." for what is no plain error with exit code 2."""
        line = self.said.strip().splitlines()[-1] if self.said.strip() else "nothing said"
        plainly = self.code == 2 and line.startswith("error: ") and "Traceback" not in self.said
        return line if plainly else f"traceback, exit code {self.code}: {self.said[-400:]}"


class Commands:
    """Runs commands in children of a process that is ready; `close` ends it."""

    def __init__(self):
        root = Path(__file__).parents[2]
        paths = os.pathsep.join([str(root), str(root / "notebooks")])
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.child_commands"], cwd=root, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1",
                              "CUDA_VISIBLE_DEVICES": "", "GSM8K_DIR": ""},
        )  # fmt: skip

    def run(self, place: Path, argv: list[str], **how) -> Ended:
        """Run a command in the folder `place`. how: at=n, when="before" or "after": be killed at
        the n-th operation that changes files; cpu=seconds: be killed after so much computing."""
        request = {"place": str(place), "argv": argv, "how": how}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return Ended(**json.loads(self.server.stdout.readline()))

    def close(self) -> None:
        self.server.kill()
        self.server.communicate()


def answers(commands: Commands, place: Path, asked: str):
    """Return the completions and scores of a command `evaluate` in `place`, or its error."""
    ended = commands.run(place, f"{asked} --out probe".split())
    if ended.code:
        return ended.error
    lines = (place / "probe" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = map(json.loads, lines)
    return [(row["completion"], row.get("scores")) for row in rows]


def make_place(place: Path, problems: int = 12) -> None:
    """Make a folder with a model of two blocks, and so many problems a split."""
    from tests.support.small_models import small_model, small_tokenizer

    small_model(layers=2).save_pretrained(place / "model")
    small_tokenizer().save_pretrained(place / "model")
    (place / "data").mkdir()
    for k, split in enumerate(("train", "dev", "test")):
        rows = [{"question": f"{i} + {k}?", "answer": f"{i}+{k}=<<{i}+{k}={i + k}>>\n#### {i + k}"}
                for i in range(problems)]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (place / "data" / f"{split}.jsonl").write_text(text, encoding="utf-8")


def serve() -> None:
    """Answer requests, a line each, until there are no more."""
    import qlora_lib.runs.finetuner  # noqa: F401  with it torch and transformers
    import transformers.models.llama.modeling_llama  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        place = Path(request["place"])
        said, count = place.with_suffix(".said"), place.with_suffix(".count")
        count.unlink(missing_ok=True)
        if not (child := os.fork()):
            run_command(place, request["argv"], said, count, **request["how"])
        _, status, used = os.wait4(child, 0)
        ended = Ended(
            os.waitstatus_to_exitcode(status), said.read_text(encoding="utf-8", errors="replace"),
            int(count.read_text()) if count.exists() else 0, used.ru_utime + used.ru_stime,
        )  # fmt: skip
        print(json.dumps(vars(ended)), flush=True)


def run_command(place: Path, argv: list[str], said: Path, count: Path,
                at=None, when="before", cpu=None) -> None:  # fmt: skip
    """What the child does; it never returns."""
    stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.chdir(place)
    signal.alarm(LONGEST)
    code = 1
    try:
        from qlora_lib.__main__ import main
        from qlora_lib.evaluation import extraction

        # A random model solves nothing; a verifier needs right and wrong solutions.
        extraction.is_correct = lambda said, gold, mode="strict": len(said) % 2 == 0
        operations = count_operations(at, when)
        if cpu:
            signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends a process, like SIGKILL
            signal.setitimer(signal.ITIMER_PROF, cpu)
        code = main(argv)
        sys.stdout.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)
        made, operations[0] = operations[0], -(10**9)  # the count itself does not count
        count.write_text(str(made))
    except SystemExit as error:  # of argparse
        code = error.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def count_operations(at: int | None, when: str) -> list[int]:
    """Count, from here on, what changes files by name, in the list that is returned; be killed at
    number `at`, before it is done, or after (a file of tensors is half written then)."""
    from safetensors import torch as safetensors

    done = [0]

    def counted(operation, path_of=lambda *args: None):
        def change(*args, **given):
            done[0] += 1
            if done[0] != at:
                return operation(*args, **given)
            try:
                if when == "after":
                    operation(*args, **given)
                    if path := path_of(*args):
                        os.truncate(path, os.path.getsize(path) // 2)
            finally:  # whether or not there was anything to unlink
                os.kill(os.getpid(), signal.SIGKILL)

        return change

    def counted_open(real):
        write = counted(real)

        def opened(file, mode="r", *args, **given):
            writes = set(mode) & set("wax+")
            return (write if writes else real)(file, mode, *args, **given)

        return opened

    for name in ("replace", "rename", "unlink", "remove", "mkdir", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    builtins.open = io.open = counted_open(open)
    safetensors.serialize_file = counted(safetensors.serialize_file, lambda tensors, path, *_: path)
    return done


if __name__ == "__main__":
    serve()
