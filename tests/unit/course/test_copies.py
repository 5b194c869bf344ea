"""What an executed copy was made from."""

from pathlib import Path

from nbformat.v4 import new_output

from course.tools import copies
from course.tools.normal_form import dumps, read, write
from tests.support.throwaway_notebooks import save


def test_a_fingerprint_is_of_what_a_run_depends_on(tmp_path):
    path = Path(save(tmp_path, "01_a", "print(1)", ("print(2)", "varies")))
    source = tmp_path / "qlora_lib" / "lora" / "merge.py"
    source.parent.mkdir(parents=True)
    source.write_text("x = 1\n")
    before, text = copies.fingerprint(path, tmp_path), path.read_text()

    def same():
        return copies.fingerprint(path, tmp_path) == before

    (source.parent / "__pycache__").mkdir()
    (source.parent / "__pycache__" / "merge.pyc").write_bytes(b"1")
    stored = read(path)
    stored.cells[0].outputs = [new_output("stream", name="stdout", text="1")]
    write(path, dumps(stored))
    assert same()
    for changed in (text.replace("print(1)", "print(3)"), text.replace("varies", "rtol=0.1")):
        write(path, changed)
        assert not same()
    write(path, text)
    source.write_text("x = 2\n")
    assert not same()
    source.write_text("x = 1\n")
    source.rename(source.with_name("other.py"))
    assert not same()
