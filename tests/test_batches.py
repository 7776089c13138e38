import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import pack_reference
from tolerances import assert_close

from minillm import batches
from minillm.attention import Mask
from minillm.batches import IGNORE, Loader, collate, concatenate, make_batch, pack, pieces, shuffled
from minillm.check import check, laws
from minillm.storage.shards import TokenShards, write_shards
from minillm.transformer import ModelConfig, Transformer

PACKINGS = ("documents", "rows", "concat")


def lengths_only(lengths, T):
    return [[piece.length for piece in row] for row in pack([n + 1 for n in lengths], T)]


def one_row(documents, T):
    row = [batches.Piece(i, 0, len(document) - 1) for i, document in enumerate(documents)]
    batch = collate([row], [np.array(document) for document in documents].__getitem__, T)
    return {
        name: getattr(batch, name)[0].tolist() for name in ("tokens", "targets", "documents", "positions")
    }


def dense_mask(documents):
    return Mask(documents=documents).dense(*[documents.shape[1]] * 2, documents.device)[:, 0]


SOLUTIONS = {
    "batches.pack": lengths_only,
    "batches.row": one_row,
    "batches.mask": dense_mask,
    "batches.order": shuffled,
}


@pytest.mark.parametrize(
    ("exercise", "law"), [(name, law) for name in SOLUTIONS for law in laws(name)], ids=str
)
def test_the_package_obeys_its_laws(exercise, law):
    law(SOLUTIONS[exercise])


def seeded_wrongly(n, seed, epoch):
    return random.Random(seed + epoch).sample(range(n), n)


@pytest.mark.parametrize(
    ("exercise", "wrong", "law"),
    [
        ("batches.pack", lambda x, T: [[n] for n in x], "two halves share a row"),
        ("batches.pack", lambda x, T: [list(x)], "no row is too long"),
        ("batches.pack", lambda x, T: lengths_only(x, T)[:3], "nothing is lost, nothing twice"),
        ("batches.pack", lambda x, T: pack_reference(x, T, decreasing=False), "best fit decreasing"),
        ("batches.pack", lambda x, T: x.sort() or lengths_only(x, T), "the input is left as it was"),
        (
            "batches.row",
            lambda d, T: {**one_row(d, T), "targets": one_row(d, T)["tokens"]},
            "the targets are the tokens one further",
        ),
        (
            "batches.row",
            lambda d, T: {**one_row(d, T), "positions": list(range(T))},
            "positions begin anew in each document",
        ),
        ("batches.mask", lambda d: dense_mask(torch.zeros_like(d)), "documents do not see each other"),
        ("batches.mask", lambda d: dense_mask(d[:1].expand_as(d)), "each row has its own documents"),
        ("batches.order", seeded_wrongly, "epochs and seeds differ"),
        ("batches.order", lambda n, s, e: np.arange(n), "epochs and seeds differ"),
    ],
)
def test_check_names_the_broken_law(exercise, wrong, law):
    report = check(exercise, wrong, quiet=True)
    broken = [rule.name for rule, reason in report.reasons.items() if reason is not None]
    assert broken[0] == law


# Rows


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 24))
def test_pieces_hold_every_prediction_once(lengths, T):
    cut = pieces(lengths, T)
    assert all(1 <= piece.length <= T for piece in cut)
    held = sorted((p.document, p.start + k) for p in cut for k in range(p.length))
    assert held == [(d, k) for d, n in enumerate(lengths) for k in range(n - 1)]


@given(st.lists(st.integers(1, 60), max_size=60), st.integers(1, 24))
def test_packing_loses_nothing_and_no_two_rows_fit_into_one(lengths, T):
    rows = pack(lengths, T)
    assert sorted(piece for row in rows for piece in row) == sorted(pieces(lengths, T))
    used = sorted(sum(piece.length for piece in row) for row in rows)
    assert all(0 < n <= T for n in used)
    assert len(used) < 2 or used[0] + used[1] > T


@given(st.lists(st.integers(1, 24), max_size=60), st.integers(24, 40))
def test_packing_equals_the_slow_reference(lengths, T):
    fast = sorted(sum(piece.length for piece in row) for row in pack([n + 1 for n in lengths], T))
    assert fast == sorted(map(sum, pack_reference(lengths, T)))


def test_packing_is_near_the_lower_bound():
    dice = random.Random(0)
    lengths = [min(2000, int(dice.lognormvariate(5, 1)) + 2) for _ in range(20_000)]
    rows = pack(lengths, 1024)
    assert len(rows) * 1024 < 1.002 * sum(n - 1 for n in lengths) + 1024


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 24))
def test_concatenation_is_one_stream_in_full_rows(lengths, T):
    rows = concatenate(lengths, T)
    assert all(sum(piece.length for piece in row) == T for row in rows[:-1])
    held = [(p.document, p.start + k) for row in rows for p in row for k in range(p.length)]
    assert held == [(d, k) for d, n in enumerate(lengths) for k in range(n)]


def test_joined_rows_predict_the_stream():
    documents = [np.array([1, 2, 3]), np.array([4, 5]), np.array([6, 7, 8, 9])]
    rows = concatenate([3, 2, 4], 4)
    batch = collate(rows, documents.__getitem__, 4, joined=True)
    assert batch.tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 0, 0, 0]]
    assert batch.targets.tolist() == [[2, 3, 4, 5], [6, 7, 8, 9], [IGNORE] * 4]
    assert batch.positions[0].tolist() == [0, 1, 2, 3]
    assert batch.mask().plain
    assert batch.n_targets == 8


def test_row_tokens_are_checked():
    for make in (pieces, pack, concatenate):
        with pytest.raises(ValueError, match="row_tokens must be at least 1, got 0"):
            make([3, 4], 0)


# Batches


def model_and_batch(dtype=torch.float64, **changes):
    dice = random.Random(0)
    documents = [np.array([dice.randrange(1, 50) for _ in range(n)]) for n in (9, 5, 14, 3, 8, 6)]
    batch = collate(pack([len(d) for d in documents], 20), documents.__getitem__, 20)
    fields = {
        "vocab_size": 50,
        "dim": 16,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "hidden_dim": 32,
        "max_seq_len": 20,
    }
    model = Transformer(ModelConfig(**fields, **changes)).to(dtype).requires_grad_(False)
    for weight in model.parameters():
        weight.mul_(5 if weight.dim() > 1 else 1)
    return model, batch, documents


@pytest.mark.parametrize(
    "changes", [{}, {"position": "alibi"}, {"rope_interleaved": True}, {"position": "none"}], ids=str
)
def test_packed_equals_separate(changes):
    model, batch, documents = model_and_batch(**changes)
    assert batch.packed
    logits = model(batch.tokens, positions=batch.positions, mask=batch.mask())
    for document in documents:
        inputs = torch.from_numpy(document[:-1])
        alone = model(inputs[None])[0]
        row = next(r for r in range(len(batch.tokens)) if contains(batch.tokens[r], inputs) is not None)
        at = contains(batch.tokens[row], inputs)
        assert_close(logits[row, at : at + len(inputs)], alone)
        assert torch.equal(batch.targets[row, at : at + len(inputs)], torch.from_numpy(document[1:]))


def contains(row, part):
    for at in range(len(row) - len(part) + 1):
        if torch.equal(row[at : at + len(part)], part):
            return at
    return None


def test_without_the_mask_strangers_change_the_logits():
    model, batch, _ = model_and_batch()
    right = model(batch.tokens, positions=batch.positions, mask=batch.mask())
    wrong = model(batch.tokens, positions=batch.positions, mask=Mask())
    first = batch.documents == 0
    assert_close(wrong[first], right[first])  # the first document of a row has no strangers before it
    assert (wrong - right)[batch.documents > 0].abs().max() > 0.1


def test_rotary_hides_positions_that_run_on_and_no_position_encoding_needs_them():
    for position in ("rope", "alibi", "none"):
        model, batch, _ = model_and_batch(position=position)
        right = model(batch.tokens, positions=batch.positions, mask=batch.mask())
        run_on = model(batch.tokens, positions=torch.arange(20)[None], mask=batch.mask())
        real = batch.targets != IGNORE
        assert_close(run_on[real], right[real], scale=1000)  # angles are float32 in every model


def test_padding_changes_nothing_that_counts():
    model, batch, _ = model_and_batch()
    real = batch.targets != IGNORE
    assert not real.all()
    other = torch.where(batch.documents < 0, 7, batch.tokens)
    assert_close(
        model(other, positions=batch.positions, mask=batch.mask())[real],
        model(batch.tokens, positions=batch.positions, mask=batch.mask())[real],
    )


def test_a_batch_splits_into_its_rows():
    _, batch, _ = model_and_batch()
    rows = len(batch.tokens)
    parts = batch.split(rows)
    assert sum(part.n_targets for part in parts) == batch.n_targets
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
    assert batch.split(1)[0] is batch
    assert [part.packed for part in parts] == [bool((part.documents > 0).any()) for part in parts]
    for wrong in (0, rows + 1):
        with pytest.raises(ValueError, match=f"{rows} rows do not divide into {wrong} parts"):
            batch.split(wrong)


def test_a_batch_moves_with_all_it_has():
    _, batch, _ = model_and_batch()
    moved = batch.to("meta")
    assert {t.device.type for t in vars(moved).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert (moved.n_targets, moved.packed) == (batch.n_targets, batch.packed)
    assert batch.to("cpu") is batch


def test_one_document_a_row_asks_for_plain_causality():
    ids = torch.tensor([[0, 0, -1]])
    assert make_batch(ids, ids, ids, ids).mask().plain
    assert not make_batch(ids, ids, torch.tensor([[0, 1, -1]]), ids).mask().plain


# The order


def test_the_order_is_the_same_for_ever():
    assert shuffled(12, 0, 0).tolist() == [4, 8, 0, 9, 1, 2, 11, 10, 7, 3, 5, 6]
    assert shuffled(0, 1).tolist() == []


@given(st.integers(0, 300), st.lists(st.integers(0, 2**40), min_size=1, max_size=3))
def test_shuffled_is_a_permutation(n, key):
    assert sorted(shuffled(n, *key).tolist()) == list(range(n))


def test_shuffled_is_fair():
    places = np.stack([shuffled(50, seed) for seed in range(2000)])
    mean = places.mean(0)  # of 2,000 uniform draws from 0..49: 24.5 ± 0.32
    assert np.abs(mean - 24.5).max() < 5 * 0.32
    assert len({tuple(row) for row in places.tolist()}) == 2000


@pytest.fixture
def unique(tmp_path):
    """Documents in which every token is unique, so that a target says which prediction it is."""
    sizes = (2 + shuffled(57, 7) % 23).tolist()
    starts = np.cumsum([1, *sizes]).tolist()
    write_shards(
        [list(range(start, start + n)) for start, n in zip(starts, sizes)],
        tmp_path / "unique",
        vocab_size=100_000,
        eos_id=0,
        shard_tokens=200,
    )
    shards = TokenShards(tmp_path / "unique")
    inside = sorted(t for i in range(len(shards)) for t in shards.document(i)[1:].tolist() if t)
    return shards, inside, {int(shards.document(i)[0]) for i in range(len(shards))}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("batch_size", "T", "window"), [(4, 12, 16), (1, 5, 1000), (6, 64, 57), (3, 1, 10)])
def test_an_epoch_holds_every_prediction_once(unique, packing, batch_size, T, window):
    shards, inside, first = unique
    loader = Loader(shards, batch_size=batch_size, seq_len=T, packing=packing, window=window)
    for epoch in (0, 1):
        eos, targets = 0, []
        for batch in loader.epoch_batches(epoch):
            assert len(batch.tokens) == batch_size
            assert batch.n_targets == int((batch.targets != IGNORE).sum())
            targets += batch.targets[batch.targets > 0].tolist()
            eos += int((batch.targets == 0).sum())
        assert sorted(t for t in targets if t not in first) == inside
        assert eos == len(shards)
        assert packing == "concat" or not first & set(targets)


@pytest.mark.parametrize("packing", PACKINGS)
def test_ranks_share_the_batches_of_one_process(unique, packing):
    shards = unique[0]
    settings = {"batch_size": 12, "seq_len": 12, "packing": packing, "window": 20}
    one = Loader(shards, **settings)
    for world_size in (2, 3, 4):
        one.load_state_dict(Loader(shards, **settings).state_dict())
        ranks = [Loader(shards, **settings, rank=r, world_size=world_size) for r in range(world_size)]
        for _ in range(15):
            whole, parts = next(one), [next(rank) for rank in ranks]
            for name in ("tokens", "targets", "documents", "positions"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_loader_resumes_with_the_very_next_batch(unique, packing):
    settings = {"batch_size": 3, "seq_len": 12, "packing": packing, "window": 20, "seed": 5}
    loader = Loader(unique[0], **settings)
    for _ in range(40):
        state = json.loads(json.dumps(loader.state_dict()))
        again = Loader(unique[0], **settings)
        again.load_state_dict(state)
        assert torch.equal(next(loader).tokens, next(again).tokens)
    assert loader.epoch > 0
    assert loader.state_dict() == again.state_dict()


def test_resuming_packs_one_window_and_no_more(unique, monkeypatch):
    loader = Loader(unique[0], batch_size=2, seq_len=12, window=10)
    for _ in range(25):
        next(loader)
    again, planned = Loader(unique[0], batch_size=2, seq_len=12, window=10), []
    monkeypatch.setattr(batches, "pack", lambda *a: planned.append(a) or pack(*a))
    again.load_state_dict(loader.state_dict())
    next(again)
    assert len(planned) == 1


def test_evaluation_does_not_move_the_stream(unique):
    loader, other = (Loader(unique[0], batch_size=4, seq_len=12, window=16) for _ in range(2))
    next(loader), next(other)
    assert sum(1 for _ in loader.epoch_batches(3)) > 5
    assert torch.equal(next(loader).tokens, next(other).tokens)


def test_epochs_and_seeds_have_orders_of_their_own(unique):
    def order(seed, epoch):
        loader = Loader(unique[0], batch_size=4, seq_len=12, seed=seed)
        return [t for batch in loader.epoch_batches(epoch) for t in batch.tokens.flatten().tolist()]

    orders = [tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert order(1, 1) == list(orders[3])


def test_similar_lengths_share_a_batch(unique):
    batched = list(Loader(unique[0], batch_size=8, seq_len=64, packing="rows").epoch_batches())
    assert all(batch.tokens.shape[1] % 16 == 0 for batch in batched)
    assert len({batch.tokens.shape[1] for batch in batched}) > 1
    used = [(batch.targets != IGNORE).sum(1) for batch in batched]
    spread = [int(n[n > 0].max() - n[n > 0].min()) for n in used]
    assert np.mean(spread) < 6  # of lengths between 2 and 24


def test_a_state_of_other_data_or_settings_is_refused(unique, tmp_path):
    write_shards([[1, 2, 3], [4, 5]], tmp_path / "other", vocab_size=10, eos_id=0)
    loader = Loader(unique[0], batch_size=4, seq_len=12)
    for name, other in (
        ("data", Loader(TokenShards(tmp_path / "other"), batch_size=4, seq_len=12)),
        ("batch_size=4", Loader(unique[0], batch_size=8, seq_len=12)),
        ("seq_len=12", Loader(unique[0], batch_size=4, seq_len=13)),
        ("seed=0", Loader(unique[0], batch_size=4, seq_len=12, seed=1)),
        ("packing='documents'", Loader(unique[0], batch_size=4, seq_len=12, packing="rows")),
        ("window=65536", Loader(unique[0], batch_size=4, seq_len=12, window=7)),
    ):
        with pytest.raises(ValueError, match=rf"state was saved with {name}"):
            other.load_state_dict(loader.state_dict())


def test_bad_settings_are_named(unique, tmp_path):
    good = {"batch_size": 4, "seq_len": 12}
    for changes, error in (
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"window": 0}, "window must be at least 1"),
        ({"world_size": 3}, "4 do not divide among 3"),
        ({"world_size": 0}, "got rank 0 and world_size 0"),
        ({"rank": 2, "world_size": 2}, "rank must be in 0..world_size - 1, got rank 2"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=error):
            Loader(unique[0], **{**good, **changes})


def test_the_order_survives_a_restart_of_python(unique):
    """No hash randomisation, no global state: another process makes the same batches."""
    code = (
        "import sys; from minillm.batches import Loader; from minillm.storage.shards import TokenShards\n"
        "loader = Loader(TokenShards(sys.argv[1]), batch_size=4, seq_len=12)\n"
        "print([next(loader).tokens.sum().item() for _ in range(5)])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(unique[0].folder)], capture_output=True, text=True, check=True
    ).stdout
    loader = Loader(unique[0], batch_size=4, seq_len=12)
    assert json.loads(out) == [next(loader).tokens.sum().item() for _ in range(5)]
