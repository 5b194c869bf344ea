"""Files and folders written whole: through links, onto full disks."""

import json
import math
import os
import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from qlora_lib.base.files import (
    read_json,
    read_proved_json,
    read_proved_tensors,
    whole_file,
    write_json_atomic,
    write_proved_json,
    write_proved_tensors,
)
from qlora_lib.base.folders import HASHES, atomic_folder, check_folder, check_place
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


@pytest.mark.skipif(os.name != "posix", reason="asks the system which processes run")
def test_what_a_killed_process_left_half_written_goes_with_the_next_write(tmp_path):
    dead, alive = 2**22 + 1, os.getppid()  # no system has so many processes
    for name in (f".a[1].json.{dead}", f".a[1].json.{alive}", f".b.json.{dead}", ".a[1].json.bak"):
        (tmp_path / name).touch()
    write_json_atomic(tmp_path / "a[1].json", {})
    assert {p.name for p in tmp_path.iterdir()} == {
        "a[1].json", f".a[1].json.{alive}", f".b.json.{dead}", ".a[1].json.bak"}  # fmt: skip


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


def every_flip(path, attempt, step=1):
    """Flip one bit of each step-th byte, another one each time; yield what `attempt` returns."""
    whole = path.read_bytes()
    for at in range(0, len(whole), step):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        yield attempt
    path.write_bytes(whole)


def test_a_flipped_bit_in_a_file_that_proves_itself_is_never_silent(tmp_path):
    numbers, tensors = tmp_path / "run.json", tmp_path / "last.safetensors"
    write_proved_json(numbers, {"n": 3, "loss": (0.25, 1e-9), "name": "Zo\u00eb", "none": None})
    assert read_proved_json(numbers) == {
        "n": 3, "loss": [0.25, 1e-9], "name": "Zo\u00eb", "none": None
    }  # fmt: skip
    write_proved_tensors(tensors, {"b": torch.arange(5.0), "a": torch.ones(2, 3)}, {"step": 7})
    found, about = read_proved_tensors(tensors)
    assert about == {"step": 7} and torch.equal(found["b"], torch.arange(5.0))
    for path, read in ((numbers, read_proved_json), (tensors, read_proved_tensors)):
        for attempt in every_flip(path, read):
            with pytest.raises(ValueError):
                attempt(path)
        read(path)


def test_json_of_older_versions_is_read_as_it_is(tmp_path):
    write_json_atomic(tmp_path / "run.json", {"n": 3})
    assert read_proved_json(tmp_path / "run.json") == {"n": 3}


def test_files_of_a_newer_format_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_lib.base.files.FORMAT", 99)
    write_proved_json(tmp_path / "run.json", {"n": 3})
    write_proved_tensors(tmp_path / "last.safetensors", {"a": torch.ones(1)}, {})
    monkeypatch.undo()
    for read, name in ((read_proved_json, "run.json"), (read_proved_tensors, "last.safetensors")):
        with pytest.raises(ValueError, match="format 99.*upgrade"):
            read(tmp_path / name)


@pytest.mark.parametrize("text", ['[]', "5", '{"a": 1, "a": 2}', "{", "[" * 100_000, "\xff", '""'])
def test_what_is_no_json_object_is_named(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="x.json"):
        read_json(tmp_path / "x.json")


def test_a_folder_proves_each_of_its_files(tmp_path):
    folder = tmp_path / "run"
    with atomic_folder(folder, "done") as scratch:
        (scratch / "done").write_text("first")
        (scratch / "sub").mkdir()
        (scratch / "sub" / "weights").write_bytes(bytes(range(40)))
    assert check_folder(folder)
    for path in (folder / "done", folder / "sub" / "weights", folder / HASHES):
        for attempt in every_flip(path, check_folder):
            with pytest.raises(ValueError):
                attempt(folder)
    (folder / "README").write_text("notes of its owner")
    assert check_folder(folder)
    (folder / "done").unlink()
    with pytest.raises(ValueError, match="done is missing"):
        check_folder(folder)
    (folder / HASHES).unlink()
    assert not check_folder(folder)  # somebody else's


@pytest.mark.parametrize("complete", [True, False])
def test_a_save_that_died_between_its_renames_is_finished_or_taken_back(
    tmp_path, complete, capsys
):
    folder = tmp_path / "run"
    save(folder, "first")
    save(tmp_path / "next", "second")
    folder.rename(tmp_path / "run.old")
    (tmp_path / "next").rename(tmp_path / "run.part")
    if not complete:
        (tmp_path / "run.part" / HASHES).unlink()
    assert check_folder(folder)
    assert (folder / "done").read_text() == ("second" if complete else "first")
    assert "interrupted" in capsys.readouterr().err
    save(folder, "third")
    assert (folder / "done").read_text() == "third" and len(list(tmp_path.iterdir())) == 1
