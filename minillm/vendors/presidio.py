"""Personal data by Presidio."""

from functools import cached_property
from typing import Any

from minillm.base.optional import optional
from minillm.harm import PII_RULES, PiiRule, Span


def _presidio_parts() -> tuple[Any, Any]:
    """An NLP engine and an e-mail recogniser for presidio that never use the network, as its own two do."""
    with optional("clean"):
        import spacy
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
        from presidio_analyzer.predefined_recognizers import EmailRecognizer
        from spacy.tokenizer import Tokenizer
        from tldextract import TLDExtract
    suffixes = TLDExtract(suffix_list_urls=(), cache_dir=None)

    class BlankEngine(SpacyNlpEngine):
        def __init__(self) -> None:
            super().__init__(models=[{"lang_code": "en", "model_name": "blank"}])
            nlp = spacy.blank("en")
            # Words are only asked for; spaCy's own rules take the square of the time on a long run of signs.
            nlp.tokenizer = Tokenizer(nlp.vocab)
            self.nlp = {"en": nlp}

        def load(self) -> None:
            pass  # the default downloads a model for names and places

    class OfflineEmail(EmailRecognizer):
        def validate_result(self, pattern_text: str) -> bool:
            return bool(suffixes(pattern_text).suffix)  # the default downloads the list of public suffixes

    return BlankEngine(), OfflineEmail()


PRESIDIO_KINDS = {
    "EMAIL_ADDRESS": "email",
    "PHONE_NUMBER": "phone",
    "CREDIT_CARD": "card",
    "IP_ADDRESS": "ip",
    "CN_ID": "id",
}


class PresidioFinder:
    """Presidio: with its own recognisers for e-mail, IP, card and phone, or with `PII_RULES` for the first two and beside the others. Chapter 05.

    Out of the box it downloads a language model and a list of domains; here it does without, and so finds no names.

    Args:
        own: whether to use `PII_RULES`. Without them presidio knows no identity number of China, takes Chinese characters before
            an e-mail address for a part of it, and overlooks an IP address that follows one.
    """

    def __init__(self, own: bool = True) -> None:
        self.own = own

    @cached_property
    def analyzer(self) -> Any:
        with optional("clean"):
            import presidio_analyzer as presidio
            from presidio_analyzer import predefined_recognizers as known
        registry = presidio.RecognizerRegistry(supported_languages=["en"])
        engine, email = _presidio_parts()
        theirs = (
            [known.CreditCardRecognizer()]
            if self.own
            else [email, known.CreditCardRecognizer(), known.IpRecognizer()]
        )
        for recognizer in theirs:
            registry.add_recognizer(recognizer)
        registry.add_recognizer(known.PhoneRecognizer(supported_regions=("US", "CN")))
        if self.own:
            for number, rule in enumerate(PII_RULES):
                registry.add_recognizer(self.recognizer(presidio, rule, f"{rule.kind}_{number}"))
        return presidio.AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=["en"])

    @staticmethod
    def recognizer(presidio: Any, rule: PiiRule, name: str) -> Any:
        """One of our rules as a recogniser of presidio's, with its judge."""
        entity = next(entity for entity, kind in PRESIDIO_KINDS.items() if kind == rule.kind)

        class Own(presidio.PatternRecognizer):
            def validate_result(self, pattern_text: str) -> bool:
                return rule.judge(pattern_text) > 0

        return Own(entity, patterns=[presidio.Pattern(name, rule.pattern.pattern, 0.8)], name=name)

    def __call__(self, text: str) -> list[Span]:
        found = self.analyzer.analyze(
            text, language="en", entities=list(PRESIDIO_KINDS), score_threshold=0.35
        )
        spans: list[Span] = []
        for result in sorted(found, key=lambda r: (-r.score, r.start - r.end)):
            span = Span(result.start, result.end, PRESIDIO_KINDS[result.entity_type], result.score)
            if not any(span.start < other.end and other.start < span.end for other in spans):
                spans.append(span)
        return sorted(spans)

    def __getstate__(self) -> dict[str, Any]:
        return {"own": self.own}
