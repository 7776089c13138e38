"""Laws of chapter 15."""

import itertools
import random

import torch

from minillm.check import law

IGNORE = -100


def _sizes(n, most, seed):
    dice = random.Random(seed)
    return [dice.randint(1, most) for _ in range(n)]


def _held(rows):
    """How often each length is in the rows."""
    return sorted(length for row in rows for length in row)


@law("batches.pack", "two halves share a row", hint="return a list of rows; each row is a list of lengths")
def _(f):
    rows = [sorted(row) for row in f([4, 4], 8)]
    assert rows == [[4, 4]], f"pack([4, 4], 8) gives {rows}, expected [[4, 4]]"


@law("batches.pack", "no row is too long", hint="a length goes into a row only if the sum stays at most T")
def _(f):
    for seed in range(20):
        for row in f(_sizes(30, 12, seed), 12):
            assert sum(row) <= 12, f"a row of T = 12 holds {sum(row)}: {row}"


@law("batches.pack", "nothing is lost, nothing twice", hint="each length goes into exactly one row")
def _(f):
    for seed in range(20):
        lengths = _sizes(30, 12, seed)
        assert _held(f(lengths, 12)) == sorted(lengths), "the rows hold other lengths than went in"


@law(
    "batches.pack",
    "no two rows would fit into one",
    hint="open a row only if a length fits into none that is open",
)
def _(f):
    for seed in range(20):
        used = sorted(map(sum, f(_sizes(30, 12, seed), 12)))
        assert len(used) < 2 or used[0] + used[1] > 12, (
            f"rows with {used[0]} and {used[1]} fit into one of T = 12"
        )


@law(
    "batches.pack",
    "best fit decreasing",
    hint="go from long to short, and take the fullest row that still has room",
)
def _(f):
    for lengths, best in (([3, 7, 2, 4, 3, 5], 4), ([1, 1, 1, 5, 3, 3, 2], 2), ([2, 3, 2, 4, 2, 5, 5, 7], 4)):
        rows = f(lengths, 8)
        assert len(rows) <= best, f"pack({lengths}, 8) takes {len(rows)} rows, {best} are enough"


@law("batches.pack", "the input is left as it was", hint="sort a copy: sorted(lengths), not lengths.sort()")
def _(f):
    lengths = [1, 5, 3]
    f(lengths, 8)
    assert lengths == [1, 5, 3], "pack changed its argument"


def _lay(f, documents, T):
    row = f(documents, T)
    assert isinstance(row, dict), f"expected a dict, got {type(row).__name__}"
    for name in ("tokens", "targets", "documents", "positions"):
        assert name in row, f"the row has no {name!r}"
        assert len(row[name]) == T, f"{name}: {len(row[name])} slots, expected {T}"
    return row


@law(
    "batches.row", "the targets are the tokens one further", hint="target p of a document is document[p + 1]"
)
def _(f):
    row = _lay(f, [[5, 6, 7, 0]], 3)
    assert row["tokens"] == [5, 6, 7], (
        f"tokens {row['tokens']}, expected [5, 6, 7]: the last token predicts nothing"
    )
    assert row["targets"] == [6, 7, 0], f"targets {row['targets']}, expected [6, 7, 0]"


@law(
    "batches.row",
    "padding has no target",
    hint="fill up with tokens 0, targets -100, documents -1, positions 0",
)
def _(f):
    row = _lay(f, [[5, 6, 0]], 4)
    assert row["targets"][2:] == [IGNORE, IGNORE], f"targets {row['targets']}, the last two slots are padding"
    assert row["documents"][2:] == [-1, -1], f"documents {row['documents']}, padding has -1"


@law("batches.row", "no target crosses the seam", hint="the last token of a document predicts nothing")
def _(f):
    row = _lay(f, [[5, 6, 0], [7, 8, 9, 0]], 6)
    assert 7 not in row["targets"], "something predicts the first token of the second document"
    assert row["targets"][:5] == [6, 0, 8, 9, 0], f"targets {row['targets']}"


@law("batches.row", "positions begin anew in each document", hint="count from 0 in each document")
def _(f):
    row = _lay(f, [[5, 6, 0], [7, 8, 9, 0]], 6)
    assert row["positions"][:5] == [0, 1, 0, 1, 2], f"positions {row['positions']}"
    assert row["documents"][:5] == [0, 0, 1, 1, 1], f"documents {row['documents']}"


def _see(f, ids):
    documents = torch.tensor(ids)
    seen = f(documents)
    shape = (*documents.shape, documents.shape[-1])
    assert isinstance(seen, torch.Tensor), f"expected a tensor, got {type(seen).__name__}"
    assert seen.dtype == torch.bool, f"dtype {seen.dtype}, expected torch.bool"
    assert tuple(seen.shape) == shape, f"shape {tuple(seen.shape)}, expected {shape}"
    return seen


@law("batches.mask", "one document sees its past", hint="query t may see key s only if s <= t")
def _(f):
    seen = _see(f, [[0, 0, 0]])
    assert torch.equal(seen[0], torch.ones(3, 3).tril().bool()), "one document: expected the lower triangle"


@law("batches.mask", "documents do not see each other", hint="and only if documents[t] == documents[s]")
def _(f):
    seen = _see(f, [[0, 0, 1, 1, 1, 2]])[0]
    ids = [0, 0, 1, 1, 1, 2]
    for t in range(6):
        for s in range(6):
            expected = s <= t and ids[s] == ids[t]
            assert bool(seen[t, s]) == expected, (
                f"query {t} sees key {s}: {bool(seen[t, s])}, expected {expected}"
            )


@law(
    "batches.mask",
    "each row has its own documents",
    hint="compare documents[:, :, None] with documents[:, None, :]",
)
def _(f):
    ids = [[0, 0, 1, 1], [0, 1, 1, 2]]
    together = _see(f, ids)
    for number, row in enumerate(ids):
        assert torch.equal(together[number], _see(f, [row])[0]), f"row {number} changes in a batch"


@law("batches.order", "is a permutation", hint="every number from 0 to n - 1 once")
def _(f):
    for n in (1, 2, 17, 1000):
        order = [int(i) for i in f(n, 0, 0)]
        assert sorted(order) == list(range(n)), f"order(n={n}, …) is not a permutation of 0..{n - 1}"


@law("batches.order", "the same key, the same order", hint="use nothing but n, seed and epoch")
def _(f):
    first = [int(i) for i in f(100, 3, 1)]
    assert first == [int(i) for i in f(100, 3, 1)], "two calls differ"
    random.seed(7)
    torch.manual_seed(7)
    assert first == [int(i) for i in f(100, 3, 1)], "the order depends on the global random state"


@law(
    "batches.order",
    "leaves the global random state alone",
    hint="random.Random(…) or torch.Generator(), not random.seed",
)
def _(f):
    random.seed(0)
    before, torch_before = random.getstate(), torch.random.get_rng_state()
    f(100, 3, 1)
    assert random.getstate() == before, "it used or seeded the global `random`"
    assert torch.equal(torch.random.get_rng_state(), torch_before), (
        "it used or seeded torch's global generator"
    )


@law(
    "batches.order",
    "epochs and seeds differ",
    hint="mix both into the key; seed + epoch makes (0, 1) equal (1, 0)",
)
def _(f):
    orders = {key: tuple(int(i) for i in f(100, *key)) for key in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2))}
    for a in orders:
        for b in orders:
            assert a == b or orders[a] != orders[b], f"(seed, epoch) {a} and {b} give the same order"


@law("batches.order", "is well shuffled", hint="neighbours must not stay neighbours")
def _(f):
    order = [int(i) for i in f(1000, 0, 0)]
    kept = sum(abs(a - b) == 1 for a, b in itertools.pairwise(order))
    assert kept < 20, f"{kept} of 999 neighbours are still neighbours"
