"""The cleaning pipeline: nothing vanishes, nothing is done twice, and neither workers nor kills change what comes out."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from clean_steps import QUICK, AtLeast, Fails, Mark, Same, Squeeze

from minillm.base.errors import CleanError, CorpusError, RunLocked
from minillm.cli.main import main
from minillm.corpus import Document, jaccard
from minillm.extract import Drop
from minillm.pipeline.phases import FailurePolicy, describe, plan
from minillm.pipeline.run import clean
from minillm.pipeline.steps import ORDER, CleanSteps, HeuristicsChoice, default_steps
from minillm.pipeline.work import clean_documents
from minillm.readers.documents import read_documents, write_documents
from minillm.show.cleaning import truth_table
from minillm.world.stream import documents
from minillm.world.task import CorpusConfig

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """1,500 documents of the own corpus, many of them with a planted defect."""
    path = tmp_path_factory.mktemp("raw") / "raw.jsonl"
    write_documents(documents(CorpusConfig(defects=0.4), n_documents=1500), path)
    return path


def outputs(folder):
    """Everything that must not depend on how a run went: the clean and the dropped documents, byte by byte."""
    files = [*sorted((folder / "documents").glob("*")), folder / "dropped.jsonl.gz"]
    return {path.name: path.read_bytes() for path in files if path.exists()}


def counts(report):
    """The parts of a report that must not depend on how a run went."""
    steps = [{key: value for key, value in step.items() if key != "seconds"} for step in report["steps"]]
    return report["balance"], report["tokens"], steps


def texts(folder):
    return [document.text for document in read_documents(folder / "documents")]


def dropped_lines(folder):
    with gzip.open(folder / "dropped.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# Phases


def test_a_plan_cuts_at_the_steps_that_see_the_whole_collection():
    a, b, c, x, y = AtLeast(), Squeeze(), AtLeast(5, "c"), Same(), Mark()
    phases = plan([a, b, x, y, c])
    assert [(p.before, p.steps, p.after) for p in phases] == [(None, (a, b), x), (x, (), y), (y, (c,), None)]
    assert [p.acting for p in phases] == [(a, b), (x,), (y, c)]
    assert [(p.before, p.steps, p.after) for p in plan([])] == [(None, (), None)]


def test_what_is_no_step_is_refused():
    with pytest.raises(ValueError, match="is no step"):
        plan([AtLeast(), "length"])
    with pytest.raises(ValueError, match="two steps are named 'at_least'"):
        plan([AtLeast(), AtLeast(5)])


# What comes out


def test_the_pipeline_does_what_the_loop_in_memory_does(raw, tmp_path):
    report = clean(raw, QUICK, tmp_path / "out", chunk_documents=97, keep_dropped=True)
    documents = list(read_documents(raw))
    results = list(clean_documents(documents, QUICK))
    kept = [result for result in results if isinstance(result, Document)]
    assert len(results) == 1500
    assert 300 < len(kept) < 1400
    came = list(read_documents(tmp_path / "out" / "documents"))
    assert [(d.text, d.lang, d.kind, d.split) for d in came] == [
        (d.text, d.lang, d.kind, d.split) for d in kept
    ]
    assert [{**d.meta, "source": 0} for d in came] == [{**d.meta, "source": 0} for d in kept]
    reasons = Counter(result.reason for result in results if isinstance(result, Drop))
    assert sum((Counter(step["reasons"]) for step in report["steps"]), Counter()) == reasons


def test_nothing_vanishes(raw, tmp_path):
    report = clean(raw, QUICK, tmp_path, chunk_documents=200, keep_dropped=True)
    lines, dropped = texts(tmp_path), dropped_lines(tmp_path)
    assert report["balance"] == {"in": 1500, "out": len(lines), "dropped": len(dropped), "unreadable": 0}
    assert len(lines) + len(dropped) == 1500
    where = [d.meta["source"] for d in read_documents(tmp_path / "documents")]
    assert sorted([*where, *(record["meta"]["source"] for record in dropped)]) == sorted(
        document.meta["source"] for document in read_documents(raw)
    )
    told = Counter((record["dropped"]["step"], record["dropped"]["reason"]) for record in dropped)
    assert told == {(s["name"], reason): n for s in report["steps"] for reason, n in s["reasons"].items()}
    for before, after in zip(report["steps"], report["steps"][1:]):
        assert before["n_out"] == after["n_in"]
        assert before["tokens_out"] == after["tokens_in"]


def test_workers_change_nothing(raw, tmp_path):
    reports = [
        clean(raw, QUICK, tmp_path / str(n), workers=n, chunk_documents=100, keep_dropped=True)
        for n in (1, 3)
    ]
    assert outputs(tmp_path / "1") == outputs(tmp_path / "3")
    assert counts(reports[0]) == counts(reports[1])


def test_the_size_of_chunks_changes_no_document(raw, tmp_path):
    reports = [clean(raw, QUICK, tmp_path / str(n), chunk_documents=n) for n in (64, 5000)]
    assert texts(tmp_path / "64") == texts(tmp_path / "5000")
    assert counts(reports[0]) == counts(reports[1])
    assert len(list((tmp_path / "64" / "documents").iterdir())) > len(
        list((tmp_path / "5000" / "documents").iterdir())
    )


def test_the_work_folder_is_gone_and_a_second_call_does_nothing(raw, tmp_path):
    said = []
    first = clean(raw, QUICK, tmp_path, say=said.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock",
        "config.json",
        "documents",
        "report.html",
        "report.json",
    ]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}
    assert clean(raw, QUICK, tmp_path, say=said.append) == first
    assert "done before" in said[-1]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"} == stamps


# Interruptions


def start(raw, out, workers):
    command = [sys.executable, str(TESTS / "clean_steps.py"), str(raw), str(out), str(workers), "STEPS"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_the_end_of(pids):
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)


def children(pid):
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments_the_same_command_ends_with_the_same_bytes(raw, tmp_path, workers):
    straight = start(raw, tmp_path / "straight", 1)
    assert straight.communicate()[1] == ""
    wanted = outputs(tmp_path / "straight")
    assert len(wanted) > 10
    rng, kills, begun, partial = random.Random(workers), 0, tmp_path / "killed", 0
    while True:
        process = start(raw, begun, workers)
        while process.poll() is None and not (begun / "config.json").exists():
            time.sleep(0.01)
        if kills < 5 - 2 * workers:
            done = len(list(begun.glob("work/*/*.account.json")))
            goal = done + rng.randint(
                1, 9
            )  # so many chunks later, and a moment that is not the end of a chunk
            while process.poll() is None and len(list(begun.glob("work/*/*.account.json"))) < goal:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.1)
            if process.poll() is None:
                offspring = children(process.pid)
                process.send_signal(signal.SIGKILL)
                last_words = process.communicate()[1]  # the workers see that nobody is there, and go in peace
                assert not any(word in last_words for word in ("Broken pipe", "reset by peer")), last_words
                kills += 1
                partial += (begun / "work").exists()
                wait_for_the_end_of(offspring)
                continue
        assert process.communicate()[1] == ""
        break
    assert kills >= 5 - 2 * workers, "the run was over before it could be killed: make it longer"
    assert partial == kills
    assert outputs(begun) == wanted
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("straight", "killed")]
    assert counts(reports[0]) == counts(reports[1])
    assert not list(begun.rglob("*.tmp"))


def test_a_worker_that_is_killed_is_reported_and_the_run_can_go_on(tmp_path):
    write_documents(
        [Document(f"text number {i}" + " grenade" * (i == 70)) for i in range(100)], tmp_path / "a.jsonl"
    )
    with pytest.raises(CleanError, match=r"a worker ended in chunk 7 \(exit code 9\).*goes on from there"):
        clean(tmp_path / "a.jsonl", [Fails("exit")], tmp_path / "out", workers=2, chunk_documents=10)
    assert (tmp_path / "out" / "work").exists()


def test_another_configuration_is_refused_by_its_first_difference(raw, tmp_path):
    clean(raw, [AtLeast(12), Same()], tmp_path)
    with pytest.raises(ValueError, match=r"steps\.at_least\.n=12, now steps\.at_least\.n=13.*--restart"):
        clean(raw, [AtLeast(13), Same()], tmp_path)
    with pytest.raises(ValueError, match="keep_dropped=False, now keep_dropped=True"):
        clean(raw, [AtLeast(12), Same()], tmp_path, keep_dropped=True)
    with pytest.raises(ValueError, match="order="):
        clean(raw, [Same(), AtLeast(12)], tmp_path)
    report = clean(raw, [AtLeast(13), Same()], tmp_path, restart=True)
    assert report["config"]["steps"]["at_least"]["n"] == 13


def test_sources_that_changed_are_refused(tmp_path):
    write_documents([Document("one text"), Document("another text")], tmp_path / "a.jsonl")
    clean(tmp_path / "a.jsonl", [AtLeast(1)], tmp_path / "out")
    write_documents([Document("one text"), Document("another text!")], tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"sources\..*a\.jsonl\.bytes="):
        clean(tmp_path / "a.jsonl", [AtLeast(1)], tmp_path / "out")


def test_a_folder_of_something_else_is_left_alone(raw, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds 'thesis\.txt'"):
        clean(raw, [AtLeast()], tmp_path)
    with pytest.raises(ValueError, match=r"holds 'thesis\.txt'"):
        clean(raw, [AtLeast()], tmp_path, restart=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ValueError, match="is a file"):
        clean(raw, [AtLeast()], tmp_path / "thesis.txt")


def test_two_runs_in_one_folder_are_refused(raw, tmp_path):
    process = start(raw, tmp_path / "out", 1)
    while process.poll() is None and not (tmp_path / "out" / "work").exists():
        time.sleep(0.01)
    with pytest.raises(RunLocked, match="another run"):
        clean(raw, QUICK, tmp_path / "out", chunk_documents=100, keep_dropped=True, report=False)
    process.kill()
    process.communicate()


# Steps that fail


def fragile(tmp_path):
    write_documents(
        [Document(f"text number {i}" + " grenade" * (i == 7)) for i in range(20)], tmp_path / "a.jsonl"
    )
    return tmp_path / "a.jsonl"


def test_a_step_that_fails_costs_one_document_or_stops_the_run(tmp_path):
    source = fragile(tmp_path)
    report = clean(source, [Fails(), AtLeast(1)], tmp_path / "skip", keep_dropped=True)
    assert report["balance"] == {"in": 20, "out": 19, "dropped": 1, "unreadable": 0}
    assert dropped_lines(tmp_path / "skip")[0]["dropped"] == {
        "step": "fails",
        "reason": "error",
        "detail": "RecursionError: too deep",
    }
    with pytest.raises(CleanError, match=r"a\.jsonl:8: step 'fails' failed \(RecursionError: too deep\)"):
        clean(source, [Fails()], tmp_path / "raise", on_error="raise")
    assert clean(source, [Fails()], tmp_path / "raise", on_error="skip")["balance"]["out"] == 19


def test_a_step_that_hangs_costs_one_document(tmp_path):
    begun = time.monotonic()
    report = clean(fragile(tmp_path), [Fails("hang")], tmp_path / "out", seconds_per_document=0.2)
    assert report["steps"][0]["reasons"] == {"too_slow": 1}
    assert time.monotonic() - begun < 20
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_sketch_that_fails_costs_one_document(tmp_path):
    class Brittle(Same):
        def sketch(self, document):
            if "grenade" in document.text:
                raise ZeroDivisionError("no words")
            return super().sketch(document)

    report = clean(fragile(tmp_path), [Brittle()], tmp_path / "out", keep_dropped=True)
    assert report["steps"][0]["reasons"] == {"error": 1}
    assert (report["steps"][0]["n_in"], report["balance"]["out"]) == (20, 19)


def test_arguments_are_checked(raw, tmp_path):
    for options, message in (
        ({"workers": -1}, "workers must not be negative, got -1"),
        ({"on_error": "panic"}, "on_error='panic' must be 'skip' or 'raise'"),
        ({"chunk_documents": 0}, "chunk_documents=0"),
        ({"seconds_per_document": -1.0}, "seconds_per_document=-1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            clean(raw, [AtLeast()], tmp_path / "out", **options)
    with pytest.raises(CorpusError, match="nowhere"):
        clean(tmp_path / "nowhere.jsonl", [AtLeast()], tmp_path / "out")


def test_settings_are_told_apart():
    assert describe(AtLeast(3)) == {"step": "at_least", "kind": "AtLeast", "n": 3}
    big = [describe(Fails(word="x" * 5000 + end))["word"] for end in "aab"]
    assert big[0] == big[1] != big[2]
    assert len(big[0]) < 40


# Beyond one machine


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Seven files of uneven size, with duplicates across them, one damaged in the middle, one with a bad line."""
    folder = tmp_path_factory.mktemp("shards")
    written = list(documents(CorpusConfig(defects=0.4), n_documents=700))
    begin = 0
    for number, size in enumerate((40, 200, 3, 120, 137, 150, 50)):
        write_documents(written[begin : begin + size], folder / f"{number}.jsonl.gz")
        begin += size
    whole = (folder / "4.jsonl.gz").read_bytes()
    (folder / "4.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "7.jsonl").write_text('{"text": "a first line that can be read"}\n{"text": \n')
    return folder


def through_datatrove(shards, out, steps=QUICK, **options):
    from minillm.pipeline.cluster import cluster_jobs

    jobs = cluster_jobs([shards], steps, out, **options)
    jobs[-1].run()
    return jobs


@pytest.mark.parametrize(("tasks", "workers"), [(8, 2), (3, 1)])
def test_many_tasks_of_datatrove_give_what_one_process_gives(shards, tmp_path, tasks, workers):
    report = clean(shards, QUICK, tmp_path / "one", keep_dropped=True)
    assert report["balance"]["unreadable"] >= 2
    jobs = through_datatrove(
        shards, tmp_path / "many", tasks=tasks, workers=workers, policy=FailurePolicy(keep_dropped=True)
    )
    assert len(jobs) == 7
    one, many = (list(read_documents(tmp_path / name / "documents")) for name in ("one", "many"))
    assert one == many
    told = Counter(
        (record["meta"]["source"], record["dropped"]["step"], record["dropped"]["detail"])
        for path in (tmp_path / "many" / "dropped").iterdir()
        for record in map(json.loads, gzip.decompress(path.read_bytes()).splitlines())
    )
    assert told == Counter(
        (r["meta"]["source"], r["dropped"]["step"], r["dropped"]["detail"])
        for r in dropped_lines(tmp_path / "one")
    )


def test_slurm_runs_the_same_jobs(shards, tmp_path, monkeypatch):
    """Everything of the Slurm executor is real but the scheduler: this sbatch runs the array at once, task by task."""
    tools = tmp_path / "tools"
    tools.mkdir()
    sbatch = tools / "sbatch"
    sbatch.write_text(
        "#!/bin/bash\n"
        'for word in "$@"; do case $word in --export=*) export "${word#--export=ALL,}";; esac; script=$word; done\n'
        "last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' $script)\n"
        'echo "$*" >> ' + str(tmp_path / "calls") + "\n"
        "for task in $(seq 0 ${last:-0}); do\n"
        "  SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=node1 bash $script >> "
        + str(tmp_path / "log")
        + " 2>&1 || exit 1\n"
        'done\necho "Submitted batch job $(wc -l < ' + str(tmp_path / "calls") + ')"\n'
    )
    sbatch.chmod(0o755)
    scontrol = tools / "scontrol"
    scontrol.write_text("#!/bin/bash\necho node1\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv(
        "PATH", os.pathsep.join((str(tools), str(Path(sys.executable).parent), os.environ["PATH"]))
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(TESTS), str(TESTS.parent))))
    steps = (Same(), AtLeast(20))
    clean(shards, steps, tmp_path / "one", report=False)
    through_datatrove(
        shards,
        tmp_path / "many",
        steps,
        tasks=2,
        kind="slurm",
        time="00:10:00",
        partition="cpu",
        with_srun=False,
    )
    log = (tmp_path / "log").read_text()
    one, many = (list(read_documents(tmp_path / name / "documents")) for name in ("one", "many"))
    assert one == many, log[-3000:]
    assert "--dependency=afterok:1" in (tmp_path / "calls").read_text()


@pytest.mark.slow
def test_ray_runs_the_same_jobs(shards, tmp_path):
    """A Ray cluster of this machine; `pip install 'minillm[ray]'` brings it."""
    ray = pytest.importorskip("ray")
    steps = (Same(), AtLeast(20))
    clean(shards, steps, tmp_path / "one", report=False)
    paths = {"PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent)))}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": paths})
    try:
        through_datatrove(shards, tmp_path / "many", steps, tasks=3, kind="ray", workers=2)
    finally:
        ray.shutdown()
    one, many = (list(read_documents(tmp_path / name / "documents")) for name in ("one", "many"))
    assert one == many


def test_cluster_jobs_are_checked(shards, tmp_path):
    from minillm.pipeline.cluster import StepBlock, cluster_jobs

    for options, message in (
        ({"tasks": 0}, "tasks=0 must be at least 1"),
        ({"tasks": 1, "kind": "abacus"}, "kind='abacus' must be one of local, slurm, ray"),
    ):
        with pytest.raises(ValueError, match=message):
            cluster_jobs([shards], QUICK, tmp_path, **options)
    with pytest.raises(ValueError, match="'same' needs the whole collection"):
        StepBlock([Same()])


# The command


def minillm(*words, cwd, limit=None, start=False):
    """The command as a user runs it; with `limit` its address space is so many bytes."""
    command = [sys.executable, "-m", "minillm.cli", *map(str, words)]
    if limit:
        setting = f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit})); "
        command = [sys.executable, "-c", setting + "os.execv(sys.argv[1], sys.argv[1:])", *command]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)},
    )
    if start:
        return process
    out, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    """Corpus, benchmark and report, as the README has them."""
    folder = tmp_path_factory.mktemp("demo")
    made = minillm("corpus", "--documents", 3000, "--benchmark", "bench.jsonl", "--quiet", cwd=folder)
    assert made.returncode == 0, made.stderr
    words = (
        "clean",
        "raw.jsonl",
        "--out",
        "clean",
        "--report",
        "--recipe",
        "own",
        "--keep-dropped",
        "--quiet",
    )
    done = minillm(*words, "--workers", 1, "--decontaminate.against", "bench.jsonl", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_corpus_tells_the_truth_about_its_own_repetitions(demonstration):
    documents = list(read_documents(demonstration[0] / "raw.jsonl"))
    retold = [d for d in documents if "retells" in d.meta]
    assert len(retold) > 20
    for document in retold[:50]:
        other = documents[document.meta["retells"]]
        assert other.meta["number"] < document.meta["number"]
        assert other.meta["people"] == document.meta["people"]
        assert document.meta["jaccard"] == pytest.approx(jaccard(document.text, other.text), abs=1e-3)
    first = {}
    for number, document in enumerate(documents):
        assert document.meta.get("same_as", number) == first.setdefault(document.text, number)
        assert document.meta["number"] == number
    assert (
        sum("same_as" in d.meta for d in documents)
        > sum(d.meta.get("defect") == "duplicate" for d in documents)
        > 50
    )


def test_every_step_beside_the_planted_truth(demonstration):
    folder, done = demonstration
    report = json.loads((folder / "clean" / "report.json").read_text(encoding="utf-8"))
    table = {row["step"]: row for row in truth_table(report)}
    least = {  # recall, precision; what a step acts on besides is said in the chapters
        "extract": (0.99, 0.99),
        "repair": (0.99, 0.95),
        "language": (0.99, 0.7),
        "machine": (0.5, 0.3),
        "pii": (0.99, 0.99),
        "toxicity": (0.99, 0.95),
        "exact": (1.0, 1.0),
        "near": (0.85, 0.5),  # what else it takes is like enough: see the next test
        "decontaminate": (1.0, 0.9),
    }
    assert table.keys() == least.keys()
    for step, (recall, precision) in least.items():
        assert table[step]["planted"] >= 5, step
        assert table[step]["recall"] >= recall, table[step]
        assert table[step]["precision"] >= precision, table[step]
        assert table[step]["caught"] == round(table[step]["recall"] * table[step]["planted"])
        assert f"{table[step]['recall']:.3f}" in done.stdout
    by_name = {step["name"]: step for step in report["steps"]}
    texts, before, after = by_name["extract"]["restored"]
    assert texts > 50
    assert before / texts < 0.85e6 < 0.97e6 < after / texts
    assert all(n == gone for n, gone in by_name["pii"]["spans"].values())
    assert len(by_name["pii"]["spans"]) >= 4


def test_what_the_pipeline_drops_as_near_duplicates_is_nearly_the_same(demonstration):
    """Whether planted or made by the corpus's templates: each has an earlier document beside it that is so similar."""
    folder = demonstration[0]
    kept = [document.text for document in read_documents(folder / "clean" / "documents")]
    gone = dropped_lines(folder / "clean")
    near = [r["text"] for r in gone if r["dropped"]["step"] == "near"]
    others = kept + [r["text"] for r in gone if r["dropped"]["step"] in ("near", "decontaminate")]
    assert len(near) >= 20
    similar = [max(jaccard(text, other) for other in others if other != text) for text in near[:20]]
    assert sum(s >= 0.7 for s in similar) >= 0.95 * len(similar)


def test_no_planted_toxic_or_garbled_document_comes_through(demonstration):
    documents = list(read_documents(demonstration[0] / "clean" / "documents"))
    assert len(documents) > 1500
    assert not any(d.meta.get("toxic") for d in documents)
    assert not any("\N{REPLACEMENT CHARACTER}" in d.text for d in documents)
    assert not any("<div" in d.text for d in documents)
    assert len({d.text for d in documents}) == len(documents)


def test_the_report_stands_alone(demonstration):
    page = (demonstration[0] / "clean" / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") == 1
    shown = page.replace('xlink:href="#', "").replace('href="#', "").replace("url(#", "")
    for outside in ('src="', "src='", "@import", "url(", "<script"):
        assert outside not in shown
    for part in (
        "Step by step",
        "Against the truth",
        "What was dropped",
        "What was changed",
        "toxicity: toxic",
        "became",
    ):
        assert part in page
    report = json.loads((demonstration[0] / "clean" / "report.json").read_text(encoding="utf-8"))
    for step in report["steps"]:
        assert f"<td>{step['name']}</td><td class=n>{step['n_in']:,}</td>" in page
        for reason, n in step["reasons"].items():
            assert f"{step['name']}: {reason} ({n:,})" in page
            assert 1 <= len(step["samples"][reason]) <= 3
    assert report["machine"]["cpu_cores"] >= 1


def test_ctrl_c_and_the_same_command_again(tmp_path):
    words = (
        "clean",
        "raw.jsonl",
        "--out",
        "clean",
        "--recipe",
        "own",
        "--skip",
        "machine",
        "toxicity",
        "--quiet",
    )
    words = (*words, "--chunk-documents", 50, "--workers", 2)
    write_documents(documents(CorpusConfig(defects=0.3), n_documents=2500), tmp_path / "raw.jsonl")
    process = minillm(*words, cwd=tmp_path, start=True)
    while process.poll() is None and len(list((tmp_path / "clean" / "work").glob("*/*.account.json"))) < 5:
        time.sleep(0.01)
    offspring = children(process.pid)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, out + errors
    assert errors == "minillm: interrupted; the same command resumes\n"
    wait_for_the_end_of(offspring)
    before = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "clean" / "work" / "phase-0").glob("*.account.json")
    }
    assert before
    process = minillm(*words, cwd=tmp_path, start=True)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "2,500 in = " in out
    straight = minillm(*words, "--out", "straight", "--workers", 1, cwd=tmp_path)
    assert straight.returncode == 0, straight.stderr
    assert outputs(tmp_path / "clean") == outputs(tmp_path / "straight")


@pytest.fixture(scope="module")
def horrors(tmp_path_factory):
    """A folder of what goes wrong with files; the number of documents in it that can be read."""
    folder = tmp_path_factory.mktemp("horrors")
    good = [
        f"This is the good document number {i}, and it has been written by a person who had the time."
        for i in range(60)
    ]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in good]
    noise = random.Random(0).randbytes(300_000).hex().encode()
    whole = gzip.compress(b"".join(lines[:9]) + b'{"text": "' + noise, mtime=0)
    (folder / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "malformed.jsonl").write_bytes(
        lines[20] + b'{"text": "no end\n' + b"[1, 2]\n" + b'{"words": 1}\n\xff\xfe\n' + lines[21]
    )
    with open(folder / "long.jsonl", "wb") as file:
        file.write(lines[22] + b'{"text": "')
        for _ in range(100):
            file.write(b"a" * 1_000_000)
        file.write(b'"}\n' + lines[23])
    (folder / "odd.jsonl").write_bytes(
        b'{"text": "half \\ud800 a pair"}\n{"text": "a \\u0000 in it"}\n' + lines[24]
    )
    page = "<div>" * 200_000 + good[25] + "</div>" * 10
    (folder / "nested.jsonl").write_bytes(
        json.dumps({"text": page[:999_000]}).encode() + b"\n" + b'{"text": ' + b"[" * 100_000 + b"\n"
    )
    with open(
        folder / "bomb.jsonl.gz", "wb"
    ) as file:  # a gigabyte and a half out of one and a half megabytes
        file.write(gzip.compress(lines[26] + b'{"text": "'))
        member = gzip.compress(b"a" * 15_000_000)
        for _ in range(100):
            file.write(member)
        file.write(gzip.compress(b'"}\n' + lines[27]))
    (folder / "bomb.txt.gz").write_bytes(gzip.compress(b"b" * 150_000_123, 1))
    (folder / "notes.pdf").write_bytes(b"%PDF-1.7")
    return folder


def test_horrors_are_counted_and_named_in_bounded_memory_and_time(horrors, tmp_path):
    words = (
        "clean",
        horrors,
        "--out",
        "out",
        "--recipe",
        "own",
        "--skip",
        "machine",
        "toxicity",
        "near",
        "--length.min-tokens",
        5,
        "--quiet",
    )
    process = minillm(
        *words,
        "--keep-dropped",
        "--workers",
        1,
        "--max-chars",
        1_000_000,
        cwd=tmp_path,
        limit=4 << 30,
        start=True,
    )
    out, errors = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, out + errors
    assert "Traceback" not in errors
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    skipped = report["read"]["skipped"]
    for reason, least in {
        "damaged": 1,
        "not JSON": 2,
        "no text": 2,
        "not UTF-8": 1,
        "too long": 2,
        "lone surrogate": 1,
        "NUL": 1,
    }.items():
        assert skipped.get(reason, 0) >= least, skipped
    problems = "\n".join(report["read"]["problems"])
    for where in (
        "cut.jsonl.gz:10",
        "malformed.jsonl:2",
        "malformed.jsonl:5",
        "long.jsonl:2",
        "odd.jsonl:1",
        "nested.jsonl:2",
        "bomb.jsonl.gz:2",
    ):
        assert where in problems, problems
    books = report["balance"]
    assert books["in"] == books["out"] + books["dropped"] + books["unreadable"]
    assert books["unreadable"] == sum(skipped.values())
    came = texts(tmp_path / "out")
    for number in (0, 20, 21, 22, 23, 24, 26, 27):
        assert any(f"number {number}," in text for text in came), number
    assert usage.ru_maxrss < 1_500_000  # kilobytes
    assert usage.ru_utime < 120


def test_the_first_horror_stops_a_run_that_asked_for_it(horrors, tmp_path):
    words = (
        "clean",
        horrors / "malformed.jsonl",
        "--on-error",
        "raise",
        "--skip",
        "machine",
        "toxicity",
        "--quiet",
    )
    done = minillm(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "malformed.jsonl:2: not a JSON object" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    again = minillm(*words, "--on-error", "skip", "--length.min-tokens", 5, "--restart", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_memory_does_not_grow_with_the_input(tmp_path):
    """Eight times the text, and a few megabytes more: hashes for deduplication, not text."""
    peaks = []
    for n in (1000, 8000):
        path = tmp_path / f"{n}.jsonl"
        write_documents((Document(f"{i} " + f"word {i} " * 800) for i in range(n)), path)
        command = [
            sys.executable,
            str(TESTS / "clean_steps.py"),
            str(path),
            str(tmp_path / str(n)),
            "1",
            "QUICK",
        ]
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(TESTS.parent)})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        peaks.append(usage.ru_maxrss * 1024)
    assert (tmp_path / "8000.jsonl").stat().st_size > 60_000_000
    assert peaks[1] - peaks[0] < 20_000_000, peaks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clean"], "nothing to clean"),
        (["clean", "nowhere.jsonl"], "nowhere.jsonl"),
        (["clean", "a.zip"], "format '.zip' is unknown"),
        (["clean", "a.jsonl", "--recipe", "cake"], "no recipe 'cake'; there are web, own"),
        (["clean", "a.jsonl", "--skip", "lunch"], "no step 'lunch'; there are extract"),
        (["clean", "a.jsonl", "--workers", "-1"], "workers must not be negative"),
        (["clean", "a.jsonl", "--near.threshold", "1.5"], "threshold=1.5"),
        (["clean", "a.jsonl", "--near.n-hashes", "100"], "n_hashes=100 must be a power of two"),
        (["clean", "a.jsonl", "--length.min-tokens", "-3"], "min_tokens=-3"),
        (
            ["clean", "a.jsonl", "--heuristics.limits", "beauty=1..2"],
            "'beauty=1..2' is no MEASURE=LEAST..MOST",
        ),
        (["clean", "a.jsonl", "--toxicity.scorer", "perspective"], "needs a key"),
        (["clean", "a.jsonl", "--decontaminate.against", "nowhere.jsonl"], "nowhere.jsonl"),
        (["clean", "a.jsonl", "--seconds-per-document", "-1"], "seconds_per_document=-1.0"),
        (["corpus", "--documents", "0"], "documents must be at least 1"),
        (["corpus", "--defects", "0.9"], "defects=0.9 must be a share between 0 and 0.5"),
    ],
)
def test_bad_commands_are_one_line_and_status_2(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_documents([Document("a text")], "a.jsonl")
    Path("a.zip").write_bytes(b"PK")
    assert main([*words, "--quiet"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "Traceback" not in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("command", ["clean", "corpus"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    wanted = {
        "clean": (
            "--near.threshold",
            "--length.min-tokens",
            "the article",
            "--skip",
            "--on-error",
            "default: 0.8",
            "GPT-3",
        ),
        "corpus": ("--documents", "--defects", "--benchmark", "default: 0.3"),
    }
    for option in wanted[command]:
        assert option in text


def test_a_step_that_asks_a_model_sees_no_copies():
    before, after = (
        {"extract", "repair", "exact", "near", "sentences", "decontaminate"},
        {"machine", "toxicity"},
    )
    assert max(map(ORDER.index, before)) < min(map(ORDER.index, after))
    assert ORDER.index("near") < ORDER.index("decontaminate")  # a leak that was copied looks like a phrase


def test_every_step_can_be_left_out_and_every_limit_set():
    everything = [step.name for step in default_steps(CleanSteps())]
    assert everything == [name for name in ORDER if name != "decontaminate"]  # which needs a benchmark
    for name in everything:
        assert name not in [step.name for step in default_steps(CleanSteps(skip=(name,)))]
    config = CleanSteps(heuristics=HeuristicsChoice(limits=("hashes=0.5..", "sentences=..7")))
    rules = {
        rule.measure: rule for rule in next(s for s in default_steps(config) if s.name == "heuristics").rules
    }
    assert (rules["hashes"].least, rules["hashes"].most) == (0.5, float("inf"))
    assert (rules["sentences"].least, rules["sentences"].most) == (-float("inf"), 7)
    assert len(rules) > 10
