"""Runs: stages that are done once, records that come back as they were, and text that is read once."""

import dataclasses
import json
import shutil
from collections import namedtuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.base.errors import CorpusError, MiniLLMError, NoSpace
from minillm.corpus import Document
from minillm.runs import text as run_text
from minillm.runs.data import DATA_STAGES, CorpusCounts, ShardCounts, TokenCounts, openings
from minillm.runs.exams import Results
from minillm.runs.folder import Launch, RunFolder, Stage, do_stages
from minillm.runs.metrics import read_metrics
from minillm.runs.pretrain import PlannedSteps, steps_that_fit
from minillm.runs.recipes import DataConfig, recipe
from minillm.runs.speedrun import STAGES, pretrain, speedrun
from minillm.runs.text import SPLITS, SplitCounts, TextStore, passages
from minillm.storage.shards import TokenShards


def small(**data):
    """A run of a few steps with a model that learns nothing."""
    config = recipe("tiny")
    model = dataclasses.replace(config.model, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=64)
    return dataclasses.replace(
        config,
        data=DataConfig(**{"documents": 300, "held_out": 20, "questions": 2, **data}),
        tokenizer=dataclasses.replace(config.tokenizer, vocab_size=400, train_characters=3000),
        model=dataclasses.replace(model, vocab_size=400, max_seq_len=128),
        train=dataclasses.replace(config.train, steps=4, batch_size=2, seq_len=128, warmup_steps=1),
        minutes=0.0,
    )


WORDS = ["the", "a", "fine", "day", "house", "dog", "red", "blue", "runs", "walks", "sees", "猫", "坐", "在"]


class Source:
    """Documents by name, "count:a" or "count:b", that knows how often each was asked for; it may break off."""

    def __init__(self, n=200):
        self.asked, self.n, self.breaks_at = [], n, None

    def __call__(self, name, reader):
        for number in range(self.n):
            if (name, number) == self.breaks_at:
                raise KeyboardInterrupt
            self.asked.append((name, number))
            text = f"{name} {number}: " + " ".join(WORDS[(number * i) % 14] for i in range(1, 40))
            yield from reader.give(text, f"count:{name}:{number}")

    def all_of(self, *names):
        return [(name, number) for name in names for number in range(self.n)]


@pytest.fixture
def source(monkeypatch):
    from minillm.readers import documents

    source = Source()
    monkeypatch.setitem(documents.NAMED, "count", source)
    return source


def carry(config, folder, last="shards", **options):
    return do_stages(STAGES, config, folder, Launch(**options), last=last)


def tokens(folder):
    return [path.read_bytes() for path in sorted((folder / "shards").rglob("tokens-*.bin"))]


# The text is read once


def test_every_document_of_a_source_is_asked_for_once(source, tmp_path):
    run = speedrun(small(sources=("count:a", "count:b")), tmp_path)
    assert source.asked == source.all_of("a", "b")
    counts, written = run.found(CorpusCounts), run.found(ShardCounts)
    assert counts.train.documents + counts.heldout.documents == len(source.asked)
    assert written.train.documents == counts.train.documents
    assert len(run.found(Results).samples) == len(counts.openings) == 3


def test_every_document_of_the_own_corpus_is_written_once(monkeypatch, tmp_path):
    asked, real = [], run_text.documents

    def documents(config, *, n_documents, split):
        for document in real(config, n_documents=n_documents, split=split):
            asked.append(split)
            yield document

    monkeypatch.setattr(run_text, "documents", documents)
    pretrain(small(), tmp_path)
    assert asked == ["heldout"] * 20 + ["train"] * 300


def test_a_file_is_opened_once(monkeypatch, tmp_path):
    from minillm.readers import documents

    path, opened, real = tmp_path / "a.jsonl", [], documents.read_file
    path.write_text("".join(json.dumps({"text": f"{i} {' '.join(WORDS)}"}) + "\n" for i in range(300)))
    monkeypatch.setattr(documents, "read_file", lambda *args: opened.append(args) or real(*args))
    speedrun(small(sources=(str(path),)), tmp_path / "run")
    assert len(opened) == 1


@pytest.mark.parametrize("moment", [("a", 120), ("b", 0), ("b", 77)])
def test_a_killed_run_does_not_read_again_what_is_stored_whole(source, moment, tmp_path):
    config = small(sources=("count:a", "count:b"), held_out=3)
    carry(config, tmp_path / "whole")
    source.asked.clear()
    source.breaks_at = moment
    with pytest.raises(KeyboardInterrupt):
        carry(config, tmp_path / "run")
    source.asked.clear()
    source.breaks_at = None
    run = carry(config, tmp_path / "run")
    assert source.asked == source.all_of(*("ab" if moment[0] == "a" else "b"))
    assert run.found(CorpusCounts).heldout.documents == 3  # counted over all sources
    assert tokens(tmp_path / "run") == tokens(tmp_path / "whole")


@pytest.mark.parametrize("stage", ["corpus", "tokenizer"])
def test_a_run_that_is_stopped_between_stages_reads_no_text_again(source, stage, tmp_path):
    config = small(sources=("count:a",))
    carry(config, tmp_path, last=stage)
    carry(config, tmp_path)
    assert source.asked == source.all_of("a")


def test_the_tokenizer_unpacks_no_more_than_it_learns_from(source, monkeypatch, tmp_path):
    config = small(sources=("count:a",))
    carry(config, tmp_path, last="corpus")
    taken, real = [], TextStore.texts
    monkeypatch.setattr(TextStore, "texts", lambda *a: (taken.append(t) or t for t in real(*a)))
    carry(config, tmp_path, last="tokenizer")
    assert sum(map(len, taken[:-1])) < config.tokenizer.train_characters <= sum(map(len, taken))


def test_the_text_goes_once_there_are_tokens_and_can_be_read_again(source, tmp_path):
    config = small(sources=("count:a",))
    carry(config, tmp_path)
    assert (tmp_path / "text").is_dir()
    before = tokens(tmp_path)
    carry(config, tmp_path, last="pretrain")
    assert not (tmp_path / "text").exists()
    shutil.rmtree(tmp_path / "shards")
    carry(config, tmp_path)
    assert tokens(tmp_path) == before
    assert source.asked == 2 * source.all_of("a")


def test_an_older_run_gets_its_openings_and_reads_no_further(source, tmp_path):
    config = small(sources=("count:a", "count:b"))
    run = carry(config, tmp_path)
    record = json.loads((tmp_path / "stages.json").read_text())
    expected = tuple(record["counts"].pop("openings"))
    for split in SPLITS:
        del record["counts"][split]["bytes"], record["counts"][split]["languages"]
    (tmp_path / "stages.json").write_text(json.dumps(record))
    source.asked.clear()
    run = RunFolder(tmp_path, config, Launch())
    run.reload()
    assert openings(run) == expected
    assert len(source.asked) < 2 * source.n


def test_a_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CorpusError, match=r"nowhere\.txt"):
        carry(small(sources=("nowhere.txt",)), tmp_path)
    assert [path.name for path in (tmp_path / "text").rglob("*")] == []


def test_too_little_text_is_refused(source, tmp_path):
    source.n = 1
    with pytest.raises(
        MiniLLMError, match=r"count:a: 1 documents to train on, 0 held out .*: give more text|at least 2"
    ):
        carry(small(sources=("count:a",)), tmp_path)


@pytest.mark.parametrize(("free", "read"), [(1000, 0), (200_000, None)])
def test_the_disk_is_looked_at_before_and_while_the_text_is_written(monkeypatch, free, read, tmp_path):
    """A file whose size is known is refused at once, a stream when its next part will not fit."""
    usage = namedtuple("usage", "total used free")
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i} {' '.join(WORDS)}\n" for i in range(5000)))
    store = TextStore(tmp_path / "run" / "text", small(sources=(str(path),)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free, 0, free))
    if read is None:
        monkeypatch.setattr(run_text, "ROOM", 300_000)
        monkeypatch.setattr(TextStore, "_expected_bytes", lambda *_: 0)
    with pytest.raises(NoSpace, match="MiB of text need" if read is None else "documents of .* need"):
        store.fill()
    assert [path.name for path in store.folder.rglob("*")] == []


ANY_TEXT = st.text(st.characters(), min_size=0, max_size=30)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(SPLITS), ANY_TEXT), max_size=20))
def test_text_comes_back_as_it_was(tmp_path_factory, made):
    """Blank documents, line ends of every kind, halves of surrogate pairs, NUL."""
    store = TextStore(tmp_path_factory.mktemp("text"), small(sources=("x",)))
    store._read = lambda name: ((split, Document(text)) for split, text in made)
    store.fill()
    for split in SPLITS:
        texts = [text for side, text in made if side == split]
        assert list(store.texts(split)) == texts
        counts = store.counts(split)
        assert (counts.documents, counts.characters) == (len(texts), sum(map(len, texts)))
        assert counts.bytes == sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


@pytest.mark.parametrize("name", ["train.jsonl.gz", "heldout.jsonl.gz", "counts.json"])
def test_damaged_text_is_named_with_the_way_out(source, name, tmp_path):
    config = small(sources=("count:a",))
    carry(config, tmp_path, last="corpus")
    path = tmp_path / "text" / "00000" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(MiniLLMError, match=rf"{name}: damaged .*Remove .*text.*: the same command reads"):
        carry(config, tmp_path)
    shutil.rmtree(tmp_path / "text")
    assert carry(config, tmp_path).found(ShardCounts).train.documents > 100


def test_a_book_is_cut_into_passages_and_nothing_is_lost():
    book = "".join(f"line {i} of a book\n" * (i % 3) + "x" * (i % 7 == 0) * 90 for i in range(200))
    parts = list(passages(book, 80))
    assert "".join(parts) == book
    assert max(map(len, parts)) <= 80
    assert sum(part.endswith("\n") for part in parts) > len(parts) / 2


def cut_slowly(text, characters):
    while len(text) > characters:
        line, word = (text.rfind(end, characters // 2, characters) + 1 for end in "\n ")
        cut = line or word or characters
        yield text[:cut]
        text = text[cut:]
    if text:
        yield text


@given(st.text("ab \n", max_size=200), st.integers(1, 40))
def test_passages_are_cut_where_they_always_were(text, characters):
    assert list(passages(text, characters)) == list(cut_slowly(text, characters))


# Stages and records


def stages(done, *names, makes=""):
    return [
        Stage(name=name, work=lambda run, name=name: done.append(name) or name, makes=makes) for name in names
    ]


def test_stages_are_done_once_in_order_and_counted(tmp_path):
    done, said = [], []
    three = stages(done, "one", "two", "three")
    do_stages(three, small(), tmp_path, Launch(say=said.append), last="two")
    do_stages(three, small(), tmp_path, Launch(say=said.append), last="three")
    assert done == ["one", "two", "three"]
    assert [line.split(" (")[0] for line in said] == [
        *("[1/3] one       one", "[2/3] two       two"),
        *("[1/3] one       one", "[2/3] two       two", "[3/3] three     three"),
    ]
    assert ["done before" in line for line in said] == [False, False, True, True, False]


def test_a_stage_is_done_again_if_what_it_makes_is_gone(tmp_path):
    done = []
    one = stages(done, "one", makes="thing")
    for times in (1, 2):
        do_stages(one, small(), tmp_path, Launch(), last="one")
        assert len(done) == times
    (tmp_path / "thing").touch()
    do_stages(one, small(), tmp_path, Launch(), last="one")
    assert len(done) == 2


def test_what_cannot_end_well_is_not_begun(tmp_path):
    def refuse(run):
        raise NoSpace("no room")

    done = []
    last = Stage(name="last", work=lambda run: "", check=refuse)
    with pytest.raises(NoSpace):
        do_stages([*stages(done, "one"), last], small(), tmp_path, Launch(), last="last")
    assert done == []


def test_restart_begins_anew(tmp_path):
    done = []
    for restart in (False, True):
        do_stages(stages(done, "one"), small(), tmp_path, Launch(), last="one", restart=restart)
    assert done == ["one", "one"]
    do_stages(stages(done, "one"), small(documents=9), tmp_path, Launch(), last="one", restart=True)
    with pytest.raises(ValueError, match=r"data.documents=9, now data.documents=300.*--restart"):
        do_stages(stages(done, "one"), small(), tmp_path, Launch(), last="one")


def test_a_run_goes_on_when_nobody_listens(tmp_path):
    def broken(line):
        raise BrokenPipeError

    done = []
    do_stages(stages(done, "one", "two"), small(), tmp_path, Launch(say=broken), last="two")
    assert done == ["one", "two"]


def test_records_come_back_as_they_were(tmp_path):
    run = RunFolder(tmp_path, small(), Launch())
    side = SplitCounts(documents=3, characters=9, bytes=11, languages={"en": 2, "zh": 1})
    records = [
        CorpusCounts(heldout=SplitCounts(), train=side, openings=("a", "从")),
        ShardCounts(
            heldout=TokenCounts(tokens=1, documents=2, bytes=3),
            train=TokenCounts(tokens=4, documents=5, bytes=6),
        ),
        PlannedSteps(steps=1200),
    ]
    for record in records:
        assert run.recall(type(record)) is None
        run.remember(record)
    again = RunFolder(tmp_path, small(), Launch())
    again.reload()
    assert [again.found(type(record)) for record in records] == records
    assert json.loads((tmp_path / "stages.json").read_text())["steps"] == 1200


def test_a_record_that_is_missing_or_damaged_is_named(tmp_path):
    run = RunFolder(tmp_path, small(), Launch())
    with pytest.raises(MiniLLMError, match=r"stages.json: no 'counts' in it; .*--restart"):
        run.found(CorpusCounts)
    (tmp_path / "stages.json").write_text('{"counts": {"train": {}}}')
    run.reload()
    with pytest.raises(MiniLLMError, match=r"stages.json: 'counts' is damaged"):
        run.found(CorpusCounts)
    (tmp_path / "stages.json").write_text('{"counts": {"tr')
    with pytest.raises(MiniLLMError, match=r"stages.json: damaged .*--restart"):
        run.reload()


def test_shards_are_those_of_the_text(tmp_path):
    """Both sides, in the order in which they were read; what one stage says, the next one finds."""
    config = small()
    run = do_stages(DATA_STAGES, config, tmp_path, Launch(), last="shards")
    from minillm.tokenizer import load_tokenizer
    from minillm.world.stream import documents

    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    for split, n in (("heldout", 20), ("train", 300)):
        texts = [made.text for made in documents(config.data.corpus, n_documents=n, split=split)]
        shards = TokenShards(tmp_path / "shards" / split)
        assert [shards.document(i)[:-1].tolist() for i in range(n)] == tokenizer.encode_batch(texts)
        assert getattr(run.found(ShardCounts), split).tokens == shards.n_tokens


def test_steps_that_fit():
    config = recipe("tiny")
    assert steps_that_fit(dataclasses.replace(config, minutes=0.0), 100.0) == config.train.steps
    assert steps_that_fit(dataclasses.replace(config, minutes=5.0), 0.1) == 3000
    assert steps_that_fit(dataclasses.replace(config, minutes=5.0), 0.101) == 2900
    assert steps_that_fit(config, 1e-6) == config.train.steps
    assert steps_that_fit(config, 1e6) == 100


def test_metrics_of_a_killed_run_are_readable(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 2}\n7\nnull\n{"loss_nats": 1.0}\n{"st')
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1}, {"step": 2}]
