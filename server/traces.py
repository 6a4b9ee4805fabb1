"""OpenTelemetry, if configured: one span for each generation, joined to its client's trace and carried on to the engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ard_serve.errors import UsageError

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_EXPORT_TIMEOUT_S = 1  # a collector that is away must not hold up the end of the server


@dataclass(frozen=True)
class Trace:
    """A request's span, and the headers that tell the engine of it."""

    span: "Span"
    headers: dict[str, str]

    def end(self, fields: Mapping[str, Any]) -> None:
        """Close the span with what the access log says of the request: no prompt, no answer, no key."""
        self.span.set_attributes({f"ard.{name}": value for name, value in fields.items() if value is not None})
        self.span.end()


class Traces:
    """Sends spans to an OTLP endpoint over HTTP, such as `http://collector:4318/v1/traces`, in the background.

    Raises:
        UsageError: OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise UsageError("--traces: OpenTelemetry is not installed; run: pip install 'ard-serve[otel]'") from None
        self._propagator = TraceContextTextMapPropagator()
        self._provider = TracerProvider(resource=Resource.create({"service.name": "ard-serve"}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=_EXPORT_TIMEOUT_S)))
        self._tracer = self._provider.get_tracer("server")

    def begin(self, name: str, headers: Mapping[str, str]) -> Trace:
        """Open a span below the one that the client's headers name, if any."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        span = self._tracer.start_span(name, context=self._propagator.extract(headers), kind=SpanKind.SERVER)
        onward: dict[str, str] = {}
        self._propagator.inject(onward, context=set_span_in_context(span))
        return Trace(span, onward)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
