"""The command line as a user meets it: real commands, their output, their exit status."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minillm.cli import main
from minillm.cli.parsing import value_of
from minillm.train import TrainConfig

SMALL = [
    *(
        "--data.documents",
        "600",
        "--data.held-out",
        "40",
        "--data.questions",
        "4",
        "--train.steps",
        "12",
        "--train.batch-size",
        "2",
    ),
    *("--model.dim", "32", "--model.n-layers", "1", "--model.n-heads", "2", "--model.n-kv-heads", "1"),
    *("--model.hidden-dim", "64", "--tokenizer.vocab-size", "400", "--model.vocab-size", "400"),
    *("--train.save-every", "4", "--train.log-every", "2", "--quiet", "--device", "cpu"),
]


def minillm(*words, cwd, stdin=None, env=None):
    command = [sys.executable, "-m", "minillm.cli", *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, env=env, timeout=300)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    done = minillm("speedrun", *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_speedrun_goes_through_five_stages_and_reports(run):
    folder, done = run
    for number, stage in enumerate(("corpus", "tokenizer", "shards", "pretrain", "score"), 1):
        assert f"[{number}/5] {stage}" in done.stdout
    assert "A story in English" in done.stdout
    assert "A story in Chinese" in done.stdout
    assert "addition, held out" in done.stdout
    tiny = folder / "runs" / "tiny"
    assert json.loads((tiny / "config.json").read_text())["train"]["steps"] == 12
    lines = [json.loads(line) for line in (tiny / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert lines[-1]["loss_nats"] < lines[0]["loss_nats"]
    scores = json.loads((tiny / "scores.json").read_text())
    assert scores["training"]["held_out_nats"] == pytest.approx(lines[-1]["held_out_nats"])
    assert {record["name"] for record in scores["scores"]} > {"addition, held out"}


def test_the_report_stands_alone(run):
    page = (run[0] / "runs" / "tiny" / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") == 2
    for outside in ('src="', "src='", "href=", "@import", "url("):
        assert outside not in page.replace('xlink:href="#', "").replace('href="#', "").replace("url(#", "")
    assert "A story in Chinese" in page


def test_the_same_command_again_does_nothing_twice(run):
    folder, _ = run
    metrics = (folder / "runs" / "tiny" / "metrics.jsonl").read_bytes()
    again = minillm("speedrun", *SMALL, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("(done before)") == 5
    assert (folder / "runs" / "tiny" / "metrics.jsonl").read_bytes() == metrics


def test_a_slow_machine_makes_the_steps_that_fit_and_remembers_how_many(tmp_path):
    words = (
        "pretrain",
        *SMALL,
        "--train.steps",
        "100000",
        "--train.decay-fraction",
        "1",
        "--minutes",
        "0.01",
    )
    words = (*words, "--train.warmup-steps", "0")
    done = minillm(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "of 100,000: as many as fit in 0.01 minutes here" in done.stdout
    folder = tmp_path / "runs" / "tiny"
    made = json.loads((folder / "stages.json").read_text())["steps"]
    assert made % 100 == 0
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == made
    assert last["lr"] == pytest.approx(2e-3 * 0.02)  # the schedule ends with the run
    (folder / "stages.json").write_text(
        json.dumps({"steps": made + 100})
    )  # as if it had been stopped before its end
    again = minillm(*words, cwd=tmp_path)
    assert again.returncode == 2
    assert f"steps={made}, now steps={made + 100}" in again.stderr.replace("train.", "")


def test_another_config_in_the_same_folder_is_refused(run):
    done = minillm("speedrun", *SMALL, "--train.max-lr", "0.5", cwd=run[0])
    assert done.returncode == 2
    assert "train.max_lr=0.002, now train.max_lr=0.5" in done.stderr
    assert "--restart" in done.stderr


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_resumes_to_the_same_weights(run, tmp_path):
    long = [*SMALL, "--train.steps", "200", "--train.save-every", "50"]
    straight = minillm("pretrain", *long, "--name", "straight", cwd=tmp_path)
    assert straight.returncode == 0, straight.stderr
    command = [sys.executable, "-m", "minillm.cli", "pretrain", *long, "--name", "broken"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics = tmp_path / "runs" / "broken" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    if process.returncode == 0:
        pytest.fail("the run ended before it could be interrupted: make it longer")
    assert process.returncode == 130, errors
    assert "the same command resumes" in errors
    resumed = minillm("pretrain", *long, "--name", "broken", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    weights = [
        (tmp_path / "runs" / name / "model" / "model.safetensors").read_bytes()
        for name in ("straight", "broken")
    ]
    assert weights[0] == weights[1]


def test_generate_continues_a_prompt_and_talks(run):
    folder, _ = run
    words = ("generate", "--model", "runs/tiny", "--max-new-tokens", 8, "--seed", 1)
    one = minillm(*words, "One day", cwd=folder)
    assert one.returncode == 0, one.stderr
    assert one.stdout.startswith("One day")
    assert minillm(*words, "One day", cwd=folder).stdout == one.stdout
    talk = minillm(*words, cwd=folder, stdin="One day\n有一天\n")
    assert talk.stdout == one.stdout + minillm(*words, "有一天", cwd=folder).stdout


def test_tokenizer_trains_encodes_and_decodes(run, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("the cat sat on the mat. 猫坐在垫子上。\n" * 50, encoding="utf-8")
    out = tmp_path / "t.json"
    trained = minillm("tokenizer", "train", text, "--out", out, "--vocab-size", 280, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "280 tokens" in trained.stdout
    encoded = minillm("tokenizer", "encode", "--tokenizer", out, "the 猫 2025", cwd=tmp_path)
    decoded = minillm("tokenizer", "decode", "--tokenizer", out, *encoded.stdout.split(), cwd=tmp_path)
    assert decoded.stdout == "the 猫 2025\n"


def test_speedrun_on_real_text(tmp_path):
    text = tmp_path / "book.jsonl"
    lines = (
        json.dumps({"text": f"Chapter {i}. " + "It was a fine day, and nobody was at home. " * 5})
        for i in range(200)
    )
    text.write_text("\n".join(lines))
    done = minillm("speedrun", *SMALL, "--name", "book", "--data", text, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "beginning of a held-out document" in done.stdout
    assert (tmp_path / "runs" / "book" / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "no command 'nonsense'; there are speedrun"),
        (["speedrun", "--recipe", "huge"], "no recipe 'huge'; there are tiny, small"),
        (["speedrun", "--device", "tpu9"], "device must be auto, cpu"),
        (["speedrun", "--model.vocab-size", "77"], "model.vocab_size is 77, tokenizer.vocab_size 1536"),
        (["speedrun", "--train.seq-len", "9999"], "train.seq_len is 9999, more than model.max_seq_len 256"),
        (["speedrun", "--minutes", "-1"], "minutes must be a number that is not negative, got -1.0"),
        (["speedrun", "--train.steps", "0"], "steps must be at least 1, got 0"),
        (["speedrun", "--data", "nowhere.txt", "--quiet"], "nowhere.txt"),
        (["generate", "hello", "--model", "nowhere"], "no trained model here"),
        (["generate", "hello", "--temperature", "-1"], "temperature"),
        (["tokenizer", "encode", "hello", "--tokenizer", "nowhere.json"], "nowhere.json"),
        (["tokenizer", "train", "nowhere.txt"], "nowhere.txt"),
        (["tokenizer", "fly"], "train | encode | decode"),
        (["info", "nowhere"], "'nowhere' is neither a recipe"),
        (["info"], "a published model such as llama2-7b"),
        (["pretrain", "--engine", "fsdp2", "--zero-stage", "1"], "fsdp2 is ZeRO stage 2 or 3"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "Traceback" not in error
    assert len(error.splitlines()) == 1


def test_an_option_is_found_before_the_words_are_parsed():
    for words, value in (
        ([], "tiny"),
        (["--quiet", "--recipe", "small"], "small"),
        (["--recipe=b1"], "b1"),
        (["--recipe", "small", "--recipe=b1"], "b1"),
        (["--recipe"], "tiny"),
    ):
        assert value_of("--recipe", words, "tiny") == value


def test_an_unknown_option_exits_2(tmp_path):
    done = minillm("speedrun", "--nonsense", "1", cwd=tmp_path)
    assert done.returncode == 2
    assert "nonsense" in done.stdout + done.stderr


def test_a_folder_that_cannot_talk_says_what_it_lacks(tmp_path, capsys):
    for name in ("params.json", "config.json"):
        (tmp_path / name).write_text("{}")
        assert main.main(["generate", "hello", "--model", str(tmp_path)]) == 2
        assert "a model and no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["speedrun", "pretrain", "generate", "info", "tokenizer"])
def test_help_teaches(command, capsys):
    try:
        status = main.main([command, "--help"])
    except SystemExit as stop:
        status = stop.code
    text = capsys.readouterr().out
    assert status == 0
    if command in ("speedrun", "pretrain"):
        for option in ("--train.max-lr", "--model.dim", "--data.sources", "--recipe", "default: 0.002"):
            assert option in text
        for option in dataclasses.fields(TrainConfig):
            told = text.partition(f"--train.{option.name.replace('_', '-')} ")[2].partition("(default")[0]
            assert re.sub(r"\{.*?\}|[│A-Z\s]", "", told), f"--train.{option.name} says nothing of itself"


@pytest.mark.parametrize("name", ["tiny", "small", "m125", "m350", "b1", "b7"])
def test_info_counts_what_the_recipe_builds(name, capsys):
    import torch

    from minillm.runs.recipes import recipe
    from minillm.transformer import Transformer

    assert main.main(["info", name]) == 0
    with torch.device("meta"):
        model = Transformer(recipe(name).model)
    count = sum(p.numel() for p in model.parameters())
    assert f"{name}: {count:,} parameters" in capsys.readouterr().out


def test_the_readme_names_only_commands_that_exist():
    readme = Path(__file__).parent.parent / "README.md"
    for line in readme.read_text(encoding="utf-8").splitlines():
        words = line.strip().lstrip("$ ").split()
        if words[:1] == ["minillm"] and len(words) > 1 and words[1].isalpha():
            assert words[1] in main.COMMANDS, line


def test_the_readme_quotes_the_stored_speedrun():
    root = Path(__file__).parent.parent
    found = json.loads((root / "data" / "results" / "speedrun.json").read_text(encoding="utf-8"))
    marks = {
        score["name"]: f"{score['correct'] / score['n']:.0%}".replace("%", " %") for score in found["scores"]
    }
    minutes = sum(found["seconds"].values()) / 60
    said = " ".join((root / "README.md").read_text(encoding="utf-8").split())
    for quoted in (
        f"({found['steps']:,} steps, {found['training']['tokens_per_s']:,.0f} tokens/s, {minutes:.1f} minutes)",
        f"held-out sums {marks['addition, held out']} right, differences {marks['subtraction, held out']}",
        f"asked about {marks['facts asked about in training, English']}",
        f"{marks['story questions, English, held out']} in English and {marks['story questions, Chinese, held out']} in Chinese",
        f"held-out loss {found['training']['held_out_nats']:.2f} nats a token",
    ):
        assert quoted in said, quoted
