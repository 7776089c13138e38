"""Near-duplicate removal beside datasketch, rensa and datatrove: same texts, same similarity, one run, in turns.

python -m benchmarks.dedup               # about ten minutes on one core; writes data/results/dedup-speed.json
python -m benchmarks.dedup --sizes 1000 --repeats 1 --out /tmp/quick.json

Every measurement is a fresh process. The clock runs from the raw texts to the list of documents that go. What "the same"
means is fixed for all: Jaccard similarity of the sets of 5-character shingles of the folded text, at least 0.8. A method that
only proposes candidates is given the exact comparison behind it, so that all answer one question; where a tool's own
documented path has no such comparison it runs as it is, and its precision says what that costs.
"""

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import Missing, folder_of
from minillm.base.files import atomic_write
from minillm.base.machine import describe_machine, peak_memory_bytes
from minillm.corpus import dice, jaccard, pick, pick_some
from minillm.dedup import NearDuplicates, find_near_duplicates, fold_text, sorted_set
from minillm.world.stream import documents
from minillm.world.task import CorpusConfig

RESULTS = Path(__file__).parent.parent / "data" / "results" / "dedup-speed.json"
THRESHOLD, SHINGLE, N_PERM, RECALL = 0.8, 5, 128, 0.999
ONE_CORE = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
BANDS = (21, 6)  # for 128 numbers: a pair at 0.8 is a candidate with probability 0.998, one at 0.9 surely


def make_texts(n: int) -> tuple[list[str], dict[int, tuple[int, float]]]:
    """Stories of which one in five is a changed copy of an earlier one; and for each of those which, and its similarity."""
    config = CorpusConfig(seed=5, stories=1.0, facts=0.0, arithmetic=0.0)
    texts: list[str] = []
    planted: dict[int, tuple[int, float]] = {}
    for number, document in enumerate(documents(config, n_documents=n)):
        r = dice("near", number)
        text = document.text
        if number > 100 and number % 5 == 0:
            of = int(r() * number)
            original = texts[of]
            target = 0.9 if number % 10 else 0.5 + 0.45 * r()  # half of the copies near 0.9, half anywhere
            words = original.split(" ") if " " in original else list(original)
            joiner = " " if " " in original else ""
            text = original
            for place in pick_some(r, range(len(words)), len(words)):
                words[place] = pick(r, "甲乙丙丁戊己庚辛") if not joiner else f"w{int(r() * 1e6)}"
                changed = joiner.join(words)
                if jaccard(fold_text(original), fold_text(changed)) < target:
                    break
                text = changed
            planted[number] = of, jaccard(fold_text(original), fold_text(text))
        texts.append(text)
    return texts, planted


def shingle_set(folded: str) -> set[str]:
    return {folded[i : i + SHINGLE] for i in range(max(1, len(folded) - SHINGLE + 1))}


def shingle_list(text: str) -> list[str]:
    folded = fold_text(text)
    return [folded[i : i + SHINGLE] for i in range(max(1, len(folded) - SHINGLE + 1))]


def only_cut(texts: list[str]) -> set[int]:
    """No tool at all: what every tool waits for that wants shingles as Python strings."""
    for text in texts:
        shingle_list(text)
    return set()


def similar(a: set[str], b: set[str]) -> bool:
    shared = len(a & b)
    return shared >= THRESHOLD * (len(a) + len(b) - shared)


def ours(texts: list[str]) -> set[int]:
    """minillm: sketches, then pairs near the threshold compared exactly."""
    found = find_near_duplicates(texts, NearDuplicates(threshold=THRESHOLD, shingle=SHINGLE, recall=RECALL))
    return {number for number, first in enumerate(found) if first is not None}


def ours_sketches(texts: list[str]) -> set[int]:
    """minillm as a step of the pipeline: decides from the sketches alone."""
    step = NearDuplicates(threshold=THRESHOLD, shingle=SHINGLE, recall=RECALL)
    found = step.resolve(step.sketch_batch(texts))
    return {number for number, first in enumerate(found) if first is not None}


def with_datasketch(texts: list[str]) -> set[int]:
    """datasketch: MinHashLSH, candidates compared exactly."""
    from datasketch import MinHash, MinHashLSH

    index, sets, gone = MinHashLSH(num_perm=N_PERM, params=BANDS), [], set()
    for number, text in enumerate(texts):
        shingles = shingle_set(fold_text(text))
        signature = MinHash(num_perm=N_PERM)
        signature.update_batch([shingle.encode() for shingle in shingles])
        if any(similar(shingles, sets[other]) for other in index.query(signature)):
            gone.add(number)
        sets.append(shingles)
        index.insert(number, signature, check_duplication=False)
    return gone


def with_rensa(texts: list[str]) -> set[int]:
    """rensa: RMinHash in one batch, its LSH index, candidates compared exactly."""
    from rensa import RMinHash, RMinHashLSH

    sets = [shingle_set(fold_text(text)) for text in texts]
    signatures = RMinHash.from_token_sets([list(members) for members in sets], N_PERM, 42)
    index, gone = RMinHashLSH(THRESHOLD, N_PERM, 16), set()  # it wants bands that divide 128
    for number, signature in enumerate(signatures):
        if any(similar(sets[number], sets[other]) for other in index.query(signature)):
            gone.add(number)
        index.insert(number, signature)
    return gone


def with_rensa_deduplicator(texts: list[str]) -> set[int]:
    """rensa's RMinHashDeduplicator, which compares signatures and not texts."""
    from rensa import RMinHashDeduplicator

    index = RMinHashDeduplicator(THRESHOLD, N_PERM, True)
    kept = index.add_pairs((str(number), shingle_list(text)) for number, text in enumerate(texts))
    return {number for number, keep in enumerate(kept) if not keep}


def with_rensa_rho(texts: list[str]) -> set[int]:
    """rensa's fastest: its rho sketch, which samples places of a text, in one matrix, as its README measures it.

    It says which documents have a copy, not of which, so it removes the first of a group too.
    """
    from rensa import RMinHash, RMinHashLSH

    matrix = RMinHash.digest_matrix_from_token_sets_rho(list(map(shingle_list, texts)), N_PERM, 42)
    flags = RMinHashLSH(THRESHOLD, N_PERM, 8).query_duplicate_flags_matrix_one_shot(matrix)
    return {number for number, flag in enumerate(flags) if flag}


def with_datatrove(texts: list[str]) -> set[int]:
    """datatrove's four MinHash blocks with its default bands, which compare nothing further."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.logging import logger

    class Signature(MinhashDedupSignature):
        def __init__(self, folder: str, config: MinhashConfig):
            from unittest import mock

            with mock.patch("datatrove.pipeline.dedup.minhash.load_word_tokenizer"):
                super().__init__(
                    folder, config
                )  # its word tokenizers would want spacy; shingles are characters here

        def get_shingles(self, text: str) -> np.ndarray:
            hashes = [self._hash_func(shingle) for shingle in shingle_set(fold_text(text))]
            return np.array(hashes, np.uint64).reshape(-1, 1)

    logger.remove()
    documents = [Document(text=text, id=str(number)) for number, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        config = MinhashConfig(
            hash_config=HashConfig(
                hash_fc="xxhash" if (available("xxhash") or "4").startswith("3") else "sha1"
            )
        )
        Signature(f"{folder}/signatures", config).run(iter(documents), 0, 1)
        for bucket in range(config.num_buckets):
            MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config).run(
                None, bucket, config.num_buckets
            )
        MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", config=config).run(None, 0, 1)
        kept = {
            int(document.id) for document in MinhashDedupFilter(f"{folder}/remove").run(iter(documents), 0, 1)
        }
    return set(range(len(texts))) - kept


METHODS: dict[str, tuple[str | None, Callable[[list[str]], set[int]]]] = {
    "minillm": (None, ours),
    "minillm, sketches only": (None, ours_sketches),
    "rensa": ("rensa", with_rensa),
    "rensa, deduplicator": ("rensa", with_rensa_deduplicator),
    "rensa, rho": ("rensa", with_rensa_rho),
    "datasketch": ("datasketch", with_datasketch),
    "datatrove": ("datatrove", with_datatrove),
}
CUT = "shingles as strings"


def largest_similarity(texts: list[str], numbers: set[int]) -> dict[int, float]:
    """For some documents the largest exact similarity to any other one: by comparison with every one that shares a shingle."""
    from scipy.sparse import csr_matrix

    step = NearDuplicates(shingle=SHINGLE)
    hashes, lengths = step.shingle_hashes(texts)
    owners = np.repeat(np.arange(len(texts)), lengths)
    members = sorted_set((owners << 32 | hashes)[hashes != 0xFFFFFFFF])
    rows, hashes = members >> 32, members & 0xFFFFFFFF
    columns = np.searchsorted(sorted_set(hashes), hashes)
    sets = csr_matrix((np.ones(len(members), np.float32), (rows, columns)), (len(texts), columns.max() + 1))
    sizes, found = np.asarray(sets.sum(axis=1)).ravel(), {}
    for number in numbers:
        shared = np.asarray((sets @ sets[number].T).todense()).ravel()
        similarity = shared / (sizes + sizes[number] - shared)
        similarity[number] = 0
        found[number] = float(similarity.max())
    return found


def measure_once(name: str, path: str, judge: bool) -> dict[str, Any]:
    """One method on the texts of a file, in this process: seconds, peak memory, and how right it was."""
    texts, planted = json.loads(Path(path).read_text(encoding="utf-8"))
    method = only_cut if name == CUT else METHODS[name][1]
    method(texts[:50])  # imports and tables
    before = peak_memory_bytes_now()
    start = time.perf_counter()
    gone = method(texts)
    seconds = time.perf_counter() - start
    peak = max(0, peak_memory_bytes_of_process() - before)
    near = [{int(number), of} for number, (of, similarity) in planted.items() if similarity >= 0.9]
    found = sum(bool(pair & gone) for pair in near)  # which of the two stays is the tool's choice
    result = {
        "seconds": seconds,
        "peak_bytes": peak,
        "removed": len(gone),
    }
    if name != CUT:
        result["recall_at_0.9"] = found / len(near)
    if judge and name != CUT:
        sample = set(sorted(gone)[:: max(1, len(gone) // 500)])
        largest = largest_similarity(texts, sample)
        result["precision"] = sum(value >= THRESHOLD for value in largest.values()) / max(1, len(largest))
    return result


def peak_memory_bytes_of_process() -> int:
    import torch

    return peak_memory_bytes(torch.device("cpu"))


def peak_memory_bytes_now() -> int:
    """Resident memory now, so that texts and interpreter are not counted; the peak so far where the system does not tell."""
    try:
        import psutil

        return psutil.Process().memory_info().rss
    except ImportError:
        return peak_memory_bytes_of_process()


def available(package: str | None) -> str | None:
    """The version of a package, "" for none needed, None if it is missing."""
    try:
        return "" if package is None else importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_peers(pip_args: str = "") -> None:
    """Install the peers that are missing into folders of their own, and put those on the path, for our processes too."""
    folders = []
    wanted = [package for package, _ in METHODS.values() if package]
    for package in dict.fromkeys([*wanted, "xxhash==3.8.2"]):  # the hash that datatrove is fastest with
        if available(package.partition("==")[0]) is None:
            try:
                folders.append(str(folder_of(package, pip_args=pip_args)))
            except Missing as why:
                print(f"skipped: {package}: {why}")
    sys.path += folders
    ONE_CORE["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *folders]))


def measure_apart(name: str, path: Path, judge: bool) -> dict[str, Any]:
    """`measure_once` in a fresh process on one core."""
    command = [sys.executable, "-m", "benchmarks.dedup", "--one", name, str(path), str(int(judge))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ONE_CORE)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def expected_seconds(sizes: dict[int, list[dict[str, Any]]], n: int) -> float:
    """What a size should take by the largest smaller one, if time grows with the number of texts."""
    earlier = [(m, statistics.median(run["seconds"] for run in done)) for m, done in sizes.items() if m < n]
    return earlier[-1][1] * n / earlier[-1][0] if earlier else 0.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--limit-s", type=float, default=90, help="leave out what would take longer at a size"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--pip-args", default="", help="for pip, where a peer is installed")
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "FILE", "JUDGE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure_once(args.one[0], args.one[1], args.one[2] == "1")))
        return 0
    find_peers(args.pip_args)
    versions = {name: available(package) for name, (package, _) in METHODS.items()}
    runs: dict[str, dict[int, list[dict[str, Any]]]] = {
        name: {} for name, version in versions.items() if version is not None
    }
    runs[CUT] = {}
    with tempfile.TemporaryDirectory() as folder:
        for n in args.sizes:
            path = Path(folder) / f"{n}.json"
            path.write_text(json.dumps(make_texts(n)), encoding="utf-8")
            for repeat in range(args.repeats):
                for name, sizes in runs.items():
                    if expected_seconds(sizes, n) > args.limit_s:
                        if repeat == 0:
                            print(
                                f"skipped: {name} at {n:,} documents would take more than {args.limit_s:g} s"
                            )
                        continue
                    run = measure_apart(name, path, judge=repeat == 0)
                    sizes.setdefault(n, []).append(run)
                    print(f"{n:>7,}  {name:24} {n / run['seconds']:>9,.0f} documents/s  {run}", flush=True)
    summary = {}
    for name, sizes in runs.items():
        medians = {n: statistics.median(run["seconds"] for run in done) for n, done in sizes.items()}
        first, last = min(medians), max(medians)
        summary[name] = {
            "documents_per_s": {str(n): n / seconds for n, seconds in medians.items()},
            "peak_mb": {
                str(n): statistics.median(run["peak_bytes"] for run in done) / 1e6
                for n, done in sizes.items()
            },
            "growth_exponent": math.log(medians[last] / medians[first]) / math.log(last / first)
            if first < last
            else None,
        }
    result = {
        "command": "python -m benchmarks.dedup" + ("" if argv is None else " " + " ".join(argv)),
        "machine": describe_machine(),
        "versions": {
            **{name: v for name, v in versions.items() if v},
            "xxhash": available("xxhash"),
            "numpy": np.__version__,
        },
        "similarity": f"Jaccard of {SHINGLE}-character shingles, threshold {THRESHOLD}",
        "cores": 1,
        "summary": summary,
        "runs": {name: {str(n): done for n, done in sizes.items()} for name, sizes in runs.items()},
    }
    with atomic_write(args.out) as file:
        json.dump(result, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
