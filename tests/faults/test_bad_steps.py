"""Losses that are no number, and losses that leap: a run that stops, or goes on without the batch."""

import json
import random
import signal

import pytest
from harness import assert_same, contents

SKIP = {"bad_step": "skip", "spike": 20.0, "steps": 60, "log_every": 1}


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("fails", ["nan", "inf"])
def test_a_loss_that_is_no_number_stops_the_run_before_it_does_harm(zygote, data, fails, table, tmp_path):
    code, output = zygote.do("run", run_dir=tmp_path, data=data, fails=fails)
    assert code == 2
    last = int(output.split("\nTrainingDiverged")[0].split()[-1])
    assert f"step {last + 1}: not a finite number: loss {fails}" in output
    recorded = tmp_path / "bad-steps" / f"step-{last + 1:08d}.safetensors"
    assert str(recorded) in output
    again, said = zygote.do("run", run_dir=tmp_path, data=data, fails=fails)
    assert again == 2, "the same batch comes again, and fails again"
    assert f"step {last + 1}: not a finite number" in said
    code, output = zygote.do("run", run_dir=tmp_path, data=data, fails=fails, bad_step="skip")
    assert code == 0, output  # the way out that the message names
    assert "step skipped" in output
    code, output = zygote.do("replay", recorded=recorded, data=data, fails=fails)
    assert code == 0, output
    table(
        f"a loss of {fails}",
        2,
        "stopped before the update, the batch is recorded; resumed with `bad_step=skip` to the end",
    )


def test_a_loss_that_leaps_stops_the_run_before_it_does_harm(zygote, data, table, tmp_path):
    for _ in range(2):  # the same batch comes again, and leaps again
        code, output = zygote.do("run", run_dir=tmp_path, data=data, fails="leap", spike=20.0, steps=60)
        assert code == 2
        assert ": a leap: loss" in output
    assert len(list((tmp_path / "bad-steps").iterdir())) == 1
    code, output = zygote.do("run", run_dir=tmp_path, data=data, fails="leap", **SKIP)
    assert code == 0, output
    table(
        "a loss that leaps",
        2,
        "with `spike` set, the same; resumed with `bad_step=skip` to the end",
    )


def test_a_bad_batch_is_skipped_recorded_and_counted(zygote, data, table, tmp_path):
    for fails in ("nan", "leap"):
        run_dir = tmp_path / fails
        code, output = zygote.do("run", run_dir=run_dir, data=data, fails=fails, **SKIP)
        assert code == 0, output
        files = sorted(path.name for path in (run_dir / "bad-steps").iterdir())
        metrics = lines(run_dir)
        assert metrics[-1]["skipped"] == len(files) > 0
        assert output.count("step skipped") == len(files)
        jumps = [b["step"] for a, b in zip(metrics, metrics[1:]) if b["skipped"] > a["skipped"]]
        assert files == [f"step-{step:08d}.safetensors" for step in jumps]
        for line in metrics:  # no update, so no loss of the interval; and JSON that every reader takes
            assert (line["loss_nats"] is None) == (line["step"] in jumps)
        assert "NaN" not in (run_dir / "metrics.jsonl").read_text()
        assert metrics[-1]["loss_nats"] < metrics[0]["loss_nats"]
        table(
            f"a loss that is a {fails}, `bad_step=skip`",
            len(files),
            "update skipped, batch recorded, step counted in the metrics",
        )


def test_skipped_steps_survive_kill_9(zygote, data, rounds, table, tmp_path):
    """What was usual, and what was skipped, is part of the state: a resumed run skips the same steps."""
    assert zygote.do("run", run_dir=tmp_path / "whole", data=data, fails="leap", **SKIP)[0] == 0
    expected, dice, kills = contents(tmp_path / "whole"), random.Random(5), 0
    assert expected[1]["skipped"] > 0
    goals = sorted(dice.sample(range(5, 58), min(rounds, 20) // 2))
    for goal in goals:
        child = zygote.start("run", run_dir=tmp_path / "killed", data=data, fails="leap", pause=0.003, **SKIP)
        child.until_line(goal)
        child.send()
        assert child.wait() == -signal.SIGKILL
        kills += 1
    assert zygote.do("run", run_dir=tmp_path / "killed", data=data, fails="leap", **SKIP)[0] == 0
    assert_same(tmp_path / "killed", expected)
    table("`kill -9` of a run that skips steps", kills, "the same steps are skipped; the same bits")


def test_a_run_in_which_every_step_is_bad_ends(zygote, data, table, tmp_path):
    code, output = zygote.do("run", run_dir=tmp_path, data=data, fails="always", bad_step="skip", max_skips=3)
    assert code == 2
    assert output.count("step skipped") == 3
    assert "(4 in a row)" in output
    table("every loss is nan, `bad_step=skip`", 1, "stops after `max_skips` in a row")
