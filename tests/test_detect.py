import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from step_laws import ANY_TEXT, CLEAN, is_a_step, keeps_its_pace, survives

from minillm.check import check, laws
from minillm.corpus import PIECE, Document, dice, units
from minillm.detect import (
    MACHINES,
    MachineText,
    _language_model,
    auroc,
    fit_logistic,
    has_han,
    human_like,
    machine_detector,
    machine_features,
    machine_text,
    sample_ngram,
    share_interval,
    train_detector,
    train_ngram,
)
from minillm.world.stream import documents
from minillm.world.task import CorpusConfig


def logistic_step(w, b, x, y, rate):
    share = np.where(y == 1, 0.5 / y.sum(), 0.5 / (1 - y).sum())
    error = share * (1 / (1 + np.exp(-(x @ w + b))) - y)
    return w - rate * x.T @ error, b - rate * error.sum()


def precision(base_rate, recall, false_alarms):
    right, wrong = base_rate * recall, (1 - base_rate) * false_alarms
    return right / (right + wrong) if right + wrong else 1.0


SOLUTIONS = {
    "detect.perplexity": lambda log_probs: np.exp(-np.mean(log_probs)),
    "detect.auroc": auroc,
    "detect.logistic_step": logistic_step,
    "detect.precision": precision,
}


@pytest.mark.parametrize(
    ("exercise", "law"), [(name, law) for name in SOLUTIONS for law in laws(name)], ids=str
)
def test_the_package_obeys_its_laws(exercise, law):
    law(SOLUTIONS[exercise])


@pytest.mark.parametrize(
    ("exercise", "wrong", "law"),
    [
        (
            "detect.perplexity",
            lambda log_probs: np.mean(1 / np.exp(log_probs)),
            "the geometric mean of one over the probabilities",
        ),
        (
            "detect.perplexity",
            lambda log_probs: 2 ** -np.mean(log_probs),
            "four equally likely tokens: 4",
        ),
        (
            "detect.auroc",
            lambda a, b: float(np.mean([x < y for x in a for y in b])),
            "ties count half",
        ),
        (
            "detect.logistic_step",
            lambda w, b, x, y, rate: (
                w - rate * x.T @ (1 / (1 + np.exp(-(x @ w + b))) - y) / len(y),
                b - rate * np.mean(1 / (1 + np.exp(-(x @ w + b))) - y),
            ),
            "both classes weigh one half",
        ),
        (
            "detect.logistic_step",
            lambda w, b, x, y, rate: logistic_step(0 * w, b, x, y, rate),
            "is the gradient of the loss",
        ),
        (
            "detect.precision",
            lambda rate, recall, false: rate * recall / (rate * recall + false),
            "the case of the chapter",
        ),
        (
            "detect.precision",
            lambda rate, recall, false: rate * recall / max(rate * recall + (1 - rate) * false, 1e-9),
            "who accuses nobody is never wrong",
        ),
    ],
)
def test_check_names_the_broken_law(exercise, wrong, law):
    report = check(exercise, wrong, quiet=True)
    broken = [rule.name for rule, reason in report.reasons.items() if reason is not None]
    assert broken[0] == law


STEPS = [
    MachineText(),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_step_is_a_step_can_be_pickled_and_has_nothing_to_add_to_its_own_output(step):
    is_a_step(step)


@settings(max_examples=25, deadline=None)
@given(ANY_TEXT)
def test_no_step_fails_on_any_text_once_it_is_well_formed(text):
    survives(STEPS, text)


@settings(max_examples=25, deadline=None)
@given(ANY_TEXT)
def test_our_own_functions_do_not_fail_on_text_that_is_not_well_formed(text):
    machine_features(text, _language_model(3, 104))


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_time_grows_no_faster_than_hostile_text(step):
    keeps_its_pace(step)


def test_the_language_model_is_a_distribution_and_counts_by_the_formula():
    lm = train_ngram(["a b a b a c", "b a b"], 3, discount=0.5)
    a, b = lm.vocabulary["a"], lm.vocabulary["b"]
    for context in ((), (a,), (b, a), (0,), (0, a), (0, 0)):
        assert lm.distribution(context).sum() == pytest.approx(1, abs=1e-5)
        assert (lm.distribution(context) > 0).all()
    # After "b a" came b once (1 of 2) and c once; after "a": b 3 times, c once.
    p_a = [
        (3 - 0.5) / 4 + 0.5 * 2 / 4 * lm.unigram[b],
        (1 - 0.5) / 4 + 0.5 * 2 / 4 * lm.unigram[lm.vocabulary["c"]],
    ]
    assert lm.distribution((a,))[b] == pytest.approx(p_a[0], abs=1e-5)
    assert lm.distribution((b, a))[b] == pytest.approx((2 - 0.5) / 3 + 0.5 * 2 / 3 * p_a[0], abs=1e-5)


def test_scores_are_log_probabilities_and_ranks_of_the_distribution():
    lm = train_ngram((d.text for d in CLEAN[:100]), 3)
    text = CLEAN[150].text
    scores, ids = lm(text), lm.ids(text)
    assert len(scores.ranks) == len(ids) == len(PIECE.findall(text))
    for place in range(len(ids)):
        probs = lm.distribution(tuple(ids[max(0, place - 2) : place]))
        assert scores.log_probs[place] == pytest.approx(np.log(probs[ids[place]]), abs=1e-4)
        assert scores.ranks[place] == (probs > probs[ids[place]]).sum()


def test_text_that_was_seen_is_likelier_and_samples_look_like_it():
    lm = train_ngram((d.text for d in CLEAN[:300]), 3)
    words = CLEAN[0].text.split(" ")
    assert (
        lm(CLEAN[0].text).log_probs.mean() > lm(" ".join(reversed(words))).log_probs.mean() + 0.5
        or len(words) < 4
    )
    made = sample_ngram(lm, dice(1), 40, "One day")
    assert made.startswith("One day")
    assert made == sample_ngram(lm, dice(1), 40, "One day") != sample_ngram(lm, dice(2), 40, "One day")
    assert pickle.loads(pickle.dumps(lm)).distribution((1, 2)) == pytest.approx(lm.distribution((1, 2)))
    with pytest.raises(ValueError, match="order=0 must be at least 1"):
        train_ngram([], 0)


def test_logistic_regression_equals_scikit_learns():
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 4)) * [1, 3, 0.3, 1]
    y = (x @ [1, -0.5, 2, 0] + rng.normal(size=120) > 0.8).astype(float)
    weights, bias = fit_logistic([(range(4), row) for row in x], y.tolist(), 4, l2=0.05, steps=3000)
    # Both classes weigh one half in ours: theirs is told so, and its C is 1 / l2.
    share = np.where(y == 1, 0.5 / y.sum(), 0.5 / (1 - y).sum())
    theirs = linear.LogisticRegression(C=1 / 0.05, tol=1e-10, max_iter=10_000).fit(x, y, sample_weight=share)
    assert weights == pytest.approx(theirs.coef_[0], abs=1e-3)
    assert bias == pytest.approx(theirs.intercept_[0], abs=1e-3)
    with pytest.raises(ValueError, match="labels must be of both kinds"):
        fit_logistic([([0], [1.0])], [1.0], 1)


def test_the_detector_finds_known_machines_and_keeps_its_promise_on_humans():
    detector = machine_detector()
    human = [d for d in documents(CorpusConfig(seed=42), n_documents=300) if d.kind != "arithmetic"]
    scores = [detector(d.text) for d in human]
    assert np.mean([score >= 0.5 for score in scores]) <= 0.03
    for machine in ("salad", "loop", "spam"):
        made = [detector(machine_text(machine, ("test", n))) for n in range(20)]
        assert auroc(scores, made) > 0.97
        assert np.mean([score >= 0.5 for score in made]) > 0.8


def test_an_unseen_crude_machine_is_found_beside_its_human_twins_and_a_shuffled_story_hardly():
    lm = _language_model(4, 104, 3000)
    human = [d.text for d in documents(CorpusConfig(seed=43), n_documents=400) if d.kind != "arithmetic"]
    made = {
        name: [machine_text(name, n) for n in range(60)]
        for name in ("loop", "markov", "ocr", "salad", "shuffle")
    }
    twins = {name: [human_like(text, 0) for text in texts] for name, texts in made.items()}
    others = ("loop", "markov", "ocr")
    detector = train_detector(
        human + [t for name in others for t in twins[name]], [t for name in others for t in made[name]], lm
    )
    found = {
        name: auroc([detector.logit(t) for t in twins[name]], [detector.logit(t) for t in made[name]])
        for name in ("salad", "shuffle")
    }
    assert found["salad"] > 0.9
    assert found["shuffle"] < 0.9
    assert np.mean([detector(t) >= 0.5 for name in made for t in twins[name]]) < 0.05


def test_the_detector_does_not_accuse_the_form_of_a_single_paragraph():
    detector = machine_detector()
    stories = [d.text for d in documents(CorpusConfig(seed=45), n_documents=400) if d.kind == "stories"]
    assert np.mean([detector(text.split("\n")[0]) >= 0.5 for text in stories]) < 0.05


@pytest.mark.parametrize("machine", MACHINES)
def test_a_human_twin_has_the_script_the_lines_and_the_length_and_is_genuine(machine):
    for number in range(15):
        text = machine_text(machine, ("twin", number))
        twin = human_like(text, 0)
        assert twin == human_like(text, 0) != text
        assert has_han(twin) == has_han(text)
        assert abs(twin.count("\n") - text.count("\n")) <= 1
        if "\n" not in text:
            assert len(units(twin)) == pytest.approx(len(units(text)), rel=0.16)
            assert "\n" not in twin


def test_machines_are_deterministic_and_unknown_ones_named():
    for machine in MACHINES:
        assert machine_text(machine, 1) == machine_text(machine, 1) != machine_text(machine, 2)
    with pytest.raises(ValueError, match="machine='hal' is unknown; choose one of salad"):
        machine_text("hal", 1)
    assert MachineText()(Document("12+30=42\n" * 40)).text.startswith("12+30"), "sums are not judged"


def test_auroc_wants_both_kinds():
    with pytest.raises(ValueError, match="0 negatives and 1 positives"):
        auroc([], [1.0])


def test_an_interval_holds_the_shares_that_could_have_given_the_count():
    for hits, n in ((0, 50), (1, 7), (25, 50), (50, 50), (3, 1000)):
        low, high = share_interval(hits, n)
        assert 0 <= low <= hits / n <= high <= 1
        for end in (low, high):
            if 0 < end < 1:
                assert abs(hits / n - end) == pytest.approx(1.96 * (end * (1 - end) / n) ** 0.5)
    with pytest.raises(ValueError, match="hits=8 must be between 0 and n=7"):
        share_interval(8, 7)
