"""The benchmarks: every side does the same work, nothing that was measured is lost, and the page says what the files say."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import beside, dedup, gpu, peers
from benchmarks.sides.ours import Ours
from benchmarks.speedrun import figures
from benchmarks.store import Store
from benchmarks.worker import Worker
from minillm.attention import Mask, attend
from minillm.flash import attend_by_block
from minillm.transformer import ModelConfig, flops_per_token

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("benchmark_page", ROOT / "book" / "benchmark_page.py")
assert spec is not None
assert spec.loader is not None
page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page)
MACHINE = {"cpu": "one", "cpu_cores": 2, "torch_threads": 1, "python": "3.11", "torch": "2", "device": "cpu"}
SMOKE = beside.Work(
    kind="train", shape="smoke", batch=2, seq_len=16, prompt=8, new_tokens=6, sides=peers.BESIDE_US
)


# ---- the sides, in their processes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    with beside.bench(sides=peers.BESIDE_US, patience_s=120) as started:
        started.folder = tmp_path_factory.mktemp("bench")
        yield started


@pytest.mark.parametrize("kind", ["train", "decode", "prefill"])
def test_every_side_computes_what_minillm_computes(sides, kind):
    result = sides.measure(replace(SMOKE, kind=kind), rounds=2)
    assert result["missing"] == {}
    assert result["agrees"] == {"plain PyTorch": True, "transformers": True}
    assert set(result["ratio"]) == {"plain PyTorch", "transformers"}
    assert len(set(result["parameters"].values())) == 1
    assert [len(runs) for runs in result["samples"].values()] == [2, 2, 2]
    assert all(rate > 0 for rate in result["tokens_per_s"].values())
    assert ("parts" in result) == (kind == "train")
    for parts in result.get("parts", {}).values():
        assert math.isclose(sum(parts.values()), 1)
        assert min(parts.values()) > 0, parts
        assert (
            parts["linear layers"] + parts["attention"] + parts["optimizer"] < 0.9
        )  # each was found, none twice


@pytest.mark.parametrize("kernel", [attend, attend_by_block])
def test_attention_is_found_by_whatever_kernel_it_ran(kernel):
    q = torch.randn(4, 4, 128, 16, requires_grad=True)
    side = Worker.__new__(Worker)
    side.work = lambda: kernel(q, q, q, Mask()).sum().backward()
    assert side.parts()["attention"] > 0.5


def test_an_answer_of_other_weights_is_noticed(sides, tmp_path):
    import torch

    file = sides.file("smoke")
    other = torch.load(file, weights_only=True)
    other["state"]["blocks.0.mlp.w_down.weight"] *= 1.5
    torch.save(other, tmp_path / "other.pt")
    for kind in ("train", "prefill"):
        work = replace(SMOKE, kind=kind)
        ask = {"do": "prepare", "work": beside.asdict(work)}
        right = sides.side("minillm").ask(60, **ask, file=str(file))
        wrong = sides.side("plain PyTorch").ask(60, **ask, file=str(tmp_path / "other.pt"))
        assert beside.agrees(work, right["result"], wrong["result"]) is False


def test_memory_is_that_of_a_process_which_did_nothing_else(sides):
    before = sides.side("minillm").process.pid
    result = sides.measure(replace(SMOKE, kind="memory", sides=("minillm",)), rounds=1)
    assert result["peak_bytes"]["minillm"] >= result["before_bytes"]["minillm"] > 2**26
    assert sides.side("minillm").process.pid != before


def test_a_side_that_dies_or_fails_is_missing_and_the_others_are_measured(sides):
    sides.side("transformers").process.kill()
    sides.side("transformers").process.wait()
    sides.measure(SMOKE, rounds=1)  # started again
    original = peers.Side.ask

    def ask(side, timeout_s, **order):
        if side.name == "plain PyTorch" and order["do"] == "measure":
            side.process.kill()
        return original(side, timeout_s, **order)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers.Side, "ask", ask)
        result = sides.measure(SMOKE, rounds=1)
    assert set(result["missing"]) == {"plain PyTorch"}
    assert set(result["tokens_per_s"]) == {"minillm", "transformers"}


def test_an_error_in_a_side_is_an_answer_and_the_process_lives_on(sides):
    side = sides.side("minillm")
    with pytest.raises(peers.Missing, match=r"FileNotFoundError.*nowhere\.pt"):
        side.ask(60, do="prepare", work={"kind": "train"}, file="nowhere.pt")
    assert side.alive
    assert side.ask(60, do="matmul", dtype="float32", n=64, rounds=2)["flops_per_s"] > 0


def test_a_side_that_does_not_answer_is_ended(sides):
    side = peers.Side("plain PyTorch")
    with pytest.raises(peers.Missing, match="no answer to 'matmul' in 0 s"):
        side.ask(0.2, do="matmul", dtype="float32", n=4096)
    assert not side.alive


def test_a_peer_that_cannot_be_installed_is_missing_with_pips_reason(tmp_path, monkeypatch):
    def refuse(command, **_):
        return SimpleNamespace(
            returncode=1, stderr="noise\nERROR: No matching distribution found for litgpt\n"
        )

    monkeypatch.setattr(peers, "BUILD", ROOT / "build" / "never-made")
    monkeypatch.setattr(
        peers.venv, "create", lambda folder, **_: Path(folder).mkdir(parents=True, exist_ok=True)
    )
    monkeypatch.setattr(subprocess, "run", refuse)
    try:
        with pytest.raises(peers.Missing, match="No matching distribution"):
            peers.environment("litgpt")
        assert not (peers.BUILD / "litgpt" / ".ready").exists()
    finally:
        for path in sorted(peers.BUILD.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        peers.BUILD.rmdir()


# ---- the arithmetic, and what is kept ---------------------------------------------------------------------------------


def test_the_ratio_is_the_median_over_rounds_of_the_ratio_within_a_round():
    def runs(*seconds):
        return [{"cpu_s": s, "wall_s": 9.0} for s in seconds]

    out = beside.summary({"minillm": runs(1.0, 2.0, 4.0), "transformers": runs(3.0, 5.0, 4.0)}, units=100)
    assert out["ratio"] == {"transformers": 2.5}  # of 3, 2.5 and 1
    assert out["tokens_per_s"] == {"minillm": 50.0, "transformers": 25.0}


def test_agreement_is_judged_in_float32_only():
    train, decode, prefill = (replace(SMOKE, kind=kind) for kind in ("train", "decode", "prefill"))
    assert beside.agrees(train, [4.0, 3.0], [4.00001, 3.0002]) is True
    assert beside.agrees(train, [4.0, 3.0], [4.00005, 3.0]) is False
    assert beside.agrees(train, [4.0, 3.0], [4.0, 3.002]) is False
    assert beside.agrees(decode, [[1, 2]], [[1, 3]]) is False
    assert beside.agrees(prefill, [0.0, 1.0], [0.0, 1.01]) is False
    assert beside.agrees(replace(train, dtype="bfloat16"), [4.0, 3.0], [5.0, 3.0]) is None


def test_the_works_have_names_of_their_own_and_the_quick_ones_are_among_the_full():
    works = beside.works()
    assert len({work.name for work in works}) == len(works)
    assert all(work.full for work in works)
    quick = [work for work in works if work.quick]
    assert {work.kind for work in quick} == {"train", "decode", "prefill", "memory"}
    assert {(work.kind, work.dtype) for work in quick} >= {("train", "bfloat16"), ("decode", "bfloat16")}
    assert {work.batch for work in quick if work.kind == "decode"} == {1, 16}
    assert any(work.compiled and work.kind == "train" for work in works)


def test_a_peer_that_is_not_installed_gets_a_folder_on_the_path_or_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    monkeypatch.setattr(peers, "BUILD", tmp_path / "peers")
    with pytest.raises(peers.Missing, match="pip install no-such-package failed"):
        peers.folder_of("no-such-package", pip_args="--no-index")
    (tmp_path / "peers" / "there").mkdir(parents=True)
    (tmp_path / "peers" / "there" / ".ready").touch()
    monkeypatch.setattr(
        dedup, "METHODS", {"a": ("there", None), "b": (None, None), "c": ("no-such-package", None)}
    )
    monkeypatch.setattr(dedup, "ONE_CORE", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    dedup.find_peers("--no-index")
    folder = str(tmp_path / "peers" / "there")
    assert folder in sys.path
    assert dedup.ONE_CORE["PYTHONPATH"].split(os.pathsep)[-1] == folder
    assert "skipped: no-such-package" in capsys.readouterr().out
    monkeypatch.setattr(dedup, "available", lambda package: "1")  # what is there is not installed again
    monkeypatch.setattr(dedup, "folder_of", None)
    dedup.find_peers()


@pytest.mark.parametrize("compiled", [False, True])
def test_our_side_trains_compiled_when_it_says_so(monkeypatch, compiled):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function: lambda *args: calls.append(1) or function(*args))
    shape = {"vocab_size": 32, "dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 8}
    side = Ours()
    x = torch.arange(8)[None]
    step = side.trainer(side.fresh(shape | {"max_seq_len": 8}), x, x, "float32", compiled)
    step()
    step()
    assert len(calls) == 2 * compiled


def test_a_store_is_whole_after_every_result_and_resumes(tmp_path):
    path = tmp_path / "r.json"
    store = Store(path, command="c", machine=MACHINE)
    store.put("a", {"x": 1})
    assert json.loads(path.read_text())["results"]["a"]["x"] == 1
    assert Store(path, command="c", machine=MACHINE, resume=True).has("a")
    anew = Store(path, command="c", machine=MACHINE)
    anew.record["started"] = "9999"
    assert not anew.has("a")  # measured by an earlier run
    assert anew.record["results"]["a"]["x"] == 1  # yet kept until there is a newer figure
    assert Store(path, command="c", machine=MACHINE | {"cpu": "another"}).record["results"] == {}
    store.note(versions={"p": "1"})
    store.note(versions={"q": "2"})
    assert store.record["versions"] == {"p": "1", "q": "2"}


# ---- the GPU's script, on toy sizes -----------------------------------------------------------------------------------


def test_the_gpu_script_measures_everything_within_its_budget(tmp_path, capsys):
    args = gpu.Args(device="cpu", smoke=True, out=tmp_path / "gpu.json")
    path = gpu.run(args)
    results = json.loads(path.read_text())["results"]
    assert list(results) == list(gpu.plan(gpu.Setting(device=gpu.torch.device("cpu"), smoke=True)))
    assert not [name for name, result in results.items() if "failed" in result]
    for name, result in results.items():
        if name.startswith("train"):
            assert result["mfu"] is None or math.isclose(
                result["mfu"],
                result["tokens_per_s"] * flops_per_token(gpu.SMOKE, 64, backward=True) / result["peak_flops"],
            )
        if name.startswith("decode"):
            assert result["new_tokens"] == 4
            assert "tokens_per_s" in result
    assert results["attention sdpa"]["both_flops_per_s"] > 0
    assert results["attention tiled"]["both_flops_per_s"] > 0
    before = path.read_bytes()
    capsys.readouterr()
    gpu.run(replace(args, resume=True))
    assert path.read_bytes() == before
    gpu.run(replace(args, budget_min=0.0, out=tmp_path / "none.json"))
    assert not (tmp_path / "none.json").exists()
    assert "the budget no longer has" in capsys.readouterr().out


def test_the_gpu_script_wants_a_gpu_for_real_sizes(tmp_path):
    with pytest.raises(SystemExit, match="--smoke"):
        gpu.run(gpu.Args(device="cpu", out=tmp_path / "g.json"))


def test_the_gpu_models_have_the_sizes_of_their_names():
    from minillm.transformer import count_parameters

    for name, config in gpu.MODELS.items():
        millions = float(name[:-1]) * {"M": 1, "B": 1000}[name[-1]]
        assert count_parameters(config).total / 1e6 == pytest.approx(millions, rel=0.11)


# ---- the page -----------------------------------------------------------------------------------------------------------


def measured(kind, ratio, **more):
    work = beside.asdict(replace(SMOKE, kind=kind))
    rates = {"minillm": 100.0} | {side: 100.0 / r for side, r in ratio.items()}
    return {"work": work, "ratio": ratio, "tokens_per_s": rates, "measured": "2026-01-01T00:00:00Z"} | more


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    return tmp_path


def test_the_page_stands_without_any_result(results):
    text = page.fill((ROOT / "book" / "benchmarks.md").read_text(encoding="utf-8"))
    assert "%MEASURED" not in text
    assert text.count("make bench`") >= 4
    assert "No GPU has been measured" in text


def test_the_page_shows_the_files_figures_and_what_is_not_reached(results):
    shape = beside.SHAPES["smoke"]
    flops = flops_per_token(ModelConfig(**shape), 16, backward=True)
    record = {
        "machine": MACHINE,
        "versions": {"minillm": "0", "litgpt": "0.5"},
        "missing": {"nanoGPT": "not on PyPI"},
        "results": {
            "train a": measured(
                "train",
                {"transformers": 2.0, "litgpt": 1.03},
                shape=shape,
                matmul_flops_per_s={"minillm": 100 * flops / 0.6, "transformers": 100 * flops / 0.9},
            ),
            "decode b": measured("decode", {"transformers": 1.6}),
        },
    }
    (results / "beside-cpu.json").write_text(json.dumps(record))
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in page.goals().splitlines()}
    assert rows["| train a: speed ÷ fastest peer"] == ["1.03", "≥\N{NO-BREAK SPACE}1.05", "**no** |"]
    assert rows["| decode b: speed ÷ transformers"] == ["1.60", "≥\N{NO-BREAK SPACE}1.5", "yes |"]
    goal = "≥\N{NO-BREAK SPACE}0.85"
    assert rows["| train a: FLOP/s ÷ a large product's in torch"] == ["0.90", goal, "yes |"]
    assert rows["| train a: FLOP/s ÷ a large product's in minillm"] == ["0.60", goal, "**no** |"]
    assert "make bench" in page.anatomy(), "no parts were measured"
    parts = {"linear layers": 0.5, "attention": 0.25, "optimizer": 0.05, "the rest": 0.2}
    record["results"]["train a"]["parts"] = dict.fromkeys(("minillm", "transformers"), parts)
    (results / "beside-cpu.json").write_text(json.dumps(record))
    assert "| train a | 50% | 25% | 5% | 20% |" in page.anatomy()
    assert page.anatomy().count("<svg") == 1
    training = page.speeds("Training", "train")
    assert "| train a | 100 | – | 2.00 | 1.03 | – |" in training
    assert training.count("<svg") == 1
    assert "decode b" not in training
    assert "nanoGPT (not on PyPI)" in page.machine()
    assert "torch 2, litgpt 0.5" in page.machine()


def test_the_page_holds_a_gpu_against_its_goals(results):
    record = {
        "matmul": {"bf16_flops_per_s": 7e14, "copy_bytes_per_s": 4e12},
        "train 350M compiled": {"mfu": 0.52},
        "train 1.3B compiled": {"failed": "out of memory"},
        "train 125M eager": {"mfu": 0.2},
        "attention sdpa": {"forward_flops_per_s": 5e14, "both_flops_per_s": 4e14},
        "attention triton": {"forward_flops_per_s": 4e14, "both_flops_per_s": 2e14},
        "decode 7B batch 1": {"bytes_per_s": 3e12},
    }
    (results / "gpu-x.json").write_text(
        json.dumps({"machine": {"gpu": "X", "torch": "2"}, "results": record})
    )
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in page.goals().splitlines()[3:-1]}
    assert {what: (row[0], row[2]) for what, row in rows.items()} == {
        "X, train 350M compiled: FLOP/s ÷ the card's peak (MFU)": ("0.52", "yes |"),
        "X, our Triton kernel ÷ torch's, forward": ("0.80", "yes |"),
        "X, our Triton kernel ÷ torch's, both passes": ("0.50", "**no** |"),
        "X, decode 7B bfloat16: bytes read ÷ the bandwidth of a copy": ("0.75", "yes |"),
    }


def test_the_figures_of_a_speedrun_count_each_stage_once(tmp_path):
    files = {
        "stages": {
            "counts": {"train": 3},
            "steps": 7,
            "training": {"seconds": 8.0},
            "pretrain": {"what": "held-out loss", "seconds": 9.0},
        },
        "scores": {
            "training": {"held_out_nats": 0.5},
            "decode_tokens_per_s": 2.0,
            "peak_memory_bytes": 3,
            "scores": [{"name": "sums", "n": 4, "correct": 1, "accuracy": 0.25, "wrong": None}],
        },
        "config": {"recipe": "tiny"},
    }
    for name, record in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    found = figures(tmp_path)
    assert found["seconds"] == {"pretrain": 9.0}  # training is a part of it
    assert (found["steps"], found["recipe"]) == (7, "tiny")
    assert found["scores"] == [{"name": "sums", "n": 4, "correct": 1}]


def test_a_tool_that_misses_pairs_is_no_rival_in_speed(results):
    rates = {"minillm": 50.0, "careful": 10.0, "careless": 400.0, "cuts only": 900.0}
    marks = {"minillm": (1.0, 1.0), "careful": (0.99, 1.0), "careless": (0.5, 1.0)}
    runs = {
        name: {"100000": [dict(zip(("recall_at_0.9", "precision"), marks.get(name, ())))]} for name in rates
    }
    summary = {name: {"documents_per_s": {"100000": rate}} for name, rate in rates.items()}
    (results / "dedup-speed.json").write_text(json.dumps({"runs": runs, "summary": summary}))
    assert "peer that finds them | 5.00 |" in page.goals()
    assert "| careless | 0.500 | 1.000 | 400 |" in page.duplicates()
    assert "| cuts only | – | – | 900 |" in page.duplicates()


def test_less_is_better_where_it_is(results):
    memory = {
        "work": beside.asdict(replace(SMOKE, kind="memory")),
        "peak_bytes": {"minillm": 3 << 20, "litgpt": 2 << 20},
    }
    (results / "beside-cpu.json").write_text(
        json.dumps({"machine": MACHINE, "results": {"memory c": memory}})
    )
    assert "| memory c: memory ÷ leanest peer | 1.50 | ≤\N{NO-BREAK SPACE}1 | **no** |" in page.goals()
    assert "| c | 3 | – | – | 2 | – |" in page.memory()


def test_a_run_leaves_figures_versions_and_what_was_missing_in_its_file(tmp_path, monkeypatch, capsys):
    work = replace(SMOKE, kind="train", quick=1, sides=("minillm", "plain PyTorch"))
    other, closed, close = replace(work, shape="other"), [], beside.Bench.close
    monkeypatch.setitem(beside.SHAPES, "other", beside.SHAPES["smoke"])
    monkeypatch.setattr(
        beside,
        "works",
        lambda: [work, replace(work, batch=3, quick=0), replace(work, kind="decode", quick=1), other],
    )
    monkeypatch.setattr(beside.Bench, "close", lambda self: closed.append(1) or close(self))
    args = beside.Args(quick=True, sides=("minillm", "plain PyTorch"), out=tmp_path / "b.json", only="train")
    assert beside.run(args) == 0
    record = json.loads((tmp_path / "b.json").read_text())
    assert list(record["results"]) == [work.name, other.name]
    # Between two shapes, for a process keeps the memory that it once had, and at the end.
    assert len(closed) == 2
    rates = record["results"][work.name]["matmul_flops_per_s"]
    assert rates.keys() == {"minillm", "plain PyTorch"}
    assert min(rates.values()) > 0
    assert record["versions"]["transformers"]
    assert "nanoGPT" in record["missing"]
    assert work.name in capsys.readouterr().out
    assert (
        beside.run(replace(args, only="", resume=True, budget_min=0.0)) == 1
    )  # the decoding is left for later


def test_every_stored_result_can_be_drawn():
    for part in page.PARTS.values():
        assert part().strip()
