"""What the processes of the fault suite do. Each function runs in a process of its own and returns an exit status."""

import contextlib
import math
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import tqdm.std

from minillm.base import files
from minillm.base.errors import Interrupted, MiniLLMError
from minillm.base.files import run_lock
from minillm.base.processes import Peers, process_group
from minillm.batches import Loader
from minillm.cli import main
from minillm.runs.engines import EngineConfig, make_engine
from minillm.runs.keeper import RunKeeper, load_batch
from minillm.storage.shards import TokenShards, write_shards
from minillm.train import TrainConfig, batch_loss, evaluate_loss, train
from minillm.transformer import ModelConfig, Transformer

VOCAB = 64
SHAPE = ModelConfig(
    vocab_size=VOCAB, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=32, max_seq_len=32
)
SETTINGS = {
    "steps": 40, "batch_size": 4, "seq_len": 32, "max_lr": 1e-2, "warmup_steps": 3,
    "log_every": 3, "eval_every": 8, "save_every": 4,
}  # fmt: skip
ALONE = Peers()
FILE_EVENTS = ("open", "os.", "shutil.", "tempfile.", "ctypes.")


def warm_up() -> None:
    """Import and measure once, by two steps of training, what every run would. No thread may be left: they do not fork.

    Nor may anything be shared: tqdm's own lock is, between all forks, and the first one killed in a bar would keep it for ever.
    """
    tqdm.std.tqdm.monitor_interval = 0
    tqdm.std.tqdm.set_lock(threading.RLock())
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        write_data(f"{folder}/data")
        run(f"{folder}/run", f"{folder}/data", steps=2)
    assert len(os.listdir("/proc/self/task") if sys.platform == "linux" else [0]) == 1


def write_data(folder: str, seed: int = 0) -> None:
    """Documents that count upwards from a random start."""
    dice = random.Random(seed)
    documents = []
    for _ in range(80):
        start, step = dice.randrange(1, VOCAB), dice.choice((1, 2))
        documents.append([1 + (start + step * i) % (VOCAB - 1) for i in range(dice.randint(3, 30))])
    write_shards(documents, folder, vocab_size=VOCAB, eos_id=0)


def parts(data: str, config: TrainConfig, world: Peers = ALONE) -> tuple[Transformer, Loader]:
    torch.manual_seed(123)
    share = {"rank": world.rank, "world_size": world.world_size}
    rows = {"batch_size": config.batch_size, "seq_len": config.seq_len, "seed": config.seed}
    return Transformer(SHAPE), Loader(TokenShards(data), **rows, **share)


def noisy_loss(model, batch, n_targets):
    """A loss that draws random numbers, as many as the batch says, so that a random state which is not restored shows."""
    noise = torch.rand(1 + int(batch.tokens.sum()) % 3)[-1]
    return batch_loss(model, batch, n_targets) * (1 + 0.1 * (noise - 0.5))


def spoiled(batch) -> bool:
    """One batch in about twelve, always the same ones."""
    return int(batch.tokens.sum()) % 12 == 0


def loss_that(fails: str):
    """A loss that on some batches is no number, or leaps."""
    factor = {"nan": math.nan, "always": math.nan, "inf": math.inf, "leap": 60.0}[fails]
    return lambda model, batch, n: (
        noisy_loss(model, batch, n) * (factor if fails == "always" or spoiled(batch) else 1.0)
    )


def replay(recorded: str, data: str, fails: str) -> int:
    """A recorded batch is the one that failed, and it fails again."""
    batch, facts = load_batch(recorded)
    model, _ = parts(data, TrainConfig(**SETTINGS))
    loss = loss_that(fails)(model, batch, batch.n_targets).item()
    print(loss, facts)
    assert spoiled(batch)
    assert not math.isfinite(loss)
    assert str(facts["loss_nats"]) == str(loss)
    assert facts["reason"] == "not a finite number"
    return 0


def status(work) -> int:
    """Run, and report an error as the command line does."""
    try:
        work()
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + getattr(signal, stop.signal_name)
    except (MiniLLMError, ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def at_step(step: int, act):
    return lambda info: act() if info.step == step else None


def work(
    run_dir: str,
    data: str,
    fails: str = "",
    pause: float = 0.0,
    on_step=None,
    world: Peers = ALONE,
    engine: EngineConfig | None = None,
    **settings,
) -> None:
    """Train in `run_dir`, from where it stands."""
    config = TrainConfig(**{**SETTINGS, **settings})
    model, loader = parts(data, config, world)
    joined = None if engine is None else make_engine(model, config, engine)
    share = {"rank": world.rank, "world_size": world.world_size}
    held_out = Loader(TokenShards(data), batch_size=16, seq_len=32, packing="rows", **share)

    def evaluate(model):
        loss = evaluate_loss(model, held_out.epoch_batches(), max_batches=1, engine=joined)
        return {"held_out_nats": loss}

    def each(info):
        print(info.step, flush=True)
        time.sleep(pause)
        if on_step is not None:
            on_step(info)

    keeper = RunKeeper(run_dir, eval_fn=evaluate, on_step=each, progress=False)
    loss_fn = loss_that(fails) if fails else noisy_loss
    train(model, loader, config, engine=joined, keeper=keeper, loss_fn=loss_fn)


def run(run_dir: str, data: str, **options) -> int:
    return status(lambda: work(run_dir, data, **options))


def be_rank(rank: int, port: int, world_size: int = 2) -> None:
    """Tell this process who it is, as torchrun does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def rank(
    run_dir: str,
    data: str,
    rank: int,
    port: int,
    engine: dict | None = None,
    dies_in_save: int = 0,
    dies_at: int = 0,
    limit: int = 0,
    step: int = 0,
    dies_joining: bool = False,
    **options,
) -> int:
    """One of the processes of a run.

    It may be told to die in its save of a number, at a request to the file system; to write no large files from a
    step on; or to die when it has met the others, and the second group is made.
    """
    be_rank(rank, port)
    if dies_joining:
        torch.distributed.new_group = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    chosen = EngineConfig(**(engine or {}))
    if dies_in_save:
        interfere_with_save(dies_in_save, dies_at)
    if limit:
        options["on_step"] = at_step(step, lambda: limit_files(limit))

    def together():
        with process_group(timeout_s=chosen.timeout_s) as world:
            work(run_dir, data, world=world, engine=chosen, **options)

    return status(together)


def die_at(event: int) -> list[int]:
    """From now on count what is asked of the file system, and kill this process before the request of that number."""
    count = [0]

    def hook(name: str, args: tuple) -> None:
        if name.startswith(FILE_EVENTS) and count[0] >= 0:
            count[0] += 1
            if count[0] == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def come_late(rank: int, port: int, timeout_s: float, seconds: float) -> int:
    """All wait for the first process, which takes its time."""
    be_rank(rank, port)

    def together():
        with process_group(timeout_s=timeout_s) as world:
            time.sleep(0.0 if rank else seconds)
            world.wait()

    return status(together)


def interfere_with_save(number: int, event: int, report: str = "") -> None:
    """Let the save of that number die at a request to the file system; without `event`, write down how many there are."""
    saves, undisturbed = [0], RunKeeper.save

    def save(keeper):
        saves[0] += keeper.saved_at != keeper.state.step
        if saves[0] != number:
            return undisturbed(keeper)
        count = die_at(event)
        path = undisturbed(keeper)
        if report:
            Path(report).write_text(str(count[0]))
        count[0] = -1
        RunKeeper.save = undisturbed
        return path

    RunKeeper.save = save


def die_in_save(run_dir: str, data: str, event: int, report: str, **settings) -> int:
    """Train until the first save, and die in it."""
    interfere_with_save(1, event, report)
    return run(run_dir, data, **settings)


def replace_folder(folder: str, text: str, event: int, report: str, swap: bool = True) -> int:
    """Replace a folder of three files, dying at a request to the file system."""
    if not swap:
        files._swap_call = lambda: None
    count = die_at(event)
    with files.atomic_folder(folder) as partial:
        for name in "abc":
            (partial / name).write_text(text)
    if not event:
        Path(report).write_text(str(count[0]))
    count[0] = -1
    return 0


def fill_disk(folder: str, left: int) -> None:
    """Write until the disk of a folder is full, then give back so many bytes."""
    path = Path(folder) / "ballast"
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(path, max(0, path.stat().st_size - left))


def run_on_a_full_disk(run_dir: str, data: str, mount: str, left: int, step: int) -> int:
    return run(run_dir, data, on_step=at_step(step, lambda: fill_disk(mount, left)))


def limit_files(n_bytes: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def run_with_small_files(run_dir: str, data: str, limit: int, step: int) -> int:
    return run(run_dir, data, on_step=at_step(step, lambda: limit_files(limit)))


def run_and_then(run_dir: str, data: str, command: list[str], step: int) -> int:
    """Train, and execute a command after a step."""
    import subprocess

    return run(run_dir, data, on_step=at_step(step, lambda: subprocess.run(command, check=True)))


def run_until_there_is(run_dir: str, data: str, path: str, step: int) -> int:
    """Train, and wait after a step for a file."""

    def hold():
        while not Path(path).exists():
            time.sleep(0.005)

    return run(run_dir, data, on_step=at_step(step, hold))


def run_with_an_orphan(run_dir: str, data: str) -> int:
    """Hold a run's folder and leave a child behind that lives on when this process is killed."""
    with run_lock(run_dir):
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
        print(child, flush=True)
        time.sleep(30)
    return 0


def die_in_a_bar() -> None:
    """Killed while a progress bar is drawn."""
    with tqdm.std.tqdm.get_lock():
        os.kill(os.getpid(), signal.SIGKILL)


def run_while_the_clock_jumps(run_dir: str, data: str, seconds: float) -> int:
    """Train with a bar while the date is set back, or forward, by so much after step 10."""
    shift, clock = [0.0], time.time
    time.time = tqdm.std.time = lambda: clock() + shift[0]
    config = TrainConfig(**SETTINGS)
    model, loader = parts(data, config)

    def each(info):
        time.sleep(0.02)
        if info.step == 10:
            shift[0] = seconds

    keeper = RunKeeper(run_dir, on_step=each, progress=True)
    return status(lambda: train(model, loader, config, keeper=keeper, loss_fn=noisy_loss))


def command(words: list[str], closed_output: bool = False, rank: int = 0, port: int = 0) -> int:
    """The command line; with a port as one of two processes that torchrun would start."""
    if port:
        be_rank(rank, port)
    if closed_output:
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
    return main.main(words)
