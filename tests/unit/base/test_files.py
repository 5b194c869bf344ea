"""Files and folders written whole: through links, onto full disks."""

import json
import math
import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from qlora_lib.base.files import (
    atomic_folder,
    check_place,
    read_json,
    whole_file,
    write_json_atomic,
)
from tests.support.small_models import small_tokenizer


def save(folder, text):
    with atomic_folder(folder, "done") as scratch:
        (scratch / "done").write_text(text)


def test_a_link_stays_one_and_what_it_leads_to_is_replaced(tmp_path):
    disk, link = tmp_path / "disk", tmp_path / "here" / "run"
    (disk / "real").mkdir(parents=True)
    link.parent.mkdir()
    link.symlink_to(disk / "real")
    (link / "diary").write_text("dear")
    for call in (lambda: check_place(link, "done"), lambda: save(link, "no")):
        with pytest.raises(ValueError, match="run holds other files"):
            call()
    (link / "diary").unlink()
    for text in ("first", "second"):
        save(link, text)
        assert link.is_symlink() and (disk / "real" / "done").read_text() == text
        assert [p.name for p in disk.iterdir()] == ["real"]
        assert [p.name for p in link.parent.iterdir()] == ["run"]


def test_a_link_to_a_folder_that_is_not_there_yet(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "new")
    save(tmp_path / "run", "text")
    assert (tmp_path / "run").is_symlink() and (tmp_path / "disk/new/done").read_text() == "text"


def test_a_link_to_a_file_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "result.json").symlink_to(tmp_path / "disk" / "result.json")
    for n in range(2):
        write_json_atomic(tmp_path / "result.json", {"n": n})
        assert (tmp_path / "result.json").is_symlink()
        assert read_json(tmp_path / "disk" / "result.json") == {"n": n}
    assert len(list((tmp_path / "disk").iterdir())) == 1


def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(type(tmp_path), "is_mount", lambda self: self == tmp_path.resolve())
    with pytest.raises(ValueError, match="is a mount point.*give a folder in it"):
        check_place(tmp_path, "done")
    check_place(tmp_path / "run", "done")


@contextmanager
def full_disk(room: int):
    """Writing more than so many bytes to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def weights(folder):
    save_file({"a": torch.ones(10_000)}, folder / "weights")


def tokenizer(folder):
    small_tokenizer().save_pretrained(folder)


def text(folder):
    (folder / "text").write_text("a" * 10_000)


@pytest.mark.parametrize("write", [weights, tokenizer, text])
def test_a_full_disk_is_an_os_error_and_leaves_what_was_there(write, tmp_path):
    save(tmp_path / "run", "before")
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        with atomic_folder(tmp_path / "run", "done") as scratch:
            write(scratch)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "done").read_text() == "before"


def test_a_full_disk_leaves_a_file_as_it_was(tmp_path):
    (tmp_path / "weights").write_text("before")
    with full_disk(1000), pytest.raises(OSError, match="weights could not be written.*too large"):
        with whole_file(tmp_path / "weights") as part:
            save_file({"a": torch.ones(10_000)}, part)
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]
    assert (tmp_path / "weights").read_text() == "before"


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (ValueError("a"), KeyboardInterrupt()):
        with pytest.raises(type(error)), atomic_folder(tmp_path / "run", "done"):
            raise error
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_whole_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.json"
    write_json_atomic(path, {"x": 1})
    for bad, error in (({"x": math.nan}, ValueError), ({"x": object()}, TypeError)):
        with pytest.raises(error):
            write_json_atomic(path, bad)
    assert json.loads(path.read_text()) == {"x": 1} and list(tmp_path.iterdir()) == [path]
