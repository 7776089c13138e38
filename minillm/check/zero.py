"""Laws of chapter 18."""

import math

from minillm.check import law


def _near(found, expected, what):
    assert math.isclose(found, expected, rel_tol=1e-9), f"{what}: {found:.6g}, expected {expected:.6g}"


@law("zero.state_bytes", "alone, every stage holds 16 bytes a parameter", hint="2 + 2 + 12")
def _(f):
    for stage in range(4):
        _near(f(1000, stage, 1), 16_000, f"stage {stage}, one process")


@law(
    "zero.state_bytes",
    "stage 1 shares out the optimizer's state",
    hint="12 bytes of a parameter are divided by the number of processes",
)
def _(f):
    _near(f(1200, 1, 4), 1200 * (4 + 3), "stage 1, four processes")


@law(
    "zero.state_bytes",
    "each stage shares out one thing more",
    hint="stage 2: gradients too; stage 3: parameters too; stage 0: nothing",
)
def _(f):
    for stage, each in enumerate((16, 2 + 2 + 12 / 8, 2 + 14 / 8, 16 / 8)):
        _near(f(800, stage, 8), 800 * each, f"stage {stage}, eight processes")


def _ring(f, n):
    """Run a reduce-scatter by the candidate's order; chunk c of process r is the set {(r, c)}."""
    chunks = [[{(r, c)} for c in range(n)] for r in range(n)]
    for step in range(n - 1):
        moves = [f(rank, step, n) for rank in range(n)]
        for rank, move in enumerate(moves):
            assert len(move) == 2, f"expected (send, receive), got {move}"
            assert all(0 <= chunk < n for chunk in move), (
                f"process {rank}, step {step}: {move}, expected two chunks in 0..{n - 1}"
            )
            left = moves[(rank - 1) % n]
            assert left[0] == move[1], (
                f"step {step}: process {(rank - 1) % n} sends chunk {left[0]}, process {rank} waits for {move[1]}"
            )
        sent = [chunks[rank][moves[rank][0]] for rank in range(n)]
        for rank in range(n):
            got = sent[(rank - 1) % n]
            assert not chunks[rank][moves[rank][1]] & got, (
                f"step {step}: process {rank} adds a part a second time"
            )
            chunks[rank][moves[rank][1]] = chunks[rank][moves[rank][1]] | got
    return chunks


@law(
    "zero.ring_order",
    "what one sends, its right neighbour expects",
    hint="what process r receives is what process r - 1 sends: its formula with r - 1 in place of r",
)
def _(f):
    for n in (2, 3, 4, 7):
        _ring(f, n)


@law(
    "zero.ring_order",
    "at the end process r has the whole sum of chunk r",
    hint="what arrives last is chunk r; so begin by sending chunk r - 1",
)
def _(f):
    for n in (2, 3, 5, 8):
        chunks = _ring(f, n)
        for rank in range(n):
            whole = {(r, rank) for r in range(n)}
            assert chunks[rank][rank] == whole, (
                f"{n} processes: process {rank} has {len(chunks[rank][rank])} parts"
            )


@law("zero.pieces", "one process has everything", hint="its slice is the whole flat tensor")
def _(f):
    found = f([3, 5], 0, 1)
    assert found == [(0, 0, 3), (1, 0, 5)], f"{found}"


@law(
    "zero.pieces",
    "a slice may begin and end inside a parameter",
    hint="cut each parameter's [start, end) with the slice's",
)
def _(f):
    found = f([3, 5], 0, 2)
    assert found == [(0, 0, 3), (1, 0, 1)], f"process 0 of 2: {found}"
    found = f([3, 5], 1, 2)
    assert found == [(1, 1, 4)], f"process 1 of 2: {found}"


@law(
    "zero.pieces",
    "together the slices have every element once, and no padding",
    hint="a slice has ceil(total / processes) elements; the last may be shorter or empty",
)
def _(f):
    sizes = [7, 1, 12, 4, 9]
    for n in (2, 3, 5, 8, 40):
        seen = []
        for rank in range(n):
            for index, first, length in f(sizes, rank, n):
                assert length > 0, f"process {rank} of {n} lists an empty piece of parameter {index}"
                seen += [(index, first + i) for i in range(length)]
        expected = [(index, i) for index, size in enumerate(sizes) for i in range(size)]
        assert seen == expected, f"{n} processes hold {len(seen)} elements, expected {len(expected)}"


@law("zero.sent", "stage 0 and 1 send the model twice", hint="all-reduce = reduce-scatter + all-gather")
def _(f):
    for stage in (0, 1):
        _near(f(stage, 1), 2.0, f"stage {stage}")


@law("zero.sent", "stage 3 sends half as much again", hint="parameters for forward, for backward; gradients")
def _(f):
    _near(f(3, 1), 3.0, "stage 3")
    _near(f(2, 1), 2.0, "stage 2")


@law(
    "zero.sent",
    "accumulation is free at stages 0 and 1 only",
    hint="stage 2 sends gradients in every part; stage 3 fetches parameters in every part too",
)
def _(f):
    for stage, expected in enumerate((2.0, 2.0, 5.0, 12.0)):
        _near(f(stage, 4), expected, f"stage {stage}, four parts")
