"""Laws of chapter 06."""

import numpy as np

from minillm.check import law


def _array(actual, expected, what="value"):
    assert isinstance(actual, np.ndarray), f"expected a numpy array, got {type(actual).__name__}"
    assert actual.shape == np.shape(expected), f"{what}: shape {actual.shape}, expected {np.shape(expected)}"
    assert np.allclose(actual, expected), (
        f"{what}: {actual.tolist()[:4]} …, expected {np.asarray(expected).tolist()[:4]} …"
    )


def _numbers(*shape, seed=0):
    return np.random.RandomState(seed).randint(0, 1 << 32, shape, dtype=np.uint32)


@law(
    "dedup.minhash",
    "a = 1 and b = 0 give the smallest hash",
    hint="the minimum over the hashes, one for each pair (a, b)",
)
def _(f):
    hashes = np.array([30, 7, 12], np.uint32)
    _array(f(hashes, np.array([1, 3], np.uint32), np.array([0, 1], np.uint32)), [7, 22])


@law(
    "dedup.minhash",
    "products are taken modulo 2³²",
    hint="wrap around: uint32 arithmetic, or % 2**32 in uint64",
)
def _(f):
    hashes, a, b = _numbers(50), _numbers(8, seed=1) | np.uint32(1), _numbers(8, seed=2)
    expected = [min((int(h) * int(x) + int(y)) % 2**32 for h in hashes) for x, y in zip(a, b)]
    _array(f(hashes, a, b), expected)


@law("dedup.minhash", "neither order nor repetition counts", hint="a text is a set of shingles")
def _(f):
    hashes, a, b = _numbers(20), _numbers(8, seed=1) | np.uint32(1), _numbers(8, seed=2)
    _array(f(np.concatenate([hashes[::-1], hashes]), a, b), f(hashes, a, b))


@law(
    "dedup.minhash", "minima agree as often as the sets overlap", hint="use each pair (a, b) with all hashes"
)
def _(f):
    shared, a, b = _numbers(300), _numbers(2000, seed=1) | np.uint32(1), _numbers(2000, seed=2)
    left, right = (f(np.concatenate([shared, _numbers(100, seed=s)]), a, b) for s in (3, 4))
    share = float((left == right).mean())
    assert abs(share - 0.6) < 0.06, (
        f"300 of 500 hashes are shared, and {share:.2f} of the minima agree, not about 0.6"
    )


@law("dedup.agreement", "a sketch agrees with itself", hint="the share of bins in which the two are equal")
def _(f):
    sketches = _numbers(3, 64).astype(np.uint16) & np.uint16(0x7FFF)
    _array(np.asarray(f(sketches, np.array([[0, 0], [1, 1]]))), [1, 1])


@law(
    "dedup.agreement",
    "full sketches: the share of equal bins",
    hint="compare row pairs[i, 0] with row pairs[i, 1]",
)
def _(f):
    sketches = _numbers(2, 64).astype(np.uint16) & np.uint16(0x7FFF)
    sketches[1, :16] = sketches[0, :16]
    expected = (sketches[0] == sketches[1]).mean()
    _array(np.asarray(f(sketches, np.array([[0, 1], [1, 0]]))), [expected, expected])


@law(
    "dedup.agreement",
    "bins that both leave empty do not count",
    hint="65535 on both sides says nothing: neither above nor below the line",
)
def _(f):
    sketches = np.full((2, 64), 65535, np.uint16)
    sketches[:, :4] = [[1, 2, 3, 4], [1, 2, 9, 8]]
    _array(np.asarray(f(sketches, np.array([[0, 1]]))), [0.5])


@law(
    "dedup.agreement",
    "a bin that one leaves empty counts as different",
    hint="below the line: bins that either of the two fills",
)
def _(f):
    sketches = np.full((2, 64), 65535, np.uint16)
    sketches[0, :4], sketches[1, :2] = [1, 2, 3, 4], [1, 2]
    _array(np.asarray(f(sketches, np.array([[0, 1]]))), [0.5])


@law("dedup.agreement", "two empty sketches agree in nothing", hint="do not divide by zero")
def _(f):
    _array(np.asarray(f(np.full((2, 8), 65535, np.uint16), np.array([[0, 1]]))), [0.0])


@law("dedup.first_copies", "no pairs, no copies", hint="None for a document that is alone")
def _(f):
    assert f(3, np.empty((0, 2), int)) == [None] * 3, "documents without a pair must all stay"


@law(
    "dedup.first_copies", "the first of a pair stays", hint="the later one gets the number of the earlier one"
)
def _(f):
    for pairs in ([[0, 2]], [[2, 0]]):
        got = f(3, np.array(pairs))
        assert got == [None, None, 0], f"pairs {pairs}: {got}, expected [None, None, 0]"


@law(
    "dedup.first_copies",
    "a friend's friend is in the group",
    hint="follow the pairs to the end: connected components",
)
def _(f):
    for pairs in ([[0, 1], [1, 2], [4, 3]], [[1, 2], [3, 4], [0, 1]], [[2, 1], [0, 2], [3, 4]]):
        got = f(5, np.array(pairs))
        assert got == [None, 0, 0, None, 3], f"pairs {pairs}: {got}, expected [None, 0, 0, None, 3]"


@law(
    "dedup.first_copies",
    "two groups that meet late become one",
    hint="join the roots of the groups, not the two documents",
)
def _(f):
    got = f(6, np.array([[0, 1], [2, 3], [4, 5], [3, 5], [5, 1]]))
    assert got == [None, 0, 0, 0, 0, 0], f"{got}, expected [None, 0, 0, 0, 0, 0]"


@law(
    "dedup.first_copies",
    "a chain of 20,000 is one group",
    hint="no recursion, and shorten the paths as you walk them",
)
def _(f):
    n = 20_000
    chain = np.stack([np.arange(n - 1), np.arange(1, n)], axis=1)[::-1]
    assert f(n, chain) == [None] + [0] * (n - 1), "the whole chain belongs to document 0"


@law("dedup.contaminated", "a copy is found, another text is not", hint="compare runs of n words")
def _(f):
    item = "How many plums does Anna carry home from the old market?"
    assert f(item, [item], 5), "the item itself was not found"
    assert not f("The owl came back at night and sat on the roof.", [item], 5), "another text was accused"


@law(
    "dedup.contaminated",
    "the run may stand anywhere in a longer text",
    hint="every place where a run can begin",
)
def _(f):
    item = "How many plums does Anna carry home from the old market?"
    assert f("Somebody asked: how many plums does Anna carry? Nobody knew.", [item], 5)
    assert f("They went home from the old market", ["nothing to see here at all", item], 5)


@law(
    "dedup.contaminated",
    "case and punctuation do not count",
    hint="lowercase, and only letters and digits make words",
)
def _(f):
    assert f("HOW MANY -- plums, does (Anna) carry", ["How many plums does Anna carry home?"], 6)


@law("dedup.contaminated", "words in another order are no leak", hint="runs, not sets of words")
def _(f):
    assert not f("home carry Anna does plums many how", ["How many plums does Anna carry home"], 3)


@law("dedup.contaminated", "n - 1 words in common are not enough", hint="a run has n words, not n - 1")
def _(f):
    item = "How many plums does Anna carry home?"
    assert not f("How many plums does Peter carry home?", [item], 5), (
        "four words in a row were taken for five"
    )
