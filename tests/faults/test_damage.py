"""Wrong bits in checkpoints and token files; another configuration."""

import hashlib
import random
import shutil
import signal

import pytest
from harness import assert_same, contents, pretrain_words

from minillm.base.errors import CheckpointError
from minillm.storage.checkpoints import latest_checkpoint, verify_checkpoint


def damage(path, dice):
    """One of the things that disks and networks do to a file."""
    raw = bytearray(path.read_bytes())
    kind = dice.choice(["flip", "truncate", "zeros", "empty", "gone"])
    if kind == "flip":
        raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
    elif kind == "truncate":
        del raw[dice.randrange(len(raw)) :]
    elif kind == "zeros":
        start = dice.randrange(len(raw))
        raw[start : start + 512] = b"\xff" * len(raw[start : start + 512])
    elif kind == "empty":
        raw.clear()
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(raw)
    return kind


def problem(checkpoint):
    """What verification says of a checkpoint, or nothing."""
    try:
        verify_checkpoint(checkpoint)
    except CheckpointError as error:
        return str(error)
    return ""


def stop_early(zygote, data, run_dir, step=18):
    child = zygote.start("run", run_dir=run_dir, data=data, pause=0.005)
    child.until_line(step)
    child.send()
    assert child.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def stopped(zygote, data, tmp_path_factory):
    """A run that was killed after step 18: it has checkpoints of steps 12 and 16, and later perhaps."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    stop_early(zygote, data, folder)
    return folder


def test_a_damaged_checkpoint_is_passed_over(zygote, data, whole, stopped, rounds, table, tmp_path):
    dice, found, kinds = random.Random(0), 0, set()
    for _ in range(3 * rounds):
        run_dir = tmp_path / "run"
        shutil.copytree(stopped, run_dir)
        newest = latest_checkpoint(run_dir / "checkpoints")
        file = dice.choice(sorted(newest.iterdir()))
        kind = damage(file, dice)
        error = problem(newest)
        if error:
            found += 1
            kinds.add((file.name, kind))
            assert newest.name in error
        else:  # a space, or the number of the step, which nobody reads
            assert file.name == "manifest.json"
        code, output = zygote.do("run", run_dir=run_dir, data=data)
        assert code == 0, output
        first = int(
            output.split("\n")[0] if output[0].isdigit() else output.split("before it\n")[1].split()[0]
        )
        assert ("falling back" in output) == (first == int(newest.name[5:]) - 3), output
        assert_same(run_dir, whole)
        shutil.rmtree(run_dir)
    assert found > 2 * rounds
    assert len(kinds) > 5
    table(
        "a checkpoint's file truncated, emptied, overwritten, removed, or with one bit flipped",
        3 * rounds,
        f"{found} found by checksum and named, the checkpoint before taken; the others changed nothing that is read. All ended in the same bits",
    )


def test_if_all_checkpoints_are_damaged_nothing_is_thrown_away(zygote, data, whole, stopped, table, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("step-*/model.safetensors"):
        path.write_bytes(b"")
    before = tree(tmp_path / "run")
    code, output = zygote.do("run", run_dir=tmp_path / "run", data=data)
    assert code == 2
    assert "all checkpoints are damaged (step-" in output
    assert "to begin anew, move them away" in output
    assert tree(tmp_path / "run") == before
    shutil.move(tmp_path / "run" / "checkpoints", tmp_path / "away")
    assert zygote.do("run", run_dir=tmp_path / "run", data=data)[0] == 0
    assert_same(tmp_path / "run", whole)
    table("all checkpoints damaged", 1, "status 2: nothing is overwritten, a person decides")


def test_the_last_good_checkpoint_outlives_a_damaged_later_one(zygote, data, whole, stopped, table, tmp_path):
    """With keep=1 a run that fell back and is stopped early must not count the damaged one."""
    shutil.copytree(stopped, tmp_path / "run")
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    (newest / "model.safetensors").write_bytes(b"")
    child = zygote.start("run", run_dir=tmp_path / "run", data=data, pause=0.05, keep=1)
    child.until(lambda text: "before it\n" in text and "1" in text.split("before it\n")[1])
    child.send(signal.SIGTERM)
    assert child.wait() == 143
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") is not None
    assert zygote.do("run", run_dir=tmp_path / "run", data=data)[0] == 0
    assert_same(tmp_path / "run", whole)
    table("one checkpoint kept, a damaged later one beside it", 1, "the good one stays")


def tree(folder):
    """Every file and its content, the lock aside."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_another_configuration_is_refused_by_name(zygote, data, stopped, table, tmp_path):
    changes = {
        "max_lr": 0.02,
        "steps": 50,
        "seed": 1,
        "weight_decay": 0.0,
        "clip_norm": 0.5,
        "warmup_steps": 4,
        "dtype": "bfloat16",
    }
    shutil.copytree(stopped, tmp_path / "run")
    before = tree(tmp_path / "run")
    for name, value in changes.items():
        code, output = zygote.do("run", run_dir=tmp_path / "run", data=data, **{name: value})
        assert code == 2
        assert f"was trained with config {name}=" in output
        assert f"now {name}={value}" in output
        assert tree(tmp_path / "run") == before, "refused, and yet changed"
    table(
        "another configuration in the same folder",
        len(changes),
        "status 2: the setting, its old and its new value; no file is touched",
    )


def test_other_data_is_refused(zygote, data, stopped, table, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    assert zygote.do("write_data", folder=tmp_path / "other", seed=1)[0] == 0
    code, output = zygote.do("run", run_dir=tmp_path / "run", data=tmp_path / "other")
    assert code == 2
    assert "the loader's state was saved with data=" in output
    table("other data", 1, "status 2: the checksums of both")


def test_a_damaged_token_file_is_not_trained_on(zygote, rounds, table, tmp_path):
    """`minillm pretrain` reads every token file once before it trains, also when it goes on."""
    words = pretrain_words(tmp_path / "runs")
    child = zygote.start("command", words=words)
    base, dice, found, n = tmp_path / "runs" / "tiny", random.Random(4), 0, max(4, rounds // 3)
    child.until_logged(base, 12)
    child.send()
    assert child.wait() == -signal.SIGKILL
    shutil.copytree(base, tmp_path / "base")
    code, output = zygote.do("command", words=words)
    assert code == 0, output
    whole = contents(base)
    for _ in range(n):
        shutil.rmtree(base)
        shutil.copytree(tmp_path / "base", base)
        file = dice.choice(sorted(path for path in (base / "shards").rglob("*") if path.is_file()))
        damage(file, dice)
        before = tree(base)
        code, output = zygote.do("command", words=words)
        if code != 0:
            found += 1
            assert code == 2, output
            assert str(file.parent) in output
            assert tree(base) == before, "it went on"
            shutil.rmtree(base / "shards")
            code, output = zygote.do("command", words=words)
            assert code == 0, output
        else:
            assert file.suffix == ".json", f"{file} is damaged, and was trained on"
        assert_same(base, whole)
    assert found > n // 2
    table(
        "a token file or its index truncated, emptied, overwritten, removed, or with one bit flipped",
        n,
        f"{found} found before a step: status 2, the file is named; without `shards/` the same command writes them again "
        "and goes on. All ended in the same bits",
    )
