"""Several processes as one: a crew of workers, the process group of a run, and peers that are lost."""

from __future__ import annotations

import contextlib
import datetime
import functools
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, NamedTuple

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


class Outcome(NamedTuple):
    """What became of a task: its number, what the work returned; or what was the trouble, and the exit code of a worker that ended."""

    number: int
    value: Any = None
    trouble: str = ""
    exitcode: int | None = None


class Crew:
    """Processes that all do one kind of work, task after task. They start with the first task, and end with `close`.

    Args:
        work: what is done with a task; sent to each process once, as it starts.
        n: how many processes, of one thread each.
        start: how `multiprocessing` starts them: "spawn" imports what it needs anew, "fork" copies this process, "forkserver"
            copies one that has imported torch.
    """

    def __init__(self, work: Callable[[Any], Any], n: int, *, start: str = "spawn") -> None:
        self.work, self.n, self.start = work, n, start
        self.members: dict[Any, Any] = {}  # connection: process
        self.busy: dict[Any, int] = {}  # connection: number of its task

    def begin(self) -> None:
        """Start the processes. Ctrl-C is for the parent: the children are born with that signal blocked."""
        context: Any = multiprocessing.get_context(self.start)
        if self.start == "forkserver":
            context.set_forkserver_preload([__name__])
        block = getattr(signal, "pthread_sigmask", None)
        if block:
            block(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(self.n):
                mine, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, self.work), daemon=True)
                process.start()
                theirs.close()
                self.members[mine] = process
        finally:
            if block:
                block(signal.SIG_UNBLOCK, {signal.SIGINT})

    def map(self, tasks: Iterable[Any], *, seconds: float | None = None) -> Iterator[Outcome]:
        """Give out tasks, one at a time to each process; yields what became of each, in the order in which they end.

        A worker that ends is trouble, and is not replaced: who goes on after trouble may see fewer outcomes than tasks.

        Args:
            tasks: drawn as processes are free.
            seconds: after so many, what is not done is trouble too; None to wait as long as it takes.
        """
        if not self.members:
            self.begin()
        deadline = None if seconds is None else time.monotonic() + seconds
        numbered = enumerate(tasks)
        idle = [member for member in self.members if member not in self.busy]
        while True:
            while idle and (task := next(numbered, None)) is not None:
                member = idle.pop()
                self.busy[member] = task[0]
                with contextlib.suppress(ConnectionError):  # it has ended: what is received from it says so
                    member.send(task[1])
            if not self.busy:
                return
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = connection.wait(list(self.busy), left)
            for member in ready:
                outcome = self._hear(member)
                if outcome.exitcode is None:
                    idle.append(member)
                yield outcome
            if not ready:
                yield from (Outcome(n, trouble=f"not done after {seconds:.0f} s") for n in self.busy.values())
                return

    def _hear(self, member: Any) -> Outcome:
        """What a member says about its task, or that it has ended."""
        number = self.busy.pop(member)
        try:
            good, value = pickle.loads(member.recv_bytes())
        except (EOFError, ConnectionError):
            process = self.members.pop(member)
            process.join()
            return Outcome(number, None, f"ended with exit code {process.exitcode}", process.exitcode)
        return Outcome(number, value) if good else Outcome(number, None, value)

    def close(self) -> None:
        """End the processes: those that wait go by themselves, those that work are killed."""
        for member, process in self.members.items():
            if member in self.busy:
                process.kill()
            member.close()
        for process in self.members.values():
            process.join(10)
            process.kill()
            process.join()
        self.members, self.busy = {}, {}

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _serve(pipe: Any, work: Callable[[Any], Any]) -> None:
    """A worker's life: tasks come, outcomes go, until the other end closes."""
    torch.set_num_threads(1)
    while True:
        try:
            task = pipe.recv()
        except (EOFError, ConnectionError):
            return
        try:
            # Plain pickle: torch's own way to send tensors leaves them in a process that may be gone when they are read.
            data = pickle.dumps((True, work(task)))
        except BaseException:  # whatever it was, the parent must hear of it
            data = pickle.dumps((False, traceback.format_exc()))
        try:
            pipe.send_bytes(data)
        except ConnectionError:  # the parent was killed
            return


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
    start = "forkserver" if sys.platform.startswith("linux") else "spawn"
    with tempfile.TemporaryDirectory() as folder:
        group = {"init_method": f"file://{folder}/store", "world_size": world_size, "timeout_s": timeout_s}
        work = functools.partial(_as_rank, group, _portable(function), args, options)
        with Crew(work, world_size, start=start) as crew:
            outcomes = sorted(crew.map(range(world_size), seconds=2 * timeout_s))
    if failed := [outcome for outcome in outcomes if outcome.trouble]:
        raise WorkersFailed("\n".join(f"process {rank}: {trouble}" for rank, _, trouble, _ in failed))
    return [outcome.value for outcome in outcomes]


def _portable(function: Callable[..., Any]) -> Any:
    """A function as it can travel: by its name in a file, or, from a notebook, as (name, source text)."""
    if function.__module__ != "__main__" or hasattr(sys.modules["__main__"], "__file__"):
        return function
    return function.__name__, textwrap.dedent(inspect.getsource(function))


def _as_rank(group: dict[str, Any], function: Any, args: Any, options: Any, rank: int) -> Any:
    """What a process of `run_processes` does."""
    # as torchrun says it
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(group["world_size"])}
    if isinstance(function, tuple):
        name, source = function
        exec(source, space := {})
        function = space[name]
    with process_group(init_method=group["init_method"], timeout_s=group["timeout_s"], always=True):
        return function(*args, **options)
