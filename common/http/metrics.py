"""What a frontend tells Prometheus of its requests: GET /metrics, with the names, labels and buckets of Dynamo's.

Dynamo counts tokens as they come; here a request costs a few microseconds at its end, and nothing for a token. So
`output_tokens_total` grows when an answer is over, and `inter_token_latency_seconds` gets one value for a request, the
mean of its tokens.
"""

import time
from collections import Counter as Counts
from collections.abc import Callable, Iterable

from common.errors import Cancelled, Overloaded
from common.http.exchange import Exchange
from common.messages import NAMESPACE
from common.metrics import PHASE, log_buckets, text

from dynamo.prometheus_names import frontend_service, labels, name_prefix, router
from fastapi import APIRouter, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
UNKNOWN = "unknown_model"  # Dynamo's name for all models that nobody serves: clients can make up any number of them
ENDPOINTS = {"/v1/chat/completions": "chat_completions", "/v1/completions": "completions"}

_ERROR_TYPES = {
    200: frontend_service.error_type.NONE,
    404: frontend_service.error_type.NOT_FOUND,
    Cancelled.http_status: frontend_service.error_type.CANCELLED,
    503: frontend_service.error_type.UNAVAILABLE,
}
# As in Dynamo's lib/llm/src/http/service/metrics.rs.
_PROMPT = log_buckets(50, 128_000, 12)
_BUCKETS = {
    frontend_service.REQUEST_DURATION_SECONDS: log_buckets(1, 512, 10),
    frontend_service.TIME_TO_FIRST_TOKEN_SECONDS: log_buckets(0.001, 480, 18),
    frontend_service.INTER_TOKEN_LATENCY_SECONDS: log_buckets(0.001, 80, 20),
    frontend_service.INPUT_SEQUENCE_TOKENS: _PROMPT,
    frontend_service.OUTPUT_SEQUENCE_TOKENS: log_buckets(50, 32_000, 10),
    frontend_service.CACHED_TOKENS: _PROMPT,
}


class FrontendMetrics(Collector):
    """Counts requests as an Observer sees them."""

    def __init__(self, registry: CollectorRegistry, is_served: Callable[[str], bool]) -> None:
        """is_served: whether some processor serves a model of this name."""
        self._registry = registry
        self._is_served = is_served
        self._models: set[str] = set()  # that were served when they were asked for
        self._active: dict[Exchange, None] = {}

        def counter(name: str, says: str, *more: str) -> Counter:
            return Counter(f"{name_prefix.FRONTEND}_{name}", says, (labels.MODEL, *more), registry=registry)

        def histogram(name: str, says: str) -> Histogram:
            full, buckets = f"{name_prefix.FRONTEND}_{name}", _BUCKETS[name]
            return Histogram(full, says, (labels.MODEL,), registry=registry, buckets=buckets)

        self._requests = counter(
            frontend_service.REQUESTS_TOTAL,
            "Requests that are over",
            *("endpoint", "request_type", "status", "error_type"),
        )
        self._cancelled = counter(
            frontend_service.MODEL_CANCELLATION_TOTAL, "Requests whose client went away", "endpoint", "request_type"
        )
        self._rejected = counter(
            frontend_service.MODEL_REJECTION_TOTAL, "Requests that the engines had no room for", "endpoint"
        )
        self._migrations = counter(
            frontend_service.MODEL_MIGRATION_TOTAL,
            "Times that a request moved to another worker, because its own was lost",
            frontend_service.MIGRATION_TYPE_LABEL,
        )
        self._output = counter(frontend_service.OUTPUT_TOKENS_TOTAL, "Tokens of answers that are over")
        self._duration = histogram(frontend_service.REQUEST_DURATION_SECONDS, "Time that a request took")
        self._ttft = histogram(frontend_service.TIME_TO_FIRST_TOKEN_SECONDS, "Time to the first chunk of an answer")
        self._itl = histogram(
            frontend_service.INTER_TOKEN_LATENCY_SECONDS, "Mean time of a request's tokens after the first"
        )
        self._prompt_tokens = histogram(frontend_service.INPUT_SEQUENCE_TOKENS, "Tokens of a prompt")
        self._answer_tokens = histogram(frontend_service.OUTPUT_SEQUENCE_TOKENS, "Tokens of an answer")
        self._cached_tokens = histogram(
            frontend_service.CACHED_TOKENS, "Tokens of a prompt that its worker had cached, by its own account"
        )
        self._disconnected = Gauge(
            f"{name_prefix.FRONTEND}_{frontend_service.DISCONNECTED_CLIENTS}",
            "Clients that went away before their answer was over",
            registry=registry,
        )
        # In Dynamo the router sits in the frontend, so it tells this under the router's name.
        self._reused = Counter(
            f"{name_prefix.COMPONENT}_{router.KV_WORKER_REUSED_TOKENS_TOTAL}",
            "Tokens of prompts that their workers had cached, by their own account",
            (labels.NAMESPACE, labels.COMPONENT, labels.MODEL, "phase"),
            registry=registry,
        )
        self._predicted, self._overestimated, self._underestimated = (
            Counter(f"pipeline_overlap_{name}_tokens_total", says, (labels.MODEL,), registry=registry)
            for name, says in (
                ("predicted", "Tokens that the router took for cached, of prompts whose workers said what they had"),
                ("overestimated", "Those that the worker did not have after all, and had to compute"),
                ("underestimated", "Tokens that the worker had cached besides"),
            )
        )
        registry.register(self)

    def routes(self) -> APIRouter:
        routes = APIRouter()
        routes.add_api_route("/metrics", self.get_metrics, response_class=Response)
        return routes

    async def get_metrics(self) -> Response:
        """What this frontend has counted, for Prometheus."""
        return Response(text(self._registry), headers={"content-type": CONTENT_TYPE})

    def collect(self) -> Iterable[Metric]:
        """How many requests there are now, counted when somebody asks."""
        active, queued = Counts(dict.fromkeys(list(self._models), 0)), Counts[str]()
        for exchange in list(self._active):  # a copy: this runs in a thread of the runtime
            request = exchange.completion_request
            model = request.model if request and request.model in self._models else UNKNOWN
            active[model] += 1
            queued[model] += exchange.first is None
        for name, says, counts in (
            (frontend_service.ACTIVE_REQUESTS, "Requests in progress", active),
            (frontend_service.INFLIGHT_REQUESTS, "Requests in progress, by their older name", active),
            (frontend_service.QUEUED_REQUESTS, "Requests that wait for the first chunk of their answer", queued),
        ):
            family = GaugeMetricFamily(f"{name_prefix.FRONTEND}_{name}", says, labels=[labels.MODEL])
            for model in active:
                family.add_metric([model], counts[model])
            yield family

    def on_start(self, exchange: Exchange) -> None:
        self._active[exchange] = None
        self._model(exchange)

    def on_first(self, exchange: Exchange) -> None:
        self._model(exchange)

    def on_end(self, exchange: Exchange) -> None:
        self._active.pop(exchange, None)
        if not (endpoint := ENDPOINTS.get(exchange.path)):
            return
        model, now = self._model(exchange), time.perf_counter()
        self._count(exchange, model, endpoint)
        self._duration.labels(model).observe(now - exchange.began)
        if exchange.first is not None:
            self._ttft.labels(model).observe(exchange.first - exchange.began)
        if exchange.usage:
            self._note_usage(exchange, model, now)

    def _count(self, exchange: Exchange, model: str, endpoint: str) -> None:
        request, status, routing = exchange.completion_request, exchange.status, exchange.routing
        kinds, outcomes = frontend_service.request_type, frontend_service.status
        kind = kinds.STREAM if request and request.stream else kinds.UNARY
        outcome = outcomes.SUCCESS if status == 200 else outcomes.ERROR
        self._requests.labels(model, endpoint, kind, outcome, error_type(status, exchange.error)).inc()
        if isinstance(exchange.error, Overloaded):
            self._rejected.labels(model, endpoint).inc()
        if status == Cancelled.http_status:
            self._cancelled.labels(model, endpoint, kind).inc()
            self._disconnected.inc()
        if routing and routing.migrations:
            self._migrations.labels(model, frontend_service.migration_type.ONGOING_REQUEST).inc(routing.migrations)

    def _note_usage(self, exchange: Exchange, model: str, now: float) -> None:
        request, usage = exchange.completion_request, exchange.usage
        assert request and usage
        self._prompt_tokens.labels(model).observe(usage.prompt_tokens)
        self._answer_tokens.labels(model).observe(usage.completion_tokens)
        self._output.labels(model).inc(usage.completion_tokens)
        steps = usage.completion_tokens / request.answers - 1  # answers to one prompt are made side by side
        if steps > 0 and exchange.first is not None:
            self._itl.labels(model).observe((now - exchange.first) / steps)
        details = usage.prompt_tokens_details
        if details and details.cached_tokens is not None:
            self._cached_tokens.labels(model).observe(details.cached_tokens)
            self._reused.labels(NAMESPACE, "frontend", model, PHASE).inc(details.cached_tokens)
            self._compare(exchange, model, details.cached_tokens)

    def _compare(self, exchange: Exchange, model: str, reused: int) -> None:
        """What the router expected beside what was true; not if several workers had a part in the answer."""
        routing = exchange.routing
        if routing and routing.overlap_tokens is not None and not routing.migrations:
            self._predicted.labels(model).inc(routing.overlap_tokens)
            self._overestimated.labels(model).inc(max(routing.overlap_tokens - reused, 0))
            self._underestimated.labels(model).inc(max(reused - routing.overlap_tokens, 0))

    def _model(self, exchange: Exchange) -> str:
        """What a request is counted under."""
        request = exchange.completion_request
        if request and request.model not in self._models and self._is_served(request.model):
            self._models.add(request.model)
        return request.model if request and request.model in self._models else UNKNOWN


def error_type(status: int, error: BaseException | None = None) -> str:
    """What Dynamo calls the kind of error that an HTTP status stands for; that of being overloaded is an option."""
    if isinstance(error, Overloaded):
        return frontend_service.error_type.OVERLOAD
    other = frontend_service.error_type.VALIDATION if status < 500 else frontend_service.error_type.INTERNAL
    return _ERROR_TYPES.get(status, other)
