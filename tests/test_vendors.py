import json
import pickle
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from step_laws import ANY_TEXT, is_a_step, keeps_its_pace, survives, with_defect

from minillm.base.errors import MissingPackage
from minillm.corpus import Document
from minillm.detect import FEATURES, MachineText, machine_features
from minillm.extract import ExtractText
from minillm.filter import Language
from minillm.harm import RedactPII, Toxicity, span_scores
from minillm.vendors.perspective import PerspectiveClient, PerspectiveError
from minillm.vendors.presidio import PresidioFinder
from minillm.vendors.text import (
    HuggingFaceDetector,
    HuggingFaceScorer,
    extract_justext,
    extract_trafilatura,
    identify_py3langid,
    profanity_score,
)

STEPS = [
    ExtractText(extract=extract_trafilatura),
    ExtractText(extract=extract_justext),
    Language(identify=identify_py3langid),
    RedactPII(find=PresidioFinder()),
]
IDS = ["trafilatura", "justext", "py3langid", "presidio"]


@pytest.mark.parametrize("step", STEPS, ids=IDS)
def test_a_step_is_a_step_can_be_pickled_and_has_nothing_to_add_to_its_own_output(step):
    is_a_step(step)


@settings(max_examples=25, deadline=None)
@given(ANY_TEXT)
def test_no_step_fails_on_any_text_once_it_is_well_formed(text):
    survives([STEPS[0], *STEPS[2:]], text)  # jusText fails on some texts by itself


def test_time_with_presidio_grows_no_faster_than_hostile_text():
    keeps_its_pace(STEPS[3])


def test_a_hugging_face_model_takes_the_place_of_ours():
    from transformers import GPT2Config, GPT2LMHeadModel

    class Letters:
        def __call__(self, text, return_tensors, truncation, max_length):
            return {"input_ids": torch.tensor([[ord(c) % 50 for c in text][:max_length]])}

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    scorer = HuggingFaceScorer(model, Letters(), max_tokens=32)
    scores = scorer("a story of a lamp")
    ids = torch.tensor([[ord(c) % 50 for c in "a story of a lamp"]])
    with torch.no_grad():
        log_probs = model(ids).logits.log_softmax(-1)[0]
    for place in range(16):
        truth = log_probs[place, ids[0, place + 1]]
        assert scores.log_probs[place] == pytest.approx(float(truth), abs=1e-4)
        assert scores.ranks[place] == int((log_probs[place] > truth).sum())
    assert len(scorer("x").ranks) == 0
    assert machine_features("a story of a lamp", scorer).shape == (len(FEATURES),)
    assert not machine_features("x", scorer).any()


def test_a_hugging_face_classifier_is_a_detector():
    from transformers import BatchEncoding, BertConfig, BertForSequenceClassification

    def letters(text, return_tensors, truncation, max_length):
        return BatchEncoding({"input_ids": torch.tensor([[ord(c) % 50 for c in text][:max_length]])})

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = BertForSequenceClassification(config)
    no, yes = (HuggingFaceDetector(model, letters, label=label)("a story of a lamp") for label in (0, 1))
    assert no + yes == pytest.approx(1, abs=1e-5)
    assert 0 < yes < 1
    step = MachineText(model=HuggingFaceDetector(model, letters), threshold=0.0, min_words=1)
    assert step(Document("a story of a lamp")).reason == "machine_text"


def test_presidio_alone_stumbles_over_chinese_and_with_our_rules_does_not():
    documents = with_defect("pii")
    truth = [d.meta["spans"] for d in documents]
    alone, ours = (PresidioFinder(own=own) for own in (False, True))
    assert span_scores([alone(d.text) for d in documents], truth)[1] < 0.8
    assert span_scores([ours(d.text) for d in documents], truth) == (1, 1)
    assert pickle.loads(pickle.dumps(ours))(documents[0].text) == ours(documents[0].text)


def test_profanity_check_behind_the_same_interface():
    assert profanity_score("You are a stupid idiot.") > 0.7
    assert profanity_score("The lamp stood in the window.") < 0.3
    assert profanity_score("") == 0
    assert Toxicity(scorer=profanity_score)(Document("A fine day. You stupid idiot!")).reason == "toxic"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    with pytest.raises(
        MissingPackage, match=r"this needs profanity_check: run pip install 'minillm\[clean\]'"
    ):
        profanity_score("x")


class Perspective(BaseHTTPRequestHandler):
    """Answers from the list `plan` of (status, body, headers, delay_s), then with scores by the word "bad"."""

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.seen.append((time.monotonic(), parse_qs(urlparse(self.path).query), request))
        score = 0.9 if "bad" in request["comment"]["text"] else 0.1
        (name,) = request["requestedAttributes"]
        good = {
            "attributeScores": {name: {"summaryScore": {"value": score, "type": "PROBABILITY"}}},
            "languages": ["en"],
        }
        status, body, headers, delay_s = server.plan.pop(0) if server.plan else (200, None, {}, 0)
        time.sleep(delay_s)
        data = json.dumps(good).encode() if body is None else body
        if status == 0:
            self.connection.close()
            return
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def service():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Perspective)
    server.plan, server.seen, server.handle_error = [], [], lambda *_: None
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def client(service, **options):
    options = {"queries_per_second": 1000.0, "backoff_s": 0.01, "timeout_s": 5.0, **options}
    return PerspectiveClient(
        "s3cret", url=f"http://127.0.0.1:{service.server_port}/v1alpha1/comments:analyze", **options
    )


def refusal(status, message, **headers):
    return status, json.dumps({"error": {"code": status, "message": message}}).encode(), headers, 0


def test_perspective_sends_what_the_protocol_asks_and_reads_the_score(service):
    scorer = client(service, attribute="INSULT")
    assert scorer("a bad word 坏") == 0.9
    ((_, query, request),) = service.seen
    assert query == {"key": ["s3cret"]}
    assert request == {
        "comment": {"text": "a bad word 坏"},
        "requestedAttributes": {"INSULT": {}},
        "doNotStore": True,
    }
    assert Toxicity(scorer=scorer)(Document("fine")).text == "fine"
    assert Toxicity(scorer=scorer)(Document("bad")).reason == "toxic"
    assert "s3cret" not in repr(scorer)


@pytest.mark.parametrize(
    "trouble",
    [
        refusal(429, "quota"),
        refusal(500, "oops"),
        refusal(503, "busy"),
        (0, b"", {}, 0),
        (200, b"<html>", {}, 0),
        (200, b'{"a": 1}', {}, 0),
    ],
    ids=["429", "500", "503", "closed", "not json", "no score"],
)
def test_perspective_tries_again_after_passing_trouble(service, trouble):
    service.plan = [trouble, trouble]
    assert client(service)("bad") == 0.9
    assert len(service.seen) == 3


def test_perspective_waits_twice_as_long_each_time_and_as_long_as_it_is_told(service):
    service.plan = [refusal(500, "x"), refusal(500, "x"), refusal(500, "x")]
    client(service, backoff_s=0.1)("good")
    gaps = np.diff([when for when, _, _ in service.seen])
    assert gaps[0] >= 0.1
    assert gaps[1] >= 0.2
    assert gaps[2] >= 0.4
    service.seen.clear()
    service.plan = [refusal(429, "x", **{"Retry-After": "1"})]
    client(service)("good")
    assert np.diff([when for when, _, _ in service.seen])[0] >= 1


def test_perspective_gives_up_with_the_reason_and_without_the_key(service):
    service.plan = [refusal(429, "quota of key s3cret exceeded")] * 3
    with pytest.raises(
        PerspectiveError,
        match=r"no answer after 3 tries, the last one: HTTP 429: quota of key \*\*\*",
    ):
        client(service, retries=2)("bad")
    assert len(service.seen) == 3


def test_perspective_does_not_repeat_what_cannot_succeed(service):
    service.plan = [refusal(400, "API key not valid: s3cret")]
    with pytest.raises(
        PerspectiveError, match=r"HTTP 400: API key not valid: \*\*\*; check the key"
    ) as caught:
        client(service)("bad")
    assert "s3cret" not in str(caught.value)
    assert len(service.seen) == 1


def test_perspective_does_not_wait_for_a_slow_server(service):
    service.plan = [(200, None, {}, 30.0), (200, None, {}, 30.0)]
    start = time.monotonic()
    with pytest.raises(PerspectiveError, match="after 2 tries.*(?i:time)"):
        client(service, timeout_s=0.2, retries=1)("bad")
    assert time.monotonic() - start < 15


def test_perspective_names_a_server_that_is_not_there():
    scorer = PerspectiveClient(
        "key", url="http://127.0.0.1:9", retries=1, backoff_s=0.01, queries_per_second=1000.0
    )
    with pytest.raises(PerspectiveError, match="no answer after 2 tries, the last one: URLError"):
        scorer("bad")


def test_perspective_keeps_to_its_quota(service):
    scorer = client(service, queries_per_second=20.0)
    for _ in range(5):
        scorer("good")
    times = [when for when, _, _ in service.seen]
    assert times[-1] - times[0] >= 4 / 20 - 0.02


def test_perspective_asks_about_long_text_in_pieces_and_the_worst_counts(service):
    text = "good 好 " * 20 + "bad"
    assert client(service, max_bytes=64)(text) == 0.9
    sent = [request["comment"]["text"] for _, _, request in service.seen]
    assert len(sent) == -(-len(text.encode()) // 64)
    assert all(len(piece.encode()) <= 64 for piece in sent)
    assert client(service)("   ") == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [({"key": " "}, "a key"), ({"key": "k", "queries_per_second": 0.0}, "queries_per_second=0")],
)
def test_perspective_checks_its_arguments(options, named):
    with pytest.raises(ValueError, match=named):
        PerspectiveClient(**options)


def test_a_score_outside_its_range_is_refused(service):
    service.plan = [
        (200, json.dumps({"attributeScores": {"TOXICITY": {"summaryScore": {"value": 7}}}}).encode(), {}, 0)
    ]
    with pytest.raises(PerspectiveError, match="score 7.0 is not between 0 and 1"):
        client(service)("x")
