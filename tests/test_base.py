"""The floor of the house: files that are whole or not there."""

import os
import signal
import subprocess
import sys
import time

import pytest

from minillm.base.files import atomic_folder, atomic_write


def test_an_exception_leaves_the_old_file_and_no_partial_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), atomic_write(path) as file:
        file.write("new")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_finished_write_appears_whole_with_ordinary_permissions(tmp_path):
    with atomic_write(tmp_path / "folder" / "a.txt") as file:
        file.write("新\n")
    path = tmp_path / "folder" / "a.txt"
    assert path.read_bytes() == "新\n".encode()
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_folder_is_replaced_whole(tmp_path):
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "f") as partial:
            (partial / "a").write_text(text)
    assert (tmp_path / "f" / "a").read_text() == "second"
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "f") as partial:
        (partial / "a").write_text("third")
        raise RuntimeError
    assert (tmp_path / "f" / "a").read_text() == "second"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.slow
def test_kill_9_while_writing_leaves_old_or_new_and_nothing_between(tmp_path):
    path = tmp_path / "a.bin"
    code = (
        "import sys; from minillm.base.files import atomic_write\n"
        "print('ready', flush=True)\n"
        "for i in range(10**9):\n"
        "    with atomic_write(sys.argv[1], 'wb') as file:\n"
        "        for _ in range(64): file.write(bytes([i % 256]) * 65536)\n"
    )
    for delay in (0.05, 0.13, 0.31):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if path.exists():
            data = path.read_bytes()
            assert len(data) == 64 * 65536
            assert len(set(data)) == 1
