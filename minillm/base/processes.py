"""Several processes as one: a crew of workers, the process group of a run, and peers that are lost."""

from __future__ import annotations

import contextlib
import datetime
import inspect
import multiprocessing
import os
import pickle
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

import torch

from minillm.base.errors import PeerLost, WorkersFailed


@dataclass(frozen=True, kw_only=True)
class Peers:
    """The processes that make a run together, and which of them this one is. `local_rank` counts those of one machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    patient: Any = None

    def wait(self) -> None:
        """Until all processes are here, for as long as it takes: one of them may be preparing data. Returns at once if alone."""
        if self.world_size > 1:
            import torch.distributed as dist

            with _lost_peers(self.rank):
                dist.barrier(self.patient)


@contextlib.contextmanager
def _lost_peers(rank: int) -> Iterator[None]:
    """Say what a failed collective means. torch raises a plain RuntimeError for gloo, a DistError for NCCL."""
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:
        text = str(error)
        words = ("gloo", "Gloo", "Timed out", "Application timeout caused pair closure")
        if not isinstance(error, dist.DistError) and not any(word in text for word in words):
            raise
        reason = text.strip().splitlines()[0]
        raise PeerLost(
            f"process {rank} has lost another process of the run, which has failed or hangs; its own message says more. "
            f"The same command goes on from the last checkpoint ({reason})"
        ) from error


@contextlib.contextmanager
def process_group(
    device: torch.device | str = "cpu",
    *,
    timeout_s: float = 600.0,
    always: bool = False,
    init_method: str = "env://",
) -> Iterator[Peers]:
    """Join the other processes of a run, and leave them in good order; `Peers` of one if nobody launched several.

    torchrun, deepspeed and Slurm's srun with torchrun tell a process who it is by RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR and MASTER_PORT: that is their protocol, and the only place in the package that reads the environment.

    Args:
        device: GPUs talk through NCCL, everything else through gloo.
        timeout_s: how long a collective waits for the others before it gives up; while they connect, up to five times as long.
        always: make a group of one too, which FSDP2 and DeepSpeed need.
        init_method: where the processes find each other, in place of MASTER_ADDR and MASTER_PORT.

    Raises:
        PeerLost: from within: another process has ended or did not answer in time.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    if world_size == 1 and not always:
        yield Peers()
        return
    import torch.distributed as dist

    options: dict[str, Any] = {"init_method": init_method}
    if world_size == 1 and init_method == "env://" and "MASTER_ADDR" not in os.environ:
        options = {"store": dist.HashStore()}
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"
    with _lost_peers(rank):
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout, **options)
        try:
            patient: Any = dist.new_group(backend="gloo", timeout=timeout)
            # Only now: a process that dies while the group is made would let the others wait for days.
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(days=7), patient)
            yield Peers(rank=rank, world_size=world_size, local_rank=local_rank, patient=patient)
            dist.barrier()  # a process that leaves early would look like one that died
        finally:
            dist.destroy_process_group()


def run_processes(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0, **options: Any
) -> list[Any]:
    """Run `function(*args, **options)` in new processes that can talk to each other; returns what each returned, by rank.

    Args:
        function: of a module, or of a notebook: then its source text is sent, and it imports what it needs.
        world_size: how many processes, one thread each.
        args: must be picklable, as `options`.
        timeout_s: how long a process waits for another, and this function for all, before it gives up.

    Raises:
        WorkersFailed: a process raised, was killed or did not finish; none is left running.
    """
    kind = "forkserver" if sys.platform.startswith("linux") else "spawn"
    context: Any = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload(["minillm.zero"])  # torch is imported once, not once a process
    outcomes: dict[int, tuple[bool, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = {}, []
        for rank in range(world_size):
            pipe, end = context.Pipe(duplex=False)
            job = (
                end,
                f"file://{folder}/store",
                rank,
                world_size,
                timeout_s,
                _portable(function),
                args,
                options,
            )
            processes.append(context.Process(target=_work, args=job, daemon=True))
            processes[-1].start()
            end.close()
            pipes[pipe] = rank
        deadline = time.monotonic() + 2 * timeout_s
        while pipes and (ready := connection.wait(list(pipes), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = pipes.pop(pipe)  # type: ignore[arg-type]
                try:
                    outcomes[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    processes[rank].join()
                    outcomes[rank] = (False, f"ended with exit code {processes[rank].exitcode}")
        for process in processes:
            process.join(0 if pipes else 10)
            process.kill()
    missing = dict.fromkeys(pipes.values(), (False, f"not done after {2 * timeout_s:.0f} s"))
    failed = {rank: text for rank, (good, text) in sorted((outcomes | missing).items()) if not good}
    if failed:
        raise WorkersFailed("\n".join(f"process {rank}: {text}" for rank, text in failed.items()))
    return [outcomes[rank][1] for rank in range(world_size)]


def _portable(function: Callable[..., Any]) -> Any:
    """A function as it can travel: by its name in a file, or, from a notebook, as (name, source text)."""
    if function.__module__ != "__main__" or hasattr(sys.modules["__main__"], "__file__"):
        return function
    return function.__name__, textwrap.dedent(inspect.getsource(function))


def _work(
    pipe: Any,
    init_method: str,
    rank: int,
    world_size: int,
    timeout_s: float,
    function: Any,
    args: Any,
    options: Any,
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }  # as torchrun says it
    try:
        if isinstance(function, tuple):
            name, source = function
            exec(source, space := {})
            function = space[name]
        with process_group(init_method=init_method, timeout_s=timeout_s, always=True):
            outcome = True, function(*args, **options)
    except BaseException:  # whatever it was, the starter must hear of it
        outcome = False, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(outcome))
    pipe.close()
