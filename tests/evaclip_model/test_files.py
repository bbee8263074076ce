"""Files are replaced whole or not at all, and a lock has one holder."""

import subprocess
import sys

import pytest

from evaclip_model.files import lock_file, replace_file, write_atomically


def test_a_file_is_replaced_by_what_was_written(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, "first\n")
    write_atomically(path, "zweite Zeile: ü\n")
    assert path.read_text(encoding="utf-8") == "zweite Zeile: ü\n"
    write_atomically(path, b"\xff\x00", sync=False)
    assert path.read_bytes() == b"\xff\x00"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_an_error_while_writing_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(ValueError), replace_file(path) as beside:
        beside.write_text("half")
        raise ValueError
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_lock_has_one_holder_and_is_free_again_when_the_holder_is_killed(tmp_path):
    path = tmp_path / "lock"
    code = (
        "import sys, time; from pathlib import Path; from evaclip_model.files import lock_file; "
        "held = lock_file(Path(sys.argv[1])); print(held is not None, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "True\n"
        assert lock_file(path) is None
        holder.kill()
        holder.wait()
        lock = lock_file(path)
        assert lock is not None
        lock.close()
