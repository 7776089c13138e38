import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from minillm.base import files, machine
from minillm.kernels import matmul
from minillm.show import plot


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


def test_a_run_folder_belongs_to_one_process_at_a_time(tmp_path):
    code = "import sys\nfrom minillm.runtime import run_lock\nwith run_lock(sys.argv[1]): print('held')"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with files.run_lock(tmp_path):
        refused = subprocess.run(command, capture_output=True, text=True)
        assert refused.returncode != 0
        assert f"process {os.getpid()}" in refused.stderr
    assert subprocess.run(command, capture_output=True, text=True).stdout == "held\n"


def test_the_machine_is_described_without_names_of_hosts():
    import platform

    described = machine.describe_machine()
    assert described["torch"] == torch.__version__
    assert platform.node() not in str(described.values())


def test_memory_and_allocator():
    assert machine.peak_memory_bytes(torch.device("cpu")) > 10**7
    assert matmul.tune_allocator() in (True, False)


MATRIX_PRODUCTS = """
import torch
from minillm.runtime import tune_matmul

def pairs():
    g = torch.Generator().manual_seed(0)
    for n, k, m in ((8, 3, 5), (300, 64, 1), (17, 33, 65), (0, 4, 4), (9, 0, 4), (9, 4, 0), (1, 8, 8)):
        yield torch.randn(n, k, generator=g), torch.randn(k, m, generator=g)
        yield torch.randn(k, n, generator=g).t(), torch.randn(m, k, generator=g).t()
        yield torch.randn(n, 2 * k, generator=g)[:, ::2], torch.randn(2 * k, m, generator=g)[::2]
    yield torch.ones(1, 64).expand(300, 64), torch.randn(64, 1, generator=g).expand(64, 5)
    yield torch.randn(9, 4, generator=g).double(), torch.randn(4, 3, generator=g).double()

done = tune_matmul(force=True)
for a, b in pairs():
    bias = torch.arange(b.shape[1]).to(a.dtype)
    exact = a.double() @ b.double()
    close = lambda x, y: torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=2e-5)
    close(a @ b, exact)
    close(torch.addmm(bias, a, b), exact + bias)
    close(torch.addmm(bias, a, b, beta=0.5, alpha=2), 2 * exact + 0.5 * bias)
    for out in (torch.empty(0, dtype=a.dtype), torch.empty(b.shape[1], a.shape[0], dtype=a.dtype).t()):
        close(torch.mm(a, b, out=out), exact)
x = torch.randn(2, 9, 16, requires_grad=True)
layer = torch.nn.Linear(16, 8)
layer(x).square().sum().backward()
close(layer.weight.grad, (2 * layer(x).double().flatten(0, 1).T @ x.double().flatten(0, 1)).detach())
try:
    torch.randn(9, 3) @ torch.randn(4, 5)
except RuntimeError as error:
    assert "cannot be multiplied" in str(error)

wide = torch.randn(16, 64)
for b, gaps in ((wide, False), (wide[:, :32], True), (wide[:8].t(), False), (wide[:8, :32].t(), True)):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        torch.randn(9, len(b)) @ b
    copied = any("clone" in event.key for event in record.key_averages())
    assert copied == (gaps and done), (b.shape, b.stride(), copied)
print(done)
"""


def test_tuned_matrix_products_are_right_whatever_shape_and_stride():
    # in a process of its own: the kernels are replaced for good
    run = subprocess.run([sys.executable, "-c", MATRIX_PRODUCTS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [line for line in run.stderr.splitlines() if "profiler_st" not in line] == []
    able = torch.backends.mkldnn.is_available() and hasattr(torch.library, "get_kernel")
    assert run.stdout.strip() == str(able)


def test_matrix_products_are_left_alone_where_mkl_is_at_home(monkeypatch):
    # a command that ran earlier in this process may have tuned it
    monkeypatch.setattr(runtime, "_kernels", [])
    monkeypatch.setattr(runtime, "_cpu_name", lambda: "Intel(R) Xeon(R) Processor")
    assert matmul.tune_matmul() is False


def test_a_report_escapes_what_it_shows_and_stands_alone(tmp_path):
    metrics = [
        {"step": i, "tokens": 10 * i, "loss_nats": 5 / i, "lr": 1e-3, "tokens_per_s": 9.0}
        for i in range(1, 4)
    ]
    run.write_report(
        tmp_path / "r.html",
        title="<b>",
        summary=[("a", "1 < 2")],
        scores=[{"name": "s", "n": 4, "correct": 1, "accuracy": 0.25}],
        samples=[("what", "<script>alert(1)</script>", "从前")],
        metrics=metrics,
        stages=[("corpus", "x", 1.0)],
        config={"k": "</pre>"},
        machine={"cpu": "c"},
    )
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "1 of 4" in page
    assert "从前" in page


def test_labels_of_lines_do_not_touch():
    fig, ax = plot.figure("t", x="x (m)", y="y (m)")
    for i in range(3):
        ax.plot([0, 1], [0, 1 + 1e-3 * i], label=str(i))
    plot.label_lines(ax, min_gap=11.0)
    heights = sorted(text.xyann[1] + ax.transData.transform(text.xy)[1] * 72 / fig.dpi for text in ax.texts)
    assert all(b - a > 10.9 for a, b in pairwise(heights))
    assert plot.svg(fig).startswith("<svg")


def test_importing_the_package_is_light():
    code = "import sys, minillm; print(sorted({'matplotlib', 'transformers', 'tyro', 'sentencepiece'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
