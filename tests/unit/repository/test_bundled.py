"""The bundled models and adapters are, byte for byte, what their makers wrote."""

import subprocess

import pytest

from qlora_lib.base.folders import HASHES, check_folder
from qlora_lib.base.paths import DATA, ROOT

FOLDERS = ["tiny-llama", "tiny-gptq/base", "tiny-adapter", "tiny-adapters/code",
           "tiny-adapters/sentiment", "tiny-adapters/translation", "tiny-verifier"]  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_each_folder_proves_itself(name):
    assert check_folder(DATA / name)


def test_no_bundled_weights_are_left_out():
    weights = {p.parent for p in DATA.rglob("*.safetensors")}
    proved = {folder for folder in weights for name in FOLDERS
              if folder.is_relative_to(DATA / name)}  # fmt: skip
    assert weights == proved and len(list(DATA.glob(f"*/**/{HASHES}"))) == len(FOLDERS)


def test_git_changes_no_line_ending_in_them():
    asked = [f"data/{name}/{HASHES}" for name in FOLDERS]
    said = subprocess.run(["git", "-C", ROOT, "check-attr", "text", *asked],
                          capture_output=True, text=True)  # fmt: skip
    if said.returncode:
        pytest.skip("not a git repository")
    assert said.stdout.count(": text: unset") == len(FOLDERS)
