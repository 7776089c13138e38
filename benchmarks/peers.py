"""The peers: their environments, made when they are needed, and the worker processes that speak for them."""

import json
import os
import re
import selectors
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "peers"
# Peers that live beside minillm, and those that get an environment of their own: litgpt's pins take others' packages back.
BESIDE_US = ("minillm", "plain PyTorch", "transformers")
OWN_ENVIRONMENT = {"litgpt": "litgpt", "x-transformers": "x-transformers"}
NOT_INSTALLABLE = {
    "nanoGPT": "not on PyPI",
    "gpt-fast": "not on PyPI",
    "nanochat": "PyPI has a source distribution that its author did not publish and that compiles Rust code",
}


class Missing(Exception):
    """A side cannot do this work; the message says why."""


def install(python: Path, package: str, *words: str, pip_args: str) -> None:
    """`pip install` by one Python; `package` is what a message says was wanted.

    Raises:
        Missing: pip failed.
    """
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *pip_args.split()]
    try:
        done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=900)
    except (OSError, subprocess.SubprocessError) as error:
        raise Missing(f"pip install {package}: {error}") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
            done.stderr[-200:]
        ]
        raise Missing(f"pip install {package} failed: {errors[-1].strip()}")


def environment(side: str, *, pip_args: str = "") -> Path:
    """The Python that runs a side; its environment is made the first time.

    Raises:
        Missing: the package cannot be installed here.
    """
    if side in BESIDE_US:
        return Path(sys.executable)
    folder = BUILD / side
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if (folder / ".ready").exists():
        return python
    print(f"installing {side} into {folder.relative_to(ROOT)}", flush=True)
    try:
        venv.create(folder, with_pip=True, clear=True)
        pins = folder / "constraints.txt"  # the same torch as ours; everything else is the peer's choice
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        pins.write_text("\n".join(line for line in lines if re.match(r"(torch|numpy)==", line)))
    except (OSError, subprocess.SubprocessError) as error:
        raise Missing(f"its environment could not be made: {error}") from None
    package = OWN_ENVIRONMENT[side]
    install(python, package, "-c", str(pins), "torch", "numpy", package, pip_args=pip_args)
    (folder / ".ready").touch()
    return python


def folder_of(package: str, *, pip_args: str = "") -> Path:
    """A folder with a package that needs nothing but what we have, to be put on the path; made the first time.

    Raises:
        Missing: the package cannot be installed here.
    """
    folder = BUILD / package
    if not (folder / ".ready").exists():
        print(f"installing {package} into {folder.relative_to(ROOT)}", flush=True)
        options = ("--no-deps", "--upgrade", "--target", str(folder))
        install(Path(sys.executable), package, *options, package, pip_args=pip_args)
        (folder / ".ready").touch()
    return folder


class Side:
    """A worker process: one order out, one answer back."""

    def __init__(self, name: str, *, threads: int = 1, pip_args: str = "", timeout_s: float = 120.0):
        self.name = name
        python = environment(name, pip_args=pip_args)
        self.process = subprocess.Popen(
            [str(python), "-u", str(Path(__file__).with_name("worker.py")), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
            env=os.environ
            | {
                "OMP_NUM_THREADS": str(threads),
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1",
                "PYTHONWARNINGS": "ignore",
            },
        )
        self.about = self.ask(timeout_s, do="hello", threads=threads)

    def ask(self, timeout_s: float, **order: Any) -> dict[str, Any]:
        """Send an order and wait for its answer.

        Raises:
            Missing: the side does not have this, failed, died, or took longer than `timeout_s`.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
        except OSError:
            raise Missing("its process has ended") from None
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            if not ready.select(timeout_s):
                self.close()
                raise Missing(f"no answer to {order['do']!r} in {timeout_s:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise Missing(f"its process ended with status {self.process.wait()}")
        answer = json.loads(line)
        for kind in ("missing", "error"):
            if kind in answer:
                raise Missing(answer[kind])
        return answer

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None and self.alive:
            self.process.stdin.close()
        deadline = time.monotonic() + 2
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.alive:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
