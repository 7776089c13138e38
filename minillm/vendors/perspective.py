"""Toxicity by the Perspective API."""

import json
import threading
import time

from minillm.base.errors import MiniLLMError


class PerspectiveError(MiniLLMError):
    """Perspective API did not answer, or refused; the message says why and what to do."""


def _reason(body: bytes, key: str) -> str:
    """What an answer with an error says, without the key."""
    try:
        said = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = body[:200].decode("utf-8", "replace")
    return said.replace(key, "***")


_TURN = threading.Lock()


class PerspectiveClient:
    """Google's Perspective API as a scorer: text to the probability of an attribute. Chapter 05.

    Waits its turn (`queries_per_second`), tries again after 429, 5xx, a timeout or a broken connection with doubling waits, or
    as long as the server asks. A longer text is asked about in pieces, and its worst piece counts.

    Google has announced that the service ends after 2026.

    Args:
        key: the API key. It is sent to the server and appears in no message.
        attribute: TOXICITY, SEVERE_TOXICITY, INSULT, THREAT …
        queries_per_second: the quota of the key; 1 is what a new key has.
        retries: tries after the first.
        backoff_s: first wait; each next one is twice as long, up to a minute.
        max_bytes: the most the service reads at a time.
        url: where it is.

    Source: https://developers.perspectiveapi.com/s/about-the-api-methods
    """

    def __init__(
        self,
        key: str,
        *,
        attribute: str = "TOXICITY",
        queries_per_second: float = 1.0,
        timeout_s: float = 10.0,
        retries: int = 5,
        backoff_s: float = 1.0,
        max_bytes: int = 20_480,
        url: str = "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze",
    ) -> None:
        if not key.strip() or queries_per_second <= 0 or retries < 0 or max_bytes < 16:
            raise ValueError(
                f"a key, queries_per_second={queries_per_second} above 0, retries={retries} of at least 0 and "
                f"max_bytes={max_bytes} of at least 16 are needed"
            )
        self.key, self.attribute, self.url, self.max_bytes = key, attribute, url, max_bytes
        self.queries_per_second, self.timeout_s = queries_per_second, timeout_s
        self.retries, self.backoff_s = retries, backoff_s
        self.next_turn = 0.0

    def __repr__(self) -> str:
        return f"PerspectiveClient({self.attribute}, {self.queries_per_second:g} queries/s)"

    def wait_for_turn(self) -> None:
        """Sleep until the quota allows the next query."""
        with _TURN:
            now = time.monotonic()
            turn = max(now, self.next_turn)
            self.next_turn = turn + 1 / self.queries_per_second
        time.sleep(turn - now)

    def ask(self, text: str) -> float:
        """The score of one piece of text, after as many tries as it takes."""
        problem = ""
        for attempt in range(self.retries + 1):
            self.wait_for_turn()
            try:
                return self.parse(self.post(text))
            except _Retry as retry:
                problem = str(retry)
                if attempt < self.retries:
                    time.sleep(max(retry.after_s, min(60.0, self.backoff_s * 2**attempt)))
        raise PerspectiveError(
            f"no answer after {self.retries + 1} tries, the last one: {problem}; lower queries_per_second or raise retries"
        )

    def post(self, text: str) -> bytes:
        """Send one query; the body of the answer."""
        import http.client
        import urllib.error
        import urllib.parse
        import urllib.request

        body = {"comment": {"text": text}, "requestedAttributes": {self.attribute: {}}, "doNotStore": True}
        request = urllib.request.Request(
            f"{self.url}?{urllib.parse.urlencode({'key': self.key})}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            shown = f"HTTP {error.code}: {_reason(error.read(), self.key)}"
            if error.code == 429 or error.code >= 500:
                after = error.headers.get("Retry-After", "")
                raise _Retry(shown, float(after) if after.isdigit() else 0.0) from None
            raise PerspectiveError(
                f"{shown}; check the key, the attribute {self.attribute} and the text"
            ) from None
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            raise _Retry(f"{type(error).__name__}: {getattr(error, 'reason', error)}") from None

    def parse(self, body: bytes) -> float:
        """The score in an answer."""
        try:
            value = json.loads(body)["attributeScores"][self.attribute]["summaryScore"]["value"]
            score = float(value)
        except (ValueError, KeyError, TypeError):
            raise _Retry(f"not an answer of this service: {_reason(body, self.key)!r}") from None
        if not 0 <= score <= 1:
            raise PerspectiveError(f"score {score} is not between 0 and 1: is {self.url} the right service?")
        return score

    def __call__(self, text: str) -> float:
        data = text.encode("utf-8", "replace")
        pieces = [
            data[i : i + self.max_bytes].decode("utf-8", "ignore")
            for i in range(0, len(data), self.max_bytes)
        ]
        return max((self.ask(piece) for piece in pieces if piece.strip()), default=0.0)


class _Retry(Exception):
    def __init__(self, message: str, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.after_s = after_s
