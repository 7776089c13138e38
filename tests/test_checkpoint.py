import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from minillm.base import files
from minillm.base.errors import CheckpointError
from minillm.hub import own
from minillm.storage import checkpoints
from minillm.transformer import ModelConfig, Transformer

CONFIG = ModelConfig(
    vocab_size=32, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=32, max_seq_len=32
)


def test_an_exception_leaves_the_old_file_and_no_partial_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), files.atomic_write(path) as file:
        file.write("new")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_finished_write_appears_whole_with_ordinary_permissions(tmp_path):
    with files.atomic_write(tmp_path / "folder" / "a.txt") as file:
        file.write("新\n")
    path = tmp_path / "folder" / "a.txt"
    assert path.read_bytes() == "新\n".encode()
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_folder_is_replaced_whole(tmp_path):
    for text in ("first", "second"):
        with files.atomic_folder(tmp_path / "f") as partial:
            (partial / "a").write_text(text)
    assert (tmp_path / "f" / "a").read_text() == "second"
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "f") as partial:
        (partial / "a").write_text("third")
        raise RuntimeError
    assert (tmp_path / "f" / "a").read_text() == "second"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.slow
def test_kill_9_while_writing_leaves_old_or_new_and_nothing_between(tmp_path):
    path = tmp_path / "a.bin"
    code = (
        "import sys; from minillm.checkpoint import atomic_write\n"
        "print('ready', flush=True)\n"
        "for i in range(10**9):\n"
        "    with atomic_write(sys.argv[1], 'wb') as file:\n"
        "        for _ in range(64): file.write(bytes([i % 256]) * 65536)\n"
    )
    for delay in (0.05, 0.13, 0.31):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if path.exists():
            data = path.read_bytes()
            assert len(data) == 64 * 65536
            assert len(set(data)) == 1


def save(folder, step, value=1.0):
    tensors = {"model": {"w": torch.full((4,), value)}, "random": {"cpu": torch.get_rng_state()}}
    return checkpoints.save_checkpoint(folder, step, tensors=tensors, state={"step": step, "name": "试"})


def test_a_checkpoint_comes_back_and_only_the_newest_stay(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, value=step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]
    tensors, state = checkpoints.load_checkpoint(checkpoints.latest_checkpoint(tmp_path))
    assert torch.equal(tensors["model"]["w"], torch.full((4,), 30.0))
    assert state == {"step": 30, "name": "试"}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_checkpoint_is_found_named_and_passed_over(tmp_path, damage, caplog):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:-3])
    elif damage == "remove":
        file.unlink()
    else:
        (path / "manifest.json").write_text("{")
    with pytest.raises(
        CheckpointError, match="manifest.json" if damage == "manifest" else "model.safetensors"
    ):
        checkpoints.load_checkpoint(path)
    assert checkpoints.latest_checkpoint(tmp_path).name == "step-00000001"
    assert "step-00000002" in caplog.text


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoints.latest_checkpoint(tmp_path) is None
    assert checkpoints.latest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_comes_back_bit_for_bit(tmp_path, tied):
    import dataclasses

    model = Transformer(dataclasses.replace(CONFIG, tied=tied))
    own.save_model(tmp_path, model)
    loaded, tokens = own.load_model(tmp_path), torch.randint(32, (2, 9))
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens), model(tokens))
    assert (loaded.head.weight is loaded.embed.weight) == tied
    half = own.load_model(tmp_path, dtype=torch.bfloat16)
    assert half.embed.weight.dtype == torch.bfloat16


def edit(tmp_path, **changes):
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    stored["model"].update(changes)
    path.write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "config.json").unlink(), r"config\.json: no such file"),
        (lambda p: (p / "config.json").write_text("{"), r"config\.json: not JSON"),
        (lambda p: (p / "config.json").write_text('{"model_type": "llama"}'), "not a minillm model"),
        (lambda p: edit(p, dim=32), r"'embed.weight' has shape \(32, 16\), config.json says \(32, 32\)"),
        (lambda p: edit(p, n_layers=3), r"tensor 'blocks.2.* is missing"),
        (lambda p: edit(p, n_layers=1), r"unknown tensor 'blocks.1"),
        (lambda p: edit(p, dim=-1), "dim must be"),
        (lambda p: edit(p, nonsense=1), "nonsense"),
        (lambda p: (p / "model.safetensors").unlink(), r"model\.safetensors: no such file"),
        (
            lambda p: (p / "model.safetensors").write_bytes(b"\x80\x02}q\x00."),
            r"not a complete safetensors file",
        ),
    ],
)
def test_a_wrong_model_folder_is_one_clear_error(tmp_path, spoil, message):
    own.save_model(tmp_path, Transformer(CONFIG))
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        own.load_model(tmp_path)
