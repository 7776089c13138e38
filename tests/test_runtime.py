import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from minillm.base import files, machine
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


def test_memory_is_counted():
    assert machine.peak_memory_bytes(torch.device("cpu")) > 10**7


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
