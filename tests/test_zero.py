"""ZeRO in real processes: every stage and every engine against one process, the bytes against the formulas, the files against all."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import zero_workers as workers
from zero_workers import CONFIG, SHAPE, STAGES

from minillm import zero
from minillm.base.errors import CheckpointError, WorkersFailed
from minillm.base.processes import run_processes
from minillm.check import check, laws
from minillm.cli import main
from minillm.hub import ModelFolder
from minillm.runs.engines import EngineConfig, make_engine
from minillm.storage.checkpoints import load_checkpoint
from minillm.storage.shards import TokenShards
from minillm.train import Engine, TrainConfig, batch_loss
from minillm.transformer import Transformer, count_parameters, training_memory
from minillm.vendors import deepspeed
from minillm.zero import FlatUnit, state_bytes

ROOT = Path(__file__).parent.parent
FLOAT32 = {"parameter_bytes": 4, "gradient_bytes": 4, "optimizer_bytes": 8}
OURS = [EngineConfig(engine="zero", zero_stage=stage) for stage in range(4)]
THEIRS = [
    *(EngineConfig(engine="fsdp2", zero_stage=stage) for stage in (2, 3)),
    *(EngineConfig(engine="deepspeed", zero_stage=stage) for stage in range(4)),
]


def name_of(settings):
    return f"{settings.engine}{settings.zero_stage}"


def close(found, expected):
    """The tensors of two runs: as equal as sums in another order can be."""
    assert found.keys() == expected.keys()
    for group in expected:
        assert found[group].keys() == expected[group].keys(), group
        for name, tensor in expected[group].items():
            torch.testing.assert_close(
                found[group][name], tensor, rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


# The laws of the chapter.

SOLUTIONS = {
    "zero.state_bytes": lambda n, stage, world: state_bytes(n, stage=stage, world_size=world).total,
    "zero.ring_order": zero.ring_order,
    "zero.sent": lambda stage, parts: zero.sent_elements(
        1, stage=stage, world_size=10**12, accumulation=parts
    ),
}


def pieces(sizes, rank, world):
    named = {str(index): torch.nn.Parameter(torch.zeros(size)) for index, size in enumerate(sizes)}
    unit = FlatUnit(named, rank, world, torch.float32)
    return [(int(name), start, len(piece)) for name, start, piece in unit.pieces(unit.master)]


SOLUTIONS["zero.pieces"] = pieces


@pytest.mark.parametrize(
    ("exercise", "law"), [(name, law) for name in SOLUTIONS for law in laws(name)], ids=str
)
def test_the_package_obeys_its_laws(exercise, law):
    law(SOLUTIONS[exercise])


def wrong_pieces(sizes, rank, world):
    share = sum(sizes) // world
    return [
        (i, 0, size) for i, size in enumerate(sizes) if rank * share <= sum(sizes[:i]) < (rank + 1) * share
    ]


@pytest.mark.parametrize(
    ("exercise", "wrong", "law"),
    [
        ("zero.state_bytes", lambda n, stage, world: 12 * n, "alone, every stage holds 16 bytes a parameter"),
        ("zero.state_bytes", lambda n, stage, world: 16 * n, "stage 1 shares out the optimizer's state"),
        (
            "zero.state_bytes",
            lambda n, stage, world: n * (4 + 12 / world) if stage else 16 * n,
            "each stage shares out one thing more",
        ),
        ("zero.ring_order", lambda r, step, n: (r, r), "what one sends, its right neighbour expects"),
        (
            "zero.ring_order",  # an all-reduce's usual order: it ends one place further
            lambda r, step, n: ((r - step) % n, (r - step - 1) % n),
            "at the end process r has the whole sum of chunk r",
        ),
        ("zero.pieces", lambda sizes, rank, world: [], "one process has everything"),
        ("zero.pieces", wrong_pieces, "a slice may begin and end inside a parameter"),
        (
            "zero.pieces",
            lambda sizes, rank, world: pieces(sizes, rank, world) + ([(0, 0, 0)] if world > 2 else []),
            "together the slices have every element once, and no padding",
        ),
        ("zero.sent", lambda stage, parts: 1.0, "stage 0 and 1 send the model twice"),
        ("zero.sent", lambda stage, parts: 2.0, "stage 3 sends half as much again"),
        (
            "zero.sent",
            lambda stage, parts: (2.0, 2.0, 2.0, 3.0)[stage] * parts,
            "accumulation is free at stages 0 and 1 only",
        ),
    ],
)
def test_check_names_the_broken_law(exercise, wrong, law):
    report = check(exercise, wrong, quiet=True)
    broken = [rule.name for rule, reason in report.reasons.items() if reason is not None]
    assert broken[0] == law


# Arithmetic.


def test_the_figures_of_the_paper():
    found = [state_bytes(7_500_000_000, stage=stage, world_size=64).total / 1e9 for stage in range(4)]
    assert found == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)


@pytest.mark.parametrize("world_size", [1, 8])
def test_deepspeed_counts_a_gradient_in_32_bits_and_at_stage_2_one_in_16_bits_too(world_size):
    deepspeed.import_deepspeed("cpu")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as estimate
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as estimate_2

    n, largest = 10**9, 10**7
    _, gpu, _ = estimate(
        n, largest, num_gpus_per_node=world_size, cpu_offload=False, cpu_offload_params=False
    )
    ours = state_bytes(n, stage=3, world_size=world_size, gradient_bytes=4).total
    assert gpu == pytest.approx(ours + 4 * largest, rel=1e-6)  # and one layer whole
    _, gpu = estimate_2(n, num_gpus_per_node=world_size, cpu_offload=False)
    ours = state_bytes(n, stage=2, world_size=world_size, gradient_bytes=2 + 4).total
    assert gpu == pytest.approx(ours, rel=1e-6)


@pytest.mark.parametrize(("stage", "world_size"), [(4, 2), (-1, 2), (1, 0)])
def test_a_stage_that_is_none_is_refused(stage, world_size):
    with pytest.raises(ValueError, match="stage must be 0, 1, 2 or 3"):
        state_bytes(10, stage=stage, world_size=world_size)


def test_a_step_needs_states_activations_and_what_is_whole_at_a_time():
    total = count_parameters(SHAPE).total
    block = sum(p.numel() for p in Transformer(SHAPE).blocks[0].parameters())
    outside = total - 2 * block
    plans = [zero.step_bytes(SHAPE, stage=stage, world_size=4, rows=2) for stage in range(4)]
    for stage, plan in enumerate(plans):
        assert plan["states"] == state_bytes(total, stage=stage, world_size=4).total
        assert plan["activations"] == plans[0]["activations"] > 0
    assert [plan["whole"] for plan in plans] == [
        0,
        0,
        2 * max(block, outside),
        2 * (max(block, outside) + outside + 2 * block),
    ]
    alone, memory = (
        zero.step_bytes(SHAPE, stage=0, world_size=1, rows=2, seq_len=16),
        training_memory(SHAPE, batch_size=2, seq_len=16),
    )
    assert alone["states"] + alone["activations"] == memory.total  # what chapter 13 counts
    shorter = zero.step_bytes(SHAPE, stage=0, world_size=1, rows=2, seq_len=16)["activations"]
    assert shorter < plans[0]["activations"]


# Flat tensors.


def test_a_unit_is_one_memory_cut_into_slices():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    before = {name: p.detach().clone() for name, p in layers.named_parameters()}
    unit = FlatUnit(dict(layers.named_parameters()), 1, 3, torch.float32)
    assert (unit.share, unit.size) == (9, 27)  # 26 elements and one of padding
    for name, p in layers.named_parameters():
        assert torch.equal(p, before[name])
    assert unit.master is unit.shard
    unit.master.fill_(7.0)  # our slice of the flat tensor is the middle of the parameters
    flat = torch.cat([p.detach().flatten() for p in layers.parameters()])
    assert torch.equal((flat == 7.0).nonzero().flatten(), torch.arange(9, 18))


def test_a_narrow_unit_keeps_a_wide_copy_of_its_slice():
    layer = torch.nn.Linear(5, 5)
    exact = layer.weight.detach().clone()
    unit = FlatUnit(dict(layer.named_parameters()), 0, 2, torch.bfloat16)
    assert unit.full.dtype == layer.weight.dtype == torch.bfloat16
    assert unit.master.dtype == torch.float32
    assert torch.equal(unit.master, exact.flatten()[:15])  # not rounded
    assert torch.equal(unit.shard, unit.master.bfloat16())


def test_units_are_the_blocks_and_the_rest_and_have_every_trained_parameter_once():
    model = Transformer(SHAPE)
    model.norm.weight.requires_grad_(False)
    units = zero.units_of(model)
    assert [module for module, _ in units] == [None, *model.blocks]
    names = [name for _, named in units for name in named]
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)


# One process, no process group: a ring of one.


def steps_of(engine, loader, n=3, parts=1):
    losses = []
    for _ in range(n):
        batch = next(loader)
        loss = 0.0
        for part in batch.split(parts):
            part_loss = engine.loss(batch_loss, part, batch.n_targets)
            engine.backward(part_loss)
            loss += part_loss.item()
        losses.append((loss, engine.step(1e-2).norm))
    return losses


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero") / "data"
    workers.write_data(folder)
    assert TokenShards(folder).index.n_documents == 300
    return folder


@pytest.mark.parametrize("kind", STAGES)
def test_alone_every_stage_trains_like_the_plain_engine(data, kind):
    config = dataclasses.replace(CONFIG, accumulation=2)
    plain = Engine(*workers.build(data, config, SHAPE)[:1], config)
    expected = steps_of(plain, workers.build(data, config, SHAPE)[1], parts=2)
    model, loader = workers.build(data, config, SHAPE)
    engine = kind(model, config)
    torch.testing.assert_close(torch.tensor(steps_of(engine, loader, parts=2)), torch.tensor(expected))
    close(engine.tensors(), plain.tensors())


@pytest.mark.parametrize("kind", STAGES)
def test_frozen_parameters_stay_and_unused_ones_do_no_harm(data, kind):
    model, loader = workers.build(data, CONFIG, SHAPE)
    model.blocks[0].attn.requires_grad_(False)
    model.extra = torch.nn.Parameter(torch.ones(3))  # gets no gradient
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = kind(model, CONFIG)
    steps_of(engine, loader)
    after = engine.tensors()["model"]
    assert list(after) == list(before)
    for name in before:
        frozen = name.startswith("blocks.0.attn.") or name == "extra"
        # "extra" has a gradient of zero: AdamW leaves it, and it is a vector without decay
        assert torch.equal(after[name], before[name]) == frozen, name


@pytest.mark.parametrize("kind", STAGES)
def test_tensors_come_back_as_they_were_saved(data, kind):
    model, loader = workers.build(data, CONFIG, SHAPE)
    engine = kind(model, CONFIG)
    steps_of(engine, loader, n=2)
    saved = {group: {n: t.clone() for n, t in named.items()} for group, named in engine.tensors().items()}
    state = loader.state_dict()
    expected = steps_of(engine, loader)
    other, loader = workers.build(data, CONFIG, SHAPE)
    loader.load_state_dict(state)
    again = kind(other, CONFIG)
    again.load_tensors(saved)
    assert steps_of(again, loader) == expected
    with pytest.raises(CheckpointError, match="missing"):
        again.load_tensors({"model": {}, "optimizer": {}})
    fresh, loader = kind(workers.build(data, CONFIG, SHAPE)[0], CONFIG), workers.build(data, CONFIG, SHAPE)[1]
    for each in (fresh, again):  # weights alone: the optimizer begins anew
        each.load_tensors({"model": saved["model"], "optimizer": {}})
    loader.load_state_dict(state)
    expected = steps_of(fresh, loader)
    loader.load_state_dict(state)
    assert steps_of(again, loader) == expected


@pytest.mark.parametrize("kind", STAGES)
def test_frozen_parameters_come_back_too(kind):
    engines = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = Transformer(SHAPE)
        model.blocks[0].attn.requires_grad_(False)
        engines.append(kind(model, CONFIG))
    saved = engines[0].tensors()["model"]
    engines[1].load_tensors({"model": {n: t.clone() for n, t in saved.items()}, "optimizer": {}})
    for name, tensor in engines[1].tensors()["model"].items():
        assert torch.equal(tensor, saved[name]), name


def test_stage_3_can_be_evaluated_between_steps(data):
    model, loader = workers.build(data, CONFIG, SHAPE)
    batch, reference = next(loader), None
    with torch.no_grad():
        reference = batch_loss(model, batch, batch.n_targets).item()
    engine = zero.Zero3(model, CONFIG)
    with torch.no_grad(), engine.evaluation():
        assert batch_loss(model, batch, batch.n_targets).item() == pytest.approx(reference, rel=1e-6)
    assert all(unit.full.untyped_storage().nbytes() == 0 for unit in engine.units)


# Settings.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_stage": 4}, "zero_stage 0 to 3"),
        ({"timeout_s": 0.0}, "timeout_s above 0"),
        ({"engine": "zero", "offload": True}, "offload is for engine deepspeed"),
        ({"engine": "fsdp2", "zero_stage": 1}, "use engine zero or deepspeed"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


@pytest.mark.parametrize(
    ("settings", "config", "message"),
    [
        (EngineConfig(engine="zero", parameters="bfloat16"), CONFIG, "need products in bfloat16"),
        (
            EngineConfig(engine="zero", zero_stage=3),
            dataclasses.replace(CONFIG, compile="on"),
            "does not go with ZeRO stage 3",
        ),
        (
            EngineConfig(engine="deepspeed", zero_stage=0, parameters="bfloat16"),
            dataclasses.replace(CONFIG, dtype="bfloat16"),
            "needs zero_stage 1, 2 or 3",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, config, message):
    with pytest.raises(ValueError, match=message):
        make_engine(Transformer(SHAPE), config, settings)


def test_deepspeed_is_told_everything():
    config = TrainConfig(steps=1, batch_size=12, seq_len=8, accumulation=3, clip_norm=0.7)
    made = deepspeed.deepspeed_settings(config, stage=3, offload=True, world_size=2, bf16=False)
    assert (made["train_batch_size"], made["train_micro_batch_size_per_gpu"]) == (12, 2)
    assert (made["gradient_accumulation_steps"], made["gradient_clipping"]) == (3, 0.7)
    assert made["zero_optimization"]["offload_param"] == {"device": "cpu"}
    with pytest.raises(ValueError, match="does not divide among 5 processes times 3"):
        deepspeed.deepspeed_settings(config, stage=1, offload=False, world_size=5, bf16=False)
    with pytest.raises(ValueError, match="stage 0 is not sharded"):
        deepspeed.deepspeed_settings(config, stage=0, offload=True, world_size=2, bf16=False)


# Processes.


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_ring_sums_like_torch_and_sends_no_more_than_it_must(world_size):
    n = 12 * world_size
    for rank, found in enumerate(run_processes(workers.collectives, world_size, n)):
        assert set(found) == {"Ring", "Wire"}
        for share, gathered, reduced, expected, odd, sent, total in found.values():
            assert torch.equal(share, expected[12 * rank : 12 * rank + 12])
            assert torch.equal(gathered, expected)
            assert torch.equal(reduced, expected)
            assert torch.equal(odd, torch.arange(5.0) * sum(range(1, world_size + 1)))
            each = 4 * n * (world_size - 1) // world_size
            assert sent == [each, each, 2 * each]
            assert total == (sum(0.5 + r for r in range(world_size)), list(range(world_size)))


@pytest.fixture(scope="module")
def alone(data):
    return workers_run_here(data)


def workers_run_here(data, **options):
    """The run of one process and the plain engine."""
    return workers.run(data, EngineConfig(), **options)


def assert_same_run(found, expected):
    for mine, theirs in zip(found[:2], expected[:2]):
        assert mine == pytest.approx(theirs, rel=1e-4)
    close(found[2], expected[2])


@pytest.mark.distributed
def test_two_processes_train_like_one_with_every_engine(data, alone):
    kinds = [EngineConfig(), *OURS, *THEIRS, EngineConfig(engine="deepspeed", zero_stage=2, offload=True)]
    results = run_processes(workers.several, 2, data, [(settings, {}) for settings in kinds])
    for settings, mine, others in zip(kinds, *results):
        assert mine[0] == others[0], f"{name_of(settings)}: the processes report different losses"
        assert_same_run(mine, alone)
        assert others[2] == {"model": {}, "optimizer": {}} or settings.engine == "plain"


@pytest.mark.distributed
def test_four_processes_train_like_one(data, alone):
    for mine in run_processes(workers.several, 4, data, [(settings, {}) for settings in [*OURS, THEIRS[1]]])[
        0
    ]:
        assert_same_run(mine, alone)


@pytest.mark.distributed
def test_accumulation_changes_no_engine(data, alone):
    config = dataclasses.replace(CONFIG, accumulation=2)
    kinds = [*OURS, THEIRS[1], THEIRS[4], THEIRS[5]]
    for mine in run_processes(
        workers.several, 2, data, [(settings, {"config": config}) for settings in kinds]
    )[0]:
        assert_same_run(mine, alone)


@pytest.mark.distributed
def test_two_processes_are_two_micro_batches_bit_for_bit(data):
    config = dataclasses.replace(CONFIG, clip_norm=0.0)
    two = run_processes(workers.run, 2, data, OURS[0], config)[0]
    halves = workers_run_here(data, config=dataclasses.replace(config, accumulation=2))
    assert two[0] == pytest.approx(halves[0], rel=1e-6)  # parts are added in float32, processes in float64
    for name, tensor in halves[2]["model"].items():
        assert torch.equal(two[2]["model"][name], tensor), name


@pytest.mark.distributed
def test_bfloat16_parameters_with_float32_masters_are_the_same_at_every_stage(data, alone):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    kinds = [dataclasses.replace(s, parameters="bfloat16") for s in [*OURS, THEIRS[1], THEIRS[4], THEIRS[5]]]
    results = run_processes(workers.several, 2, data, [(settings, {"config": config}) for settings in kinds])[
        0
    ]
    for settings, mine in zip(kinds, results):
        assert mine[0] == pytest.approx(alone[0], rel=0.02), name_of(settings)
        weights = mine[2]["model"]["blocks.0.mlp.w_gate.weight"]
        assert weights.dtype == torch.float32
        assert not torch.equal(weights, weights.bfloat16().float()), f"{name_of(settings)}: rounded"
    for mine in results[1:4]:
        assert mine[0] == pytest.approx(results[0][0], rel=2e-3)


@pytest.mark.distributed
def test_a_forbidden_step_changes_nothing(data):
    kinds = [*OURS, *THEIRS[:2], THEIRS[4]]
    for found in run_processes(workers.refuse, 2, data, kinds):
        assert found[:6] == [True] * 6
        assert "DeepSpeed cannot leave out a step" in found[6]


# Checkpoints.

JOURNEYS = [  # who writes on 2 processes, whether in pieces; who goes on, and on how many
    (OURS[1], False, OURS[3], 4),
    (OURS[3], True, OURS[2], 4),
    (THEIRS[1], True, OURS[1], 4),
    (OURS[2], True, THEIRS[1], 4),
    (THEIRS[4], True, THEIRS[0], 4),
    (THEIRS[5], False, EngineConfig(), 1),
    (OURS[2], True, THEIRS[5], 1),
    (OURS[0], True, THEIRS[3], 1),
    (EngineConfig(), True, EngineConfig(engine="deepspeed", zero_stage=0), 1),
    (THEIRS[2], False, OURS[3], 1),
]


@pytest.mark.distributed
def test_any_engine_goes_on_where_any_other_stopped_on_any_number_of_processes(data, alone, tmp_path):
    folders = [tmp_path / str(number) for number in range(len(JOURNEYS))]
    writers = [
        (dataclasses.replace(writer, sharded=sharded), {"run_dir": folder, "stop_at": 4})
        for (writer, sharded, _, _), folder in zip(JOURNEYS, folders)
    ]
    run_processes(workers.several, 2, data, writers)
    for (writer, sharded, _, _), folder in zip(JOURNEYS, folders):
        names = sorted(path.name for path in (folder / "checkpoints" / "step-00000003").glob("*.safetensors"))
        pieces = [
            "model.00000-of-00002",
            "model.00001-of-00002",
            "optimizer.00000-of-00002",
            "optimizer.00001-of-00002",
        ]
        if writer.engine == "plain" or writer.zero_stage == 0:
            pieces = pieces[::2]  # process 0 has everything
        expected = [*pieces, "random"] if sharded else ["model", "optimizer", "random"]
        assert names == [f"{name}.safetensors" for name in expected]
    for world_size in (4, 1):
        legs = [(leg, folder) for leg, folder in zip(JOURNEYS, folders) if leg[3] == world_size]
        jobs = [(reader, {"run_dir": folder}) for (_, _, reader, _), folder in legs]
        for leg, mine in zip(legs, run_processes(workers.several, world_size, data, jobs)[0]):
            label = f"{name_of(leg[0][0])} -> {name_of(leg[0][2])}"
            assert len(mine[0]) == 3, label  # steps 4, 5, 6
            assert mine[0] == pytest.approx(alone[0][3:], rel=1e-4), label
            close(mine[2], alone[2])
            lines = [json.loads(line) for line in (leg[1] / "metrics.jsonl").read_text().splitlines()]
            assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
            groups, state = load_checkpoint(leg[1] / "checkpoints" / "step-00000006")
            assert state["step"] == 6
            close({key: groups[key] for key in ("model", "optimizer")}, alone[2])


@pytest.mark.distributed
@pytest.mark.parametrize("settings", [OURS[3], THEIRS[1], THEIRS[4]], ids=name_of)
def test_when_one_process_is_killed_the_others_say_so_and_the_run_goes_on(data, alone, tmp_path, settings):
    job, start = dataclasses.replace(settings, sharded=True), time.monotonic()
    with pytest.raises(WorkersFailed) as caught:
        run_processes(
            workers.run, 2, data, job, run_dir=tmp_path, blow=(1, 4, signal.SIGKILL), timeout_s=15.0
        )
    assert "process 1: ended with exit code -9" in str(caught.value)
    assert "has lost another process of the run" in str(caught.value)
    assert time.monotonic() - start < 60
    again = run_processes(workers.run, 2, data, job, run_dir=tmp_path)[0]
    assert again[0] == pytest.approx(alone[0][3:], rel=1e-4)
    close(again[2], alone[2])


@pytest.mark.distributed
def test_a_signal_to_one_process_stops_all_after_a_step_that_is_saved(data, alone, tmp_path):
    with pytest.raises(WorkersFailed) as caught:
        run_processes(workers.run, 2, data, OURS[2], run_dir=tmp_path, blow=(1, 4, signal.SIGTERM))
    for rank in (0, 1):  # all end with the same exit status
        said = rf"process {rank}:.*Interrupted: SIGTERM after step 4: saved"
        assert re.search(said, str(caught.value), re.DOTALL)
    again = run_processes(workers.run, 2, data, OURS[2], run_dir=tmp_path)[0]
    assert again[0] == pytest.approx(alone[0][4:], rel=1e-4)
    close(again[2], alone[2])


# Bytes.

LARGER = dataclasses.replace(SHAPE, dim=64, n_layers=3, hidden_dim=172)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_process_holds_the_bytes_of_the_formula(data, world_size):
    n_parameters = count_parameters(LARGER).total
    low = [dataclasses.replace(settings, parameters="bfloat16") for settings in OURS]
    results = run_processes(workers.one_step, world_size, data, [*OURS, *low], LARGER)
    for found in results:
        for (held, _, _), settings in zip(found, [*OURS, *low]):
            sizes = FLOAT32 if settings.parameters == "float32" else {}
            formula = state_bytes(
                n_parameters, stage=settings.zero_stage, world_size=world_size, **sizes
            ).total
            assert held == pytest.approx(formula, rel=0.025), settings


@pytest.mark.distributed
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_sends_what_the_paper_says(data, parts):
    n_parameters, n = count_parameters(LARGER).total, 2
    by_ring, by_torch = (
        run_processes(workers.one_step, n, data, OURS, LARGER, accumulation=parts, ring=ring)[1]
        for ring in (True, False)
    )
    for stage, ((_, sent, model), (_, booked, _)) in enumerate(zip(by_ring, by_torch)):
        assert sent == booked, "the books of Wire are not what a ring sends"
        expected = 4 * zero.sent_elements(n_parameters, stage=stage, world_size=n, accumulation=parts)
        if stage < 3:
            assert sent == pytest.approx(expected, rel=0.01)
        else:  # what is outside the blocks is fetched once in a part, and so is the last block
            assert 0.75 * expected < sent < expected
        assert model == {}


@pytest.mark.distributed
def test_stage_3_has_two_blocks_at_a_time_and_none_between_steps(data):
    for most, looks, left in run_processes(workers.whole_at_a_time, 2, data):
        assert looks == 10
        assert most == 2
        assert left == 0


@pytest.mark.distributed
def test_the_libraries_hold_what_the_chapter_says():
    """In bytes a parameter, on two processes: (weights, gradients, optimizer), all of it in the update, whole weights."""
    shape = dataclasses.replace(LARGER, vocab_size=512, max_seq_len=128)  # no tensor has 100,000 elements
    n_parameters = count_parameters(shape).total
    expected = {
        ("fsdp2", 2, "bfloat16"): ((4 / 2, 4 / 2, 8 / 2), 16 / 2, 2),
        ("fsdp2", 3, "float32"): ((4 / 2, 4 / 2, 8 / 2), 16 / 2, 0),
        ("deepspeed", 2, "float32"): ((4, 4 / 2, 12 / 2), 4 + 20 / 2, 4),
        ("deepspeed", 2, "bfloat16"): ((2, 2 / 2, 12 / 2), 2 + 18 / 2, 2),
        ("deepspeed", 3, "bfloat16"): ((2 + 2 / 2, 2 / 2, 12 / 2), 20 / 2, 2),
    }
    kinds = [EngineConfig(engine=name, zero_stage=n, parameters=dtype) for name, n, dtype in expected]
    for found in run_processes(workers.held_by, 2, kinds, shape):
        for settings, held, (parts, update, whole) in zip(kinds, found, expected.values()):
            each = {name: value / n_parameters for name, value in held.items()}
            assert each["parameters"] == pytest.approx(parts[0], rel=0.02), settings
            assert 0.99 < each["gradients"] / parts[1] < 1.4, (
                settings
            )  # whole, of a tensor that lies in two slices
            assert each["optimizer"] == pytest.approx(parts[2], rel=0.02), settings
            assert each["update"] - each["other"] == pytest.approx(update, rel=0.05), settings
            assert each["whole"] == pytest.approx(whole, rel=0.02), settings
            bucket = 2 * 500_000_000 if name_of(settings) == "deepspeed3" else 0
            assert held["other"] == pytest.approx(bucket, abs=0.01 * n_parameters), settings


# The command line.

WORDS = [
    *(
        "pretrain",
        "--data.documents",
        "400",
        "--data.held-out",
        "40",
        "--train.steps",
        "8",
        "--train.batch-size",
        "4",
    ),
    *("--train.seq-len", "64", "--model.max-seq-len", "64", "--train.warmup-steps", "2", "--model.dim", "32"),
    *("--model.n-layers", "2", "--model.n-heads", "2", "--model.n-kv-heads", "1", "--model.hidden-dim", "64"),
    *("--tokenizer.vocab-size", "400", "--model.vocab-size", "400", "--train.save-every", "4"),
    *("--train.log-every", "1", "--minutes", "0", "--quiet", "--device", "cpu", "--dtype", "float32"),
]


def environment():
    clean = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def losses_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    return [line["loss_nats"] for line in lines], lines[-1]["held_out_nats"]


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    command = [sys.executable, "-m", "minillm.cli", *WORDS]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny"


def assert_like_plain(folder, plain_run):
    (losses, held), (expected, held_alone) = losses_of(folder), losses_of(plain_run)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert held == pytest.approx(held_alone, rel=1e-4)
    mine, theirs = (ModelFolder.open(run).model() for run in (folder, plain_run))
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5, msg=name)


def start(command, folder, **settings):
    env = {**environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **settings}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(["bash", *map(str, command)], cwd=folder, env=env, **pipe)


@pytest.mark.distributed
def test_two_launchers_are_two_machines(tmp_path, plain_run):
    """Two torchruns that meet at an address, as on two machines: one process each, one folder."""
    settings = {"NODES": "2", "GPUS": "1", "HEAD": "127.0.0.1", "PORT": str(free_port())}
    words = [ROOT / "scripts" / "torchrun.sh", *WORDS, "--engine", "zero", "--zero-stage", "3", "--sharded"]
    both = [start(words, tmp_path, **settings) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert_like_plain(tmp_path / "runs" / "tiny", plain_run)
    assert sum("[3/5] shards" in text for text in said) == 1  # only the first process prepares and speaks
    assert "2 x cpu" in "".join(said)
    last = tmp_path / "runs" / "tiny" / "checkpoints" / "step-00000008"
    assert len(list(last.glob("model.*-of-00002.safetensors"))) == 2


@pytest.mark.distributed
def test_a_slurm_job_starts_a_launcher_on_every_node(tmp_path, plain_run):
    """The job script, with stand-ins for Slurm's two commands that run both nodes on this machine."""
    tools = {"scontrol": "echo 127.0.0.1; echo node1", "srun": 'shift; "$@" & "$@"; wait'}
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\nset -e\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    slurm |= {"SLURM_JOB_ID": str(free_port()), "SLURM_SUBMIT_DIR": str(ROOT)}
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = [ROOT / "scripts" / "slurm.sh", *WORDS, "--engine", "fsdp2", "--zero-stage", "3"]
    job = start(words, tmp_path, **slurm, PATH=path)
    said = job.communicate(timeout=300)[0]
    assert job.returncode == 0, said
    assert_like_plain(tmp_path / "runs" / "tiny", plain_run)


@pytest.mark.distributed
def test_the_launcher_of_deepspeed_starts_the_same_run(tmp_path, plain_run):
    words = [ROOT / "scripts" / "deepspeed.sh", *WORDS, "--zero-stage", "2"]
    job = start(words, tmp_path, DS_ACCELERATOR="cpu", GPUS="2", PORT=str(free_port()))
    said = job.communicate(timeout=300)[0]
    assert job.returncode == 0, said
    assert_like_plain(tmp_path / "runs" / "tiny", plain_run)


def test_the_plan_says_what_fits(capsys):
    assert main.main(["info", "m125", "--plan", "--gpus", "1", "8", "--gpu-gb", "1", "--seq-len", "128"]) == 0
    out = capsys.readouterr().out
    rows = {int(line.split()[0]): line.split()[1:] for line in out.splitlines() if re.match(r" +\d", line)}
    assert set(rows) == {1, 8}
    from minillm.runs.recipes import recipe

    model = recipe("m125").model
    for n, cells in rows.items():
        for stage, cell in enumerate(cells):
            need = sum(zero.step_bytes(model, stage=stage, world_size=n, seq_len=128).values()) / 1e9
            assert float(cell.rstrip("*")) == pytest.approx(need, abs=0.05)
            assert cell.endswith("*") == (need <= 1)
    assert {cell.endswith("*") for cells in rows.values() for cell in cells} == {True, False}
    assert f"in float32, {4 * count_parameters(model).total / 1e9:.1f}" in out


def test_the_page_on_scaling_shows_what_the_command_prints(capsys):
    assert main.main(["info", "--plan"]) == 0
    assert capsys.readouterr().out in (ROOT / "book" / "scaling.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "--plan", "--gpus", "0"], "gpus and gpu_gb"),
        (["info"], "needs a name"),
        (["pretrain", "--engine", "zero", "--zero-stage", "7"], "zero_stage 0 to 3"),
        (["pretrain", "--offload"], "offload is for engine deepspeed"),
    ],
)
def test_bad_settings_are_one_line(words, message, capsys):
    assert main.main(words) == 2
    assert message in capsys.readouterr().err


def test_the_scripts_are_shell_that_parses():
    scripts = sorted((ROOT / "scripts").glob("*.sh"))
    assert len(scripts) == 3
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
