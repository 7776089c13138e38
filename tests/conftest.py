"""Every module of minillm is imported under jaxtyping's hook with beartype: the shapes in the signatures are checked."""

import os
import signal

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell lets what it starts in the background ignore Ctrl-C, which every process of a test would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from jaxtyping import install_import_hook

_hook = install_import_hook("minillm", "beartype.beartype")
_hook.__enter__()

import torch  # noqa: E402


def pytest_addoption(parser):
    group = parser.getgroup("faults", "the fault suite, tests/faults")
    group.addoption("--faults-rounds", type=int, default=5, help="how often each random fault is tried")
    group.addoption(
        "--faults-table", default="", help="write what was tried, and the outcome, to this JSON file"
    )


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded():
    """Each test starts from the same random state, and leaves global torch settings and kernels as it found them."""
    from minillm.kernels import matmul

    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    while matmul._kernels:  # a command has called tune_matmul
        matmul._kernels.pop()._destroy()
