"""What a stamp says."""

import json

import torch

from qlora_lib.base.stamp import stamp


def test_a_stamp_names_versions_and_takes_more():
    s = stamp(3, model="tiny")
    assert s["seed"] == 3 and s["model"] == "tiny" and s["torch"] == torch.__version__
    assert s["threads"] == torch.get_num_threads() and s["command"].startswith("python ")
    assert stamp(command="mine")["command"] == "mine"
    json.dumps(s)
