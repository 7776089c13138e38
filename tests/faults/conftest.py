"""The table of what was tried, small disks, and the run that nobody disturbs."""

import json
import shutil
import subprocess
import time

import pytest

pytest.register_assert_rewrite("harness")
from harness import HOW, TABLE, Zygote, contents  # noqa: E402


@pytest.fixture(scope="session")
def zygote(tmp_path_factory):
    zygote = Zygote(tmp_path_factory.mktemp("logs"))
    yield zygote
    zygote.process.stdin.close()
    zygote.process.wait()


@pytest.fixture(scope="session")
def data(zygote, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tokens"
    assert zygote.do("write_data", folder=folder)[0] == 0
    return folder


@pytest.fixture(scope="session")
def rounds(request):
    return request.config.getoption("--faults-rounds")


@pytest.fixture(scope="session")
def whole(zygote, data, tmp_path_factory):
    """What a run in peace leaves."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = zygote.do("run", run_dir=folder, data=data)
    assert code == 0, output
    return contents(folder)


# ---------------------------------------------------------------- disks


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a small disk on a folder; it needs root and Linux, and the test is skipped without."""
    mounted = []

    def mount(folder, kilobytes):
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs root on Linux")
        mounted.append(folder)
        return folder

    yield mount
    for folder in reversed(mounted):
        subprocess.run(["umount", "-l", str(folder)], check=True)


# ---------------------------------------------------------------- the table


@pytest.fixture
def table(rows, request):
    """`table(fault, tried, outcome)`: called by a test once its claims hold.

    Unless the table is being made, by `--faults-table FILE`, the fault must have its row in the one that the book shows.
    """
    test = f"{request.path.name}::{request.function.__name__}"

    def book(fault, tried, outcome):
        assert tried > 0
        if not request.config.getoption("--faults-table"):
            shown = [row["fault"] for row in json.loads(TABLE.read_text(encoding="utf-8"))["faults"]]
            assert fault in shown, f"{fault!r} is not in {TABLE.name}: `{HOW}` makes it anew"
        rows.append({"fault": fault, "tried": tried, "outcome": outcome, "test": test})

    return book


@pytest.fixture(scope="session")
def rows(request):
    """The rows of the table; written at the end, if that was asked for."""
    rows, start, path = [], time.monotonic(), request.config.getoption("--faults-table")
    yield rows
    if path:
        from minillm.base.files import atomic_write
        from minillm.base.machine import describe_machine

        rounds = request.config.getoption("--faults-rounds")
        result = {
            "command": f"python -m pytest tests/faults --faults-rounds {rounds} --faults-table {path}",
            "machine": describe_machine(),
            "rounds": rounds,
            "seconds": round(time.monotonic() - start, 1),
            "faults": rows,
        }
        with atomic_write(path) as file:
            json.dump(result, file, indent=1, ensure_ascii=False)
            file.write("\n")
