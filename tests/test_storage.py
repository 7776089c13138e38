"""Files of tensors, checkpoints and tokens: what comes back is what was written, and damage is named."""

import logging
import random
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.base.errors import CheckpointError
from minillm.storage.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from minillm.storage.shards import SHARD_FIELDS, ShardError, TokenShards, write_shards


def some_documents(n=60, vocab=500, seed=0):
    dice = random.Random(seed)
    return [[dice.randrange(1, vocab) for _ in range(dice.randint(1, 40))] for _ in range(n)]


@pytest.fixture
def folder(tmp_path):
    write_shards(some_documents(), tmp_path / "tokens", vocab_size=500, eos_id=0, shard_tokens=300)
    return tmp_path / "tokens"


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(1, 70_000), max_size=20), max_size=20).filter(any),
    vocab=st.sampled_from([70_001, 200_000]),
    shard_tokens=st.integers(1, 50),
)
def test_documents_come_back_as_they_were(tmp_path_factory, documents, vocab, shard_tokens):
    folder = tmp_path_factory.mktemp("tokens")
    index = write_shards(iter(documents), folder, vocab_size=vocab, eos_id=0, shard_tokens=shard_tokens)
    shards = TokenShards(folder, verify=True)
    expected = [[*document, 0] for document in documents if document]
    assert [shards.document(i).tolist() for i in range(len(shards))] == expected
    assert shards.lengths.tolist() == [len(document) for document in expected]
    assert shards.n_tokens == index.n_tokens == sum(map(len, expected))
    assert index.n_empty == len(documents) - len(expected)
    assert all(tokens < shard_tokens + 21 for _, tokens, _ in index.files)


def test_two_bytes_for_small_vocabularies_and_four_for_large(tmp_path):
    for vocab, dtype in ((65_536, np.uint16), (65_537, np.uint32)):
        write_shards([[vocab - 1, 5]], tmp_path, vocab_size=vocab, eos_id=0)
        document = TokenShards(tmp_path).document(0)
        assert document.dtype == dtype
        assert document.tolist() == [vocab - 1, 5, 0]


def test_writing_is_deterministic_and_says_what_it_is(tmp_path):
    for name in "ab":
        write_shards(some_documents(), tmp_path / name, vocab_size=500, eos_id=0, shard_tokens=300)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) > 3
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    other = write_shards(some_documents(seed=1), tmp_path / "c", vocab_size=500, eos_id=0)
    assert other.sha256 != TokenShards(tmp_path / "a").index.sha256


def test_eos_is_added_once(tmp_path):
    write_shards([[5, 6], [5, 6, 0], [0, 6]], tmp_path, vocab_size=10, eos_id=0)
    shards = TokenShards(tmp_path)
    assert [shards.document(i).tolist() for i in range(3)] == [[5, 6, 0], [5, 6, 0], [0, 6, 0]]


def test_empty_documents_are_counted_and_reported(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        index = write_shards([[], [5], [0]], tmp_path, vocab_size=10, eos_id=0)
    assert (index.n_documents, index.n_empty) == (1, 2)
    assert "2 empty documents left out" in caplog.text


def test_writing_takes_memory_for_one_shard_only(tmp_path):
    document = list(range(1, 400))

    def peak(n):
        tracemalloc.start()
        write_shards((document for _ in range(n)), tmp_path, vocab_size=500, eos_id=0, shard_tokens=20_000)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(10)
    assert peak(2000) < peak(200) + 50_000  # 1.4 MB more tokens, 36 more files


def test_bad_input_to_write(tmp_path):
    for documents, error in (
        ([[5], [500]], "document 1: id 500 is not in the vocabulary, 0..499"),
        ([[-1]], "document 0: id -1"),
        ([], "no document to write"),
        ([[], []], "2 empty"),
    ):
        with pytest.raises(ValueError, match=error):
            write_shards(documents, tmp_path / "x", vocab_size=500, eos_id=0)
        assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match=r"eos_id must be in 0..499"):
        write_shards([[1]], tmp_path / "x", vocab_size=500, eos_id=500)
    with pytest.raises(ValueError, match="shard_tokens must be at least 1, got 0"):
        write_shards([[1]], tmp_path / "x", vocab_size=500, eos_id=0, shard_tokens=0)


def test_a_failed_write_leaves_the_old_set(folder):
    before = TokenShards(folder, verify=True).index

    def broken():
        yield [1, 2, 3]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        write_shards(broken(), folder, vocab_size=500, eos_id=0)
    assert TokenShards(folder, verify=True).index == before
    assert [path.name for path in folder.parent.iterdir()] == ["tokens"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("five years")
    with pytest.raises(ShardError, match=r"not empty, and no index.json in it"):
        write_shards([[1]], tmp_path, vocab_size=10, eos_id=0)
    assert (tmp_path / "thesis.txt").read_text() == "five years"


def rewrite(path, change):
    raw = bytearray(path.read_bytes())
    path.write_bytes(change(raw) or raw)


def flip(at):
    def change(raw):
        raw[at] ^= 1

    return change


def version_two(raw):
    raw[8:12] = struct.pack("<I", 2)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda raw: raw[:-10], "bytes, its header promises .*; truncated or overwritten"),
        (lambda raw: raw[:100], "not a token file of minillm"),
        (lambda raw: raw + b"!", "truncated or overwritten"),
        (lambda raw: b"PK\x03\x04" + bytes(500), "not a token file of minillm"),
        (version_two, "format 2, this package reads 1"),
        (flip(20), "the header is damaged, its CRC-32 differs"),
        (flip(300), "the SHA-256 of its content differs"),
        (flip(-3), "the SHA-256 of its content differs"),
    ],
)
def test_a_damaged_file_is_named_with_its_rule(folder, change, error):
    rewrite(folder / "tokens-00001.bin", change)
    with pytest.raises(ShardError, match=rf"tokens-00001\.bin: .*{error}"):
        TokenShards(folder, verify=True)


def test_every_flipped_bit_is_found(folder):
    path = folder / "tokens-00000.bin"
    whole = path.read_bytes()
    dice = random.Random(0)
    places = [dice.randrange(len(whole)) for _ in range(60)] + [*range(SHARD_FIELDS.size + 4)]
    for place in places:
        if SHARD_FIELDS.size + 4 <= place < 128:
            continue  # zeros that nobody reads
        damaged = bytearray(whole)
        damaged[place] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match="tokens-00000"):
            TokenShards(folder, verify=True)


def test_missing_swapped_and_foreign_files(folder, tmp_path):
    with pytest.raises(ShardError, match=r"index.json: no such file; not a folder of tokens"):
        TokenShards(tmp_path)
    (folder / "tokens-00002.bin").rename(tmp_path / "kept")
    with pytest.raises(ShardError, match=r"tokens-00002.bin: no such file"):
        TokenShards(folder)
    (tmp_path / "kept").rename(folder / "tokens-00002.bin")
    write_shards(some_documents(7), tmp_path / "other", vocab_size=500, eos_id=0)
    (folder / "tokens-00001.bin").write_bytes((tmp_path / "other" / "tokens-00000.bin").read_bytes())
    with pytest.raises(ShardError, match=r"tokens-00001.bin: its counts differ from those in index.json"):
        TokenShards(folder, verify=True)
    for text in ("", "[]", "{}", '{"files": 3}', "\x00\x01"):
        (folder / "index.json").write_text(text)
        with pytest.raises(ShardError, match=r"index.json: not an index of token files"):
            TokenShards(folder)


def test_damaged_boundaries_are_found_without_reading_the_tokens(folder):
    path = folder / "tokens-00000.bin"
    whole = path.read_bytes()
    for at, error in ((-8, "its counts differ from those in index.json"), (-16, "the ends are damaged")):
        damaged = bytearray(whole)
        damaged[at + 4] ^= 1  # a boundary 2**32 tokens further on
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match=error):
            TokenShards(folder)


def test_a_file_with_other_documents_is_not_of_this_set(tmp_path):
    write_shards([[1, 2, 3], [4]], tmp_path / "a", vocab_size=10, eos_id=0)
    write_shards([[1, 2, 3, 4, 5]], tmp_path / "b", vocab_size=10, eos_id=0)
    (tmp_path / "a" / "tokens-00000.bin").write_bytes((tmp_path / "b" / "tokens-00000.bin").read_bytes())
    with pytest.raises(ShardError, match=r"tokens-00000.bin: its counts differ"):
        TokenShards(tmp_path / "a", verify=True)


def test_document_numbers_are_checked(folder):
    shards = TokenShards(folder)
    for i in (-1, len(shards)):
        with pytest.raises(IndexError, match=rf"document must be in 0..59, got {i}"):
            shards.document(i)


# Checkpoints.


def save(folder, step, value=1.0):
    tensors = {"model": {"w": torch.full((4,), value)}, "random": {"cpu": torch.get_rng_state()}}
    return save_checkpoint(folder, step, tensors=tensors, state={"step": step, "name": "试"})


def test_a_checkpoint_comes_back_and_only_the_newest_stay(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, value=step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]
    tensors, state = load_checkpoint(latest_checkpoint(tmp_path))
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
        load_checkpoint(path)
    assert latest_checkpoint(tmp_path).name == "step-00000001"
    assert "step-00000002" in caplog.text


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None
