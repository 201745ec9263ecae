"""What a router tells Prometheus of its decisions and of the workers, with Dynamo's names, labels and buckets.

A decision costs some microseconds; what is known of the workers costs nothing until somebody asks.
"""

import time
from collections.abc import Collection, Iterable, Sequence, Sized
from functools import cache, partial

from common.messages import NAMESPACE
from common.metrics import PHASE, WORKER_TYPE, exponential_buckets, log_buckets
from common.routing.fleet import Fleet
from common.routing.policy import Candidate
from common.routing.worker import Worker

from dynamo.prometheus_names import (
    component_names,
    frontend_service,
    kvrouter,
    labels,
    name_prefix,
    router,
    routing_overhead,
)
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_WORKER = ("worker", labels.WORKER_ID)  # its name, and the instance id: a restarted one meets its own predecessor
_HIT_RATES = [step * 0.05 for step in range(21)]


class RouterMetrics:
    """Counts what find_worker decides."""

    def __init__(
        self, registry: CollectorRegistry, fleet: Fleet, router_id: str, queues: Collection[Sized] = ()
    ) -> None:
        """router_id: the instance id of this router; queues: those in which prompts wait."""
        self._own = (NAMESPACE, component_names.ROUTER, router_id)
        self._of_model = cache(self._labelled)  # to look for them takes half of all the time
        own = (labels.NAMESPACE, labels.COMPONENT, labels.ROUTER_ID)

        def counter(name: str, says: str, *more: str) -> Counter:
            return Counter(f"{name_prefix.COMPONENT}_{name}", says, (*own, *more), registry=registry)

        def histogram(name: str, says: str, buckets: Sequence[float], *more: str) -> Histogram:
            full = f"{name_prefix.COMPONENT}_{name}"
            return Histogram(full, says, (*own, *more), registry=registry, buckets=buckets)

        self._started = counter(router.REQUESTS_STARTED_TOTAL, "Questions for a worker").labels(*self._own)
        self._requests = counter(router.REQUESTS_TOTAL, "Decisions").labels(*self._own)
        self._hit_rate = histogram(
            router.KV_HIT_RATE, "Part of a prompt that its worker has cached, by this router's index", _HIT_RATES
        ).labels(*self._own)
        self._tokens = histogram(
            router.INPUT_SEQUENCE_TOKENS, "Tokens of a prompt", log_buckets(50, 128_000, 12), labels.MODEL, "phase"
        )
        self._best = counter(
            router.KV_BEST_ELIGIBLE_CACHED_PREFIX_TOKENS_TOTAL,
            "Tokens of prompts that the worker has cached which has most of them",
            *(labels.MODEL, "phase"),
        )
        self._selected = counter(
            router.KV_SELECTED_CACHED_PREFIX_TOKENS_TOTAL,
            "Tokens of prompts that the chosen worker has cached",
            *(labels.MODEL, "phase"),
        )
        self._not_best = counter(
            router.NON_MAX_OVERLAP_SELECTIONS_TOTAL,
            "Decisions for a worker that has less of the prompt cached than another one",
            labels.WORKER_TYPE,
        ).labels(*self._own, WORKER_TYPE)
        self._lost = histogram(
            router.OVERLAP_BLOCKS_LOST,
            "How many blocks less, in those decisions",
            exponential_buckets(0.25, 2, 16),
            labels.WORKER_TYPE,
        ).labels(*self._own, WORKER_TYPE)
        self._overhead = Histogram(
            f"{name_prefix.ROUTER}_{routing_overhead.TOTAL_MS}",
            "Time that a decision takes, in milliseconds",
            (labels.ROUTER_ID,),
            registry=registry,
            buckets=exponential_buckets(0.01, 3, 17),
        ).labels(router_id)
        registry.register(_Workers(fleet))
        pending = f"{name_prefix.FRONTEND}_{frontend_service.ROUTER_QUEUE_PENDING_REQUESTS}"
        gauge = Gauge(pending, "Prompts that wait for a worker", (labels.WORKER_TYPE,), registry=registry)
        gauge.labels(WORKER_TYPE).set_function(lambda: sum(map(len, queues)))

    def on_asked(self) -> float:
        """A question has come. Returns when."""
        self._started.inc()
        return time.perf_counter()

    def on_decided(self, candidates: Sequence[Candidate], chosen: Candidate, began: float) -> None:
        """A worker was chosen among `candidates`. began: what `on_asked` said."""
        model = chosen.request.model
        most = max(candidate.overlap_blocks for candidate in candidates)
        tokens, of_best, of_chosen = self._of_model(model.name)
        self._requests.inc()
        tokens.observe(chosen.request.tokens)
        self._hit_rate.observe(min(chosen.overlap_blocks / max(chosen.prompt.blocks, 1), 1.0))
        of_best.inc(most * model.block_size)
        of_chosen.inc(chosen.overlap_blocks * model.block_size)
        if most > chosen.overlap_blocks:
            self._not_best.inc()
            self._lost.observe(most - chosen.overlap_blocks)
        self._overhead.observe((time.perf_counter() - began) * 1000)

    def _labelled(self, model: str) -> tuple[Histogram, Counter, Counter]:
        """The metrics of a model."""
        labelled = (*self._own, model, PHASE)
        return self._tokens.labels(*labelled), self._best.labels(*labelled), self._selected.labels(*labelled)


class _Workers(Collector):
    """What a router knows of the workers when somebody asks, in a thread of the runtime."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        workers = list(self._fleet.workers.values())  # a copy, for the fleet may change meanwhile
        return [*_as_dynamo(workers), self._events(), *_load(workers), *_caches(workers, self._fleet)]

    def _events(self) -> Metric:
        """KV events that came. A counter, which Dynamo gave a gauge's name."""
        name = f"{name_prefix.COMPONENT}_{kvrouter.KV_CACHE_EVENTS_APPLIED}"
        own = (labels.NAMESPACE, labels.COMPONENT, "event_type", "status")
        family = GaugeMetricFamily(name, "KV events that came, by what became of them", labels=own)
        for (event_type, status), count in list(self._fleet.index.applied.items()):
            family.add_metric((NAMESPACE, component_names.ROUTER, event_type, status), count)
        return family


def _as_dynamo(workers: Sequence[Worker]) -> Iterable[Metric]:
    """The load that decisions count with, under the names that Dynamo's dashboard reads: there it is the frontend's."""
    of_worker = (labels.WORKER_ID, labels.DP_RANK, labels.WORKER_TYPE)
    decode, prefill = (
        GaugeMetricFamily(f"{name_prefix.FRONTEND}_{name}", says, labels=of_worker)
        for name, says in (
            (frontend_service.WORKER_ACTIVE_DECODE_BLOCKS, "KV blocks that requests in progress hold"),
            (frontend_service.WORKER_ACTIVE_PREFILL_TOKENS, "Tokens of prompts that are still to be computed"),
        )
    )
    for worker in workers:
        one = (str(worker.instance_id), "0", WORKER_TYPE)
        decode.add_metric(one, worker.decode_blocks)
        prefill.add_metric(one, worker.prefill_blocks * worker.block_size)
    return decode, prefill


def _load(workers: Sequence[Worker]) -> Iterable[Metric]:
    """Who says what of the load: this router's leases, the worker's own reports, and what decisions make of both."""
    blocks = GaugeMetricFamily(
        "pipeline_worker_load_blocks",
        "KV blocks to compute (prefill) and held (decode), by who says so: leases, reports, or both as decisions count",
        labels=(*_WORKER, "phase", "source"),
    )
    requests = GaugeMetricFamily(
        "pipeline_worker_requests",
        "Requests in progress, by who says so: leases or reports",
        labels=(*_WORKER, "source"),
    )
    age = GaugeMetricFamily("pipeline_worker_report_age_seconds", "Time since a worker's last report", labels=_WORKER)
    for worker in workers:
        one = _labels_of(worker)
        loads = {"leases": worker.leased, "used": (worker.prefill_blocks, worker.decode_blocks)}
        requests.add_metric((*one, "leases"), worker.requests)
        if (report := worker.report) and (reported := worker.reported):
            loads["reports"] = reported
            requests.add_metric((*one, "reports"), report.running_requests + report.waiting_requests)
            age.add_metric(one, time.monotonic() - worker.reported_at)
        for source, (prefill, decode) in loads.items():
            blocks.add_metric((*one, "prefill", source), prefill)
            blocks.add_metric((*one, "decode", source), decode)
    return blocks, requests, age


def _caches(workers: Sequence[Worker], fleet: Fleet) -> Iterable[Metric]:
    """What the workers have cached, and how it came to be known."""
    gauge, counter = partial(GaugeMetricFamily, labels=_WORKER), partial(CounterMetricFamily, labels=_WORKER)
    cached = gauge("pipeline_worker_cached_blocks", "KV blocks in the cache, by its events")
    total = gauge("pipeline_worker_total_blocks", "KV blocks that fit")
    lag = gauge("pipeline_worker_event_lag_seconds", "Time that the last KV event took to come")
    batches = counter("pipeline_worker_event_batches", "Batches of KV events that came")
    lost = counter("pipeline_worker_events_lost", "Times that KV events were lost for good and the cache read again")
    for worker in workers:
        one = _labels_of(worker)
        cached.add_metric(one, fleet.index.blocks(worker.instance_id))
        batches.add_metric(one, worker.events)
        lost.add_metric(one, worker.lost)
        if worker.info:
            total.add_metric(one, worker.info.total_blocks)
        if worker.event_lag is not None:
            lag.add_metric(one, worker.event_lag)
    return cached, total, lag, batches, lost


def _labels_of(worker: Worker) -> tuple[str, str]:
    return worker.name, str(worker.instance_id)
