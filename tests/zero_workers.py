"""What the processes of test_zero.py run: `run_processes` sends only the names of these functions."""

import copy
import os
import random
import signal

import torch
import torch.distributed as dist

from benchmarks.zero import held
from minillm import train as training
from minillm.base.errors import TrainingDiverged
from minillm.base.machine import held_bytes
from minillm.batches import Loader
from minillm.runs import keeper
from minillm.runs.engines import make_engine
from minillm.storage.shards import TokenShards, write_shards
from minillm.train import TrainConfig, batch_loss, train
from minillm.transformer import ModelConfig, Transformer
from minillm.zero import DataParallel, Ring, Wire, Zero1, Zero2, Zero3, wait_for

keeper.peak_flops = lambda dtype, device: 1e11  # measuring it takes longer than the runs here
VOCAB = 61
SHAPE = ModelConfig(
    vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=52, max_seq_len=32, tied=True
)
CONFIG = TrainConfig(
    steps=6, batch_size=8, seq_len=32, max_lr=1e-2, warmup_steps=2, log_every=1, save_every=3, clip_norm=0.5
)
STAGES = (DataParallel, Zero1, Zero2, Zero3)


class Stop(Exception):
    """A run is over before its end."""


def write_data(folder, n=300, seed=0):
    dice = random.Random(seed)
    documents = []
    for _ in range(n):
        start, step = dice.randrange(1, VOCAB), dice.choice((1, 2))
        documents.append([1 + (start + step * i) % (VOCAB - 1) for i in range(dice.randint(3, 30))])
    write_shards(documents, folder, vocab_size=VOCAB, eos_id=0)


def build(data, config, shape, rank=0, world_size=1):
    torch.manual_seed(1 + rank)  # on purpose: an engine gives all processes the model of process 0
    model = Transformer(shape)
    loader = Loader(
        TokenShards(data),
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        packing="rows",  # so that the processes' shares have different numbers of targets
        seed=config.seed,
        rank=rank,
        world_size=world_size,
    )
    return model, loader


def run(data, settings, config=CONFIG, shape=SHAPE, run_dir=None, stop_at=0, blow=None):
    """Train by an engine: the losses, the norms, and on process 0 the tensors.

    `blow`, as (rank, step, signal), is what one process does to itself after a step.
    """
    wire = Ring()
    model, loader = build(data, config, shape, wire.rank, wire.world_size)
    engine = make_engine(model, config, settings)
    steps = []

    def note(info):
        steps.append(info)
        if info.step == stop_at:
            raise Stop
        if blow and (wire.rank, info.step) == blow[:2]:
            os.kill(os.getpid(), blow[2])

    try:
        kept = keeper.RunKeeper(run_dir, on_step=note, progress=False)
        train(model, loader, config, engine=engine, keeper=kept)
    except Stop:
        return None
    return [s.loss_nats for s in steps], [s.grad_norm for s in steps], engine.tensors()


def several(data, jobs):
    """Results of `run` for several (settings, options), one after the other in the same processes."""
    return [run(data, settings, **options) for settings, options in jobs]


def collectives(n_elements):
    """The ring's three collectives and those in the background: their results, torch's, and the bytes they count."""
    found = {}
    for wire in (Ring(), Wire()):
        torch.manual_seed(wire.rank)
        mine = torch.randint(-50, 50, (n_elements,)).float()
        expected, share = mine.clone(), torch.empty(n_elements // wire.world_size)
        dist.all_reduce(expected)
        gathered, reduced, sent = torch.empty(n_elements), mine.clone(), [0]
        for operation, operands in (
            (wire.reduce_scatter, (share, mine)),
            (wire.all_gather, (gathered, share)),
            (wire.all_reduce, (reduced,)),
        ):
            wait_for([operation(*operands)])
            sent.append(wire.sent_bytes)
        odd = torch.arange(5.0) * (wire.rank + 1)  # does not divide
        wait_for([wire.all_reduce(odd)])
        sent = [after - before for before, after in zip(sent, sent[1:])]
        total = wire.sum_over(0.5 + wire.rank), wire.gather_objects(wire.rank)
        found[type(wire).__name__] = (share, gathered, reduced, expected, odd, sent, total)
    return found


def one_step(data, kinds, shape=SHAPE, accumulation=1, ring=False):
    """For engines of these settings: bytes held when all is there, bytes sent in a step, bytes of the updated model."""
    found = []
    config = TrainConfig(steps=1, batch_size=8, seq_len=32, accumulation=accumulation, clip_norm=0.0)
    for settings in kinds:
        wire = Ring() if ring else None
        rank, world_size = dist.get_rank(), dist.get_world_size()
        model, loader = build(data, config, shape, rank, world_size)
        if settings.parameters == "bfloat16":
            config = TrainConfig(steps=1, batch_size=8, seq_len=32, clip_norm=0.0, dtype="bfloat16")
        engine = make_engine(model, config, settings)
        engine.wire = wire or engine.wire
        batch = next(loader)
        n_targets = int(engine.sum_over(float(batch.n_targets)))
        before = engine.wire.sent_bytes
        for step in range(2):
            for part in batch.split(accumulation):
                with training.autocast(torch.device("cpu"), config.dtype):
                    loss = engine.loss(batch_loss, part, n_targets)
                engine.backward(loss)
            engine.settle()
            held = held_bytes(model, engine)
            engine.step(1e-3)
            if step == 0:
                sent = engine.wire.sent_bytes - before
        found.append((held, sent, engine.tensors()["model"]))
    return found


def held_by(kinds, shape):
    """What `benchmarks.zero.held` finds for each of these engines."""
    return [held(settings, shape) for settings in kinds]


def refuse(data, kinds):
    """Which engines left every tensor as it was in a step that the loop forbade, and what the others said."""
    found = []
    for settings in kinds:
        wire = Ring()
        model, loader = build(data, CONFIG, SHAPE, wire.rank, wire.world_size)
        engine = make_engine(model, CONFIG, settings)

        def step(limit, engine=engine, loader=loader):
            batch = next(loader)
            engine.backward(engine.loss(batch_loss, batch, int(engine.sum_over(float(batch.n_targets)))))
            return engine.step(1e-2, limit)

        step(float("inf"))
        before = copy.deepcopy(engine.tensors())
        try:
            step(-1.0)
        except TrainingDiverged as error:
            found.append(str(error))
            continue
        after = copy.deepcopy(engine.tensors())
        same = all(torch.equal(before[g][n], after[g][n]) for g in before for n in before[g])
        step(float("inf"))
        moved = engine.tensors()["model"]
        found.append(
            same and (wire.rank > 0 or any(not torch.equal(moved[n], after["model"][n]) for n in moved))
        )
    return found


def whole_at_a_time(data):
    """Of stage 3: the most blocks that were whole at any moment of a step, and the bytes of whole parameters after it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shape = ModelConfig(**{**vars(SHAPE), "n_layers": 5})
    model, loader = build(data, CONFIG, shape, rank, world_size)
    engine = Zero3(model, CONFIG)
    seen = []

    def look(*_):
        seen.append(sum(unit.full.untyped_storage().nbytes() > 0 for unit in engine.units[1:]))

    for block in model.blocks:
        block.mlp.register_forward_hook(look)
        block.mlp.register_full_backward_hook(look)
    batch = next(loader)
    engine.backward(engine.loss(batch_loss, batch, int(engine.sum_over(float(batch.n_targets)))))
    engine.step(1e-3)
    return max(seen), len(seen), sum(unit.full.untyped_storage().nbytes() for unit in engine.units)


def introduce(*args, **options):
    return dist.get_rank(), dist.get_world_size(), os.getpid(), torch.get_num_threads(), args, options


def fail(rank):
    """One process raises; the other waits for it."""
    if dist.get_rank() == rank:
        raise ArithmeticError("seven is not a number here")
    dist.barrier()


def die(rank):
    """One process is killed; the other waits for it."""
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang(rank):
    """One process never comes."""
    if dist.get_rank() == rank:
        signal.pause()
    dist.barrier()
