"""What the gateway counts, joined with the engine's own metrics into one scrape."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from ard_serve.artifact import Manifest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_GAP_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 15, 60)


class Metrics:
    """Low in cardinality: labels are key names from the file, our own routes, and a handful of outcomes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry, engine = self.registry, ("engine",)
        self.requests = Counter(
            "ard_requests", "Requests by key, route and outcome.", ("key", "route", "profile", "outcome"), registry=registry
        )
        self.ttft = Histogram(
            "ard_ttft_seconds",
            "Time to the first event, queue included.",
            ("profile", "lane"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.gap = Histogram(
            "ard_event_gap_seconds", "Time between events of a stream.", buckets=_GAP_SECONDS, registry=registry
        )
        self.queue_wait = Histogram(
            "ard_queue_wait_seconds", "Wait for room.", ("profile", "lane"), buckets=_SECONDS, registry=registry
        )
        self.kv_token_seconds = Counter(
            "ard_kv_token_seconds", "KV tokens reserved x seconds held.", ("key",), registry=registry
        )
        self.in_flight = Gauge("ard_requests_in_flight", "Requests between admission and their end.", registry=registry)
        self.waiting = Gauge("ard_queue_length", "Requests waiting for room.", ("profile", "lane"), registry=registry)
        self.reserved = Gauge("ard_kv_reserved_tokens", "KV tokens reserved.", engine, registry=registry)
        self.capacity = Gauge("ard_kv_capacity_tokens", "KV tokens of the engine.", engine, registry=registry)
        self.reserved_seats = Gauge("ard_seats_reserved", "Seats reserved, one a sequence.", engine, registry=registry)
        self.seats = Gauge("ard_seats", "Sequences that the engine computes at once, where known.", engine, registry=registry)
        self.long_prefills = Gauge("ard_long_prefills", "Long prompts being read.", engine, registry=registry)
        self.ready = Gauge("ard_ready", "1 when the last canary was answered.", engine, registry=registry)
        self.restarts = Counter("ard_engine_restarts", "Engine restarts.", engine, registry=registry)
        self.non_finite = Gauge(
            "ard_engine_non_finite", "1 when the engine has produced non-finite logits.", engine, registry=registry
        )
        self.engine_up = Gauge(
            "ard_engine_scrape_up", "1 when the engine's own metrics are in this scrape.", engine, registry=registry
        )
        self.model = Gauge(
            "ard_model_info", "Provenance of the served model.", ("model", "recipe", "base", "served_limit"), registry=registry
        )

    def describe(self, model: str, manifest: Manifest | None, measured_limit: int | None) -> None:
        """Say what is served: the name clients use, how it was made, and the longest measured length in tokens."""
        recipe, base = (manifest.recipe.name, manifest.base.name) if manifest else ("", "")
        self.model.labels(model, recipe, base, measured_limit or "").set(1)

    def know(self, engine: str) -> None:
        """Show an engine's counts from the start, before anything has been counted."""
        for metric in (self.ready, self.restarts, self.non_finite, self.reserved, self.capacity, self.long_prefills):
            metric.labels(engine)

    def render(self, engine_texts: Mapping[str, str | None]) -> bytes:
        """Prometheus text of ours and, where they could be had, the engines' own: of several, each sample with its engine."""
        for engine, text in engine_texts.items():
            self.engine_up.labels(engine).set(text is not None)
        given = {engine: text for engine, text in engine_texts.items() if text}
        if len(engine_texts) == 1:
            return generate_latest(self.registry) + "".join(given.values()).encode()
        joined = CollectorRegistry()
        joined.register(_Joined(given))
        return generate_latest(self.registry) + generate_latest(joined)


class _Joined(Collector):
    """The metrics of several engines as one set: each family once, each sample labelled with its engine."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for engine, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                joined = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    labels = {**sample.labels, "ard_engine": engine}
                    joined.add_sample(sample.name, labels, sample.value)
        return families.values()


def engine_sample(text: str, name: str) -> list[tuple[dict[str, str], float]]:
    """Samples called `name` in Prometheus text: labels and value."""
    families = text_string_to_metric_families(text)
    return [(sample.labels, sample.value) for family in families for sample in family.samples if sample.name == name]
