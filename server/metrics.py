"""What the gateway counts, joined with the engine's own metrics into one scrape."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ard_serve.artifact import Manifest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_GAP_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 15, 60)


class Metrics:
    """Low in cardinality: labels are key names from the file, our own routes, and a handful of outcomes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "ard_requests", "Requests by key, route and outcome.", ("key", "route", "outcome"), registry=registry
        )
        self.ttft = Histogram(
            "ard_ttft_seconds", "Time to the first event, queue included.", ("lane",), buckets=_SECONDS, registry=registry
        )
        self.gap = Histogram(
            "ard_event_gap_seconds", "Time between events of a stream.", buckets=_GAP_SECONDS, registry=registry
        )
        self.queue_wait = Histogram(
            "ard_queue_wait_seconds", "Wait for KV memory.", ("lane",), buckets=_SECONDS, registry=registry
        )
        self.kv_token_seconds = Counter(
            "ard_kv_token_seconds", "KV tokens reserved x seconds held.", ("key",), registry=registry
        )
        self.in_flight = Gauge("ard_requests_in_flight", "Requests between admission and their end.", registry=registry)
        self.waiting = Gauge("ard_queue_length", "Requests waiting for KV memory.", ("lane",), registry=registry)
        self.reserved = Gauge("ard_kv_reserved_tokens", "KV tokens reserved.", registry=registry)
        self.capacity = Gauge("ard_kv_capacity_tokens", "KV tokens of the engine.", registry=registry)
        self.long_prefills = Gauge("ard_long_prefills", "Long prompts being read.", registry=registry)
        self.ready = Gauge("ard_ready", "1 when the last canary was answered.", registry=registry)
        self.restarts = Counter("ard_engine_restarts", "Engine restarts.", registry=registry)
        self.non_finite = Gauge("ard_engine_non_finite", "1 when the engine has produced non-finite logits.", registry=registry)
        self.engine_up = Gauge("ard_engine_scrape_up", "1 when the engine's own metrics are in this scrape.", registry=registry)
        self.model = Gauge(
            "ard_model_info", "Provenance of the served model.", ("model", "recipe", "base", "served_limit"), registry=registry
        )

    def describe(self, model: str, manifest: Manifest | None, measured_limit: int | None) -> None:
        """Say what is served: the name clients use, how it was made, and the longest measured length in tokens."""
        recipe, base = (manifest.recipe.name, manifest.base.name) if manifest else ("", "")
        self.model.labels(model, recipe, base, measured_limit or "").set(1)

    def render(self, engine_text: str | None) -> bytes:
        """Prometheus text of ours and, where it could be had, the engine's."""
        self.engine_up.set(engine_text is not None)
        return generate_latest(self.registry) + (engine_text or "").encode()


def engine_sample(text: str, name: str) -> list[tuple[dict[str, str], float]]:
    """Samples called `name` in Prometheus text: labels and value."""
    families = text_string_to_metric_families(text)
    return [(sample.labels, sample.value) for family in families for sample in family.samples if sample.name == name]
