"""The floor of the house: files that are whole or not there, the machine, processes."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import zero_workers as workers

from minillm.base import machine
from minillm.base.errors import WorkersFailed
from minillm.base.files import atomic_folder, atomic_write, run_lock
from minillm.base.machine import peak_flops
from minillm.base.processes import run_processes
from minillm.train import model_flops_utilization


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


def test_a_run_folder_belongs_to_one_process_at_a_time(tmp_path):
    code = "import sys\nfrom minillm.base.files import run_lock\nwith run_lock(sys.argv[1]): print('held')"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with run_lock(tmp_path):
        refused = subprocess.run(command, capture_output=True, text=True)
        assert refused.returncode != 0
        assert f"process {os.getpid()}" in refused.stderr
    assert subprocess.run(command, capture_output=True, text=True).stdout == "held\n"


def test_devices_and_dtypes_are_checked():
    assert machine.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="got 'tpu'"):
        machine.pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="0 CUDA devices; use --device cpu"):
            machine.pick_device("cuda")
    assert machine.pick_dtype("float32", torch.device("cpu")) == torch.float32
    with pytest.raises(ValueError, match="got 'float16'"):
        machine.pick_dtype("float16", torch.device("cpu"))


def test_a_seed_fixes_every_generator():
    import random

    import numpy as np

    draws = []
    for _ in range(2):
        machine.seed_everything(7)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1]


def test_the_machine_is_described_without_names_of_hosts():
    import platform

    described = machine.describe_machine()
    assert described["torch"] == torch.__version__
    assert platform.node() not in str(described.values())


def test_memory_is_counted():
    assert machine.peak_memory_bytes(torch.device("cpu")) > 10**7


def test_peak_bytes_counts_what_is_held_at_once():
    def run():
        for _ in range(3):
            torch.empty(2 << 20, dtype=torch.uint8)
        kept = torch.empty(1 << 20, dtype=torch.uint8)
        torch.empty(1 << 20, dtype=torch.uint8)
        return kept

    assert abs(machine.peak_bytes(run) - (2 << 20)) < 4096


def test_held_bytes_counts_every_memory_once():
    weight = torch.nn.Parameter(torch.zeros(10))
    weight.grad = torch.zeros(10)
    layer = torch.nn.Linear(2, 2, bias=False)
    assert machine.held_bytes(weight) == 80
    assert machine.held_bytes(weight, weight.data[3:], {"again": [weight]}) == 80
    assert machine.held_bytes(layer, {"more": torch.zeros(3, dtype=torch.float64)}) == 16 + 24
    assert machine.held_bytes(torch.zeros(9, device="meta"), None, "word") == 0


def test_held_bytes_without_roots_finds_what_nobody_named():
    before = machine.held_bytes()
    hidden = torch.nn.Linear(100, 10, bias=False).requires_grad_()  # 4000 bytes, as many of gradient, and 400
    hidden(torch.ones(100)).sum().backward()
    function = (lambda kept: lambda: kept)(torch.zeros(100))
    assert machine.held_bytes() - before == 2 * 4000 + 400
    del hidden, function
    assert machine.held_bytes() == before


def test_the_peak_is_that_of_the_data_sheet_or_measured(monkeypatch):
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
    ):
        peak_flops.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops("bfloat16", "cuda") == peak
    peak_flops.cache_clear()
    assert 1e8 < peak_flops("float32", "cpu") < 1e15
    assert model_flops_utilization(100.0, 5e9, 1e12) == pytest.approx(0.5)


@pytest.mark.distributed
def test_run_processes_returns_what_each_process_returned():
    found = run_processes(workers.introduce, 3, "word", number=5)
    assert [(rank, world, threads) for rank, world, _, threads, _, _ in found] == [
        (0, 3, 1),
        (1, 3, 1),
        (2, 3, 1),
    ]
    assert len({pid for _, _, pid, *_ in found} | {os.getpid()}) == 4
    assert all((args, options) == (("word",), {"number": 5}) for *_, args, options in found)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("function", "said"),
    [
        (workers.fail, r"process 1: .*ArithmeticError: seven is not a number here"),
        (workers.die, r"process 1: ended with exit code -9"),
        (workers.hang, r"process 0: .*PeerLost: process 0 has lost another process"),
    ],
)
def test_a_process_that_fails_is_named_and_nobody_waits_for_it(function, said):
    start = time.monotonic()
    with pytest.raises(WorkersFailed) as caught:
        run_processes(function, 2, 1, timeout_s=4.0)
    assert re.search(said, str(caught.value), re.DOTALL)
    assert time.monotonic() - start < 30
    for process in multiprocessing.active_children():  # none may be left running
        process.join(5.0)
        assert not process.is_alive()


def test_importing_the_package_is_light():
    code = "import sys, minillm; print(sorted({'matplotlib', 'transformers', 'tyro', 'sentencepiece'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
