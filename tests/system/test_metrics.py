"""A real Prometheus asks every part of a running pipeline, and answers what its users would ask it."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from common.engines.ports import free_ports
from common.model import DEFAULT_MODEL
from tests.system.conftest import BIN, Cluster, Pipeline, until
from tests.system.test_launch import Launch
from tests.unit.test_dashboard import QUERIES, plain

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="no prometheus and promtool on the PATH: apt install prometheus",
)

PROMPTS = [f"{number}: what does the router do with {word}?" for number in range(3) for word in ("blocks", "leases")]
# What Dynamo itself names so that promtool finds fault with it.
DYNAMOS_FAULTS = {"dynamo_router_overhead_total_ms"}


class Scraped:
    """A launch with two real engines, and its Prometheus."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        address = re.search(r"Prometheus asks them all: (http://\S+)", launch.text)
        ports = re.search(r"metrics, at http://127.0.0.1:PORT/metrics: (.*)", launch.text)
        assert address and ports
        self._address = address.group(1)
        self.ports = dict(re.findall(r"([a-z]+(?: \d)?) (\d+)", ports.group(1)))

    def query(self, query: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self._address}/api/v1/query", params={"query": query}).json()
        assert answer["status"] == "success", answer
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def value(self, query: str) -> float:
        """That of the one series; 0 if there is none."""
        found = self.query(query)
        assert len(found) <= 1, found
        return float(found[0]["value"][1]) if found else 0.0

    def up(self) -> set[str]:
        return {one["metric"]["part"] for one in self.query("up == 1")}

    def load(self, requests: int = 48) -> None:
        """Send prompts that come again, some of them streamed."""
        with ThreadPoolExecutor(4) as pool:
            for response in pool.map(self._ask, range(requests)):
                assert response.status_code == 200, response.text

    def _ask(self, number: int) -> httpx.Response:
        messages = [{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}]
        body = {"model": "pipeline-chat", "messages": messages, "max_tokens": 12, "stream": number % 2 == 0}
        return httpx.post(f"http://127.0.0.1:{self.launch.port}/v1/chat/completions", json=body, timeout=60)


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    launch = Launch(tmp_path_factory.mktemp("metrics"), "--backend", "sglang", "--prometheus")
    try:
        launch.wait_for("Ctrl-C ends it")
        scraped = Scraped(launch)
        until(lambda: len(scraped.up()) == 5, "a first look at every part")
        scraped.load()
        yield scraped
        launch.signal(signal.SIGINT)
        assert launch.exit_code() == 0
        assert "is killed" not in launch.text
        assert not launch.data.exists()
    finally:
        launch.close()


def test_it_asks_every_part(scraped: Scraped) -> None:
    assert scraped.up() == set(scraped.ports) == {"engine 0", "engine 1", "router", "processor", "frontend"}
    for job in ("engine", "router", "processor", "frontend"):
        assert scraped.value(f'min(process_cpu_seconds_total{{job="{job}"}})') > 0
        assert scraped.value(f'sum(dynamo_component_requests_total{{job="{job}"}})') >= 0


def test_it_knows_rates_and_quantiles(scraped: Scraped) -> None:
    def known(query: str) -> None:
        until(lambda: scraped.value(query) > 0, query)

    scraped.load()
    frontend, router = "dynamo_frontend", "dynamo_component_router"
    known(f'sum(rate({frontend}_requests_total{{model="pipeline-chat", status="success"}}[30s]))')
    known(f"sum(rate({frontend}_output_tokens_total[30s]))")
    known(f"sum(rate({frontend}_input_sequence_tokens_sum[30s]))")
    for quantity in ("time_to_first_token", "inter_token_latency", "request_duration"):
        known(f"histogram_quantile(0.9, sum by (le) (rate({frontend}_{quantity}_seconds_bucket[30s])))")
    known(f"histogram_quantile(0.9, sum by (le) (rate({router}_kv_hit_rate_bucket[30s])))")
    for overlap in ("best_eligible_cached_prefix", "selected_cached_prefix", "worker_reused"):
        known(f"sum(rate({router}_kv_{overlap}_tokens_total[30s]))")
    known('sum(rate(dynamo_component_requests_total{dynamo_endpoint="generate", model="pipeline-chat"}[30s]))')
    known('sum(rate(dynamo_component_kv_cache_events_applied{event_type="stored", status="ok"}[5m]))')
    known("sum(pipeline_worker_cached_blocks)")


def test_what_was_predicted_and_what_was_reused_are_close(scraped: Scraped) -> None:
    """The router reads the very caches that the engines take from."""
    until(lambda: scraped.value("sum(pipeline_overlap_predicted_tokens_total)") > 0, "a prediction")
    # Each in one query, for between two of them Prometheus may look again.
    names = ("predicted", "overestimated", "underestimated")
    predicted, over, under = (f"sum(pipeline_overlap_{name}_tokens_total)" for name in names)
    reused = "sum(dynamo_component_router_kv_worker_reused_tokens_total)"
    assert scraped.value(f"{reused} - ({predicted} - {over} + {under})") == 0
    assert scraped.value(f"({over} + {under}) / {predicted}") < 0.5


def test_the_dashboard_s_queries_find_something(scraped: Scraped) -> None:
    """All but those about what has not happened."""

    def empty() -> list[str]:
        scraped.load()  # rates are of what happened just now
        return [query for query in QUERIES if not scraped.query(plain(query))]

    until(lambda: empty() == [], f"an answer to {empty()}")


def test_a_part_that_was_restarted_is_asked_again(scraped: Scraped) -> None:
    began = scraped.value('process_start_time_seconds{part="router"}')
    scraped.launch.part("router").kill()
    until(lambda: scraped.value('process_start_time_seconds{part="router"}') > began, "the new router")


def test_promtool_finds_no_fault(scraped: Scraped) -> None:
    pages = {part: f"http://127.0.0.1:{port}/metrics" for part, port in scraped.ports.items()}
    pages["frontend's HTTP port"] = f"http://127.0.0.1:{scraped.launch.port}/metrics"
    for part, page in pages.items():
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=httpx.get(page).text, capture_output=True, text=True
        )
        assert {line.split()[0] for line in done.stderr.splitlines()} <= DYNAMOS_FAULTS, f"{part}: {done.stderr}"


# What Dynamo's dashboard (deploy/observability) reads, but for the parts of the router's overhead and the stages of
# requests in the frontend's process, which have no counterpart here.
READ_OF_FRONTENDS = {
    f"dynamo_frontend_{name}"
    for name in (
        *("requests_total", "active_requests", "request_duration_seconds_sum", "time_to_first_token_seconds_bucket"),
        *("inter_token_latency_seconds_count", "input_sequence_tokens_sum", "output_sequence_tokens_bucket"),
        *("output_tokens_total", "cached_tokens_sum", "model_cancellation_total", "disconnected_clients"),
        *("queued_requests", "worker_active_decode_blocks", "worker_active_prefill_tokens"),
    )
}
READ_OF_ROUTERS = {
    "dynamo_component_router_kv_hit_rate_bucket",
    "dynamo_component_router_requests_total",
    "dynamo_component_router_input_sequence_tokens_sum",
    "dynamo_component_router_overlap_blocks_lost_sum",
    "dynamo_component_router_kv_best_eligible_cached_prefix_tokens_total",
    "dynamo_component_router_kv_selected_cached_prefix_tokens_total",
    "dynamo_component_router_kv_worker_reused_tokens_total",
    "dynamo_component_kv_cache_events_applied",
    "dynamo_router_overhead_total_ms_bucket",
}
# Labels that say in which process Dynamo has its router, and that of our reused tokens the router is not known.
OWN_LABELS = {"worker_id", "router_id"}


def labels_of(text: str) -> dict[str, set[str]]:
    """By name, without the end that the reader gives every counter, the labels of the samples on a page."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name.removesuffix("_total"), set()).update(sample.labels)
    return found


def buckets_of(text: str) -> dict[str, set[float]]:
    """By name, the limits of the histograms on a page."""
    return {
        family.name: {float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels}
        for family in text_string_to_metric_families(text)
        if family.type == "histogram"
    }


def test_names_labels_and_buckets_are_those_of_dynamo_s_own_frontend(cluster: Cluster, scraped: Scraped) -> None:
    port = free_ports(1)[0]
    planes = ("--discovery-backend", "etcd", "--request-plane", "nats", "--event-plane", "nats")
    python, env = (sys.executable, "-m"), {"PYTHONPATH": str(BIN.parent / "ai-dynamo")}
    model = ("--model-path", str(DEFAULT_MODEL), "--model-name", Pipeline.model, "--block-size", "16")
    cluster.run("mocker", *python, "dynamo.mocker", *model, *planes, env=env)
    router = ("--router-mode", "kv", "--kv-cache-block-size", "16")
    cluster.run("dynamo", *python, "dynamo.frontend", "--http-port", str(port), *router, *planes, env=env)
    address, body = f"http://127.0.0.1:{port}", {"model": Pipeline.model, "max_tokens": 8}

    def ask(**fields: Any) -> bool:
        question = {**body, "messages": [{"role": "user", "content": "What does the router do? " * 20}], **fields}
        try:
            return httpx.post(f"{address}/v1/chat/completions", json=question, timeout=60).status_code == 200
        except httpx.TransportError:
            return False

    def hang_up(at: str) -> None:
        question = {**body, "messages": [], "stream": True, "max_tokens": 4000, "ignore_eos": True}
        question["messages"] = [{"role": "user", "content": "Tell me more."}]
        with httpx.stream("POST", f"{at}/v1/chat/completions", json=question, timeout=60) as response:
            next(response.iter_lines())

    until(ask, "an answer of Dynamo's frontend")
    assert ask(stream=True) and ask()
    for at in (address, f"http://127.0.0.1:{scraped.launch.port}"):
        hang_up(at)

    def pages() -> tuple[str, str]:
        """Dynamo's, and ours: of frontend and router together."""
        ours = [httpx.get(f"http://127.0.0.1:{scraped.ports[part]}/metrics").text for part in ("frontend", "router")]
        return httpx.get(f"{address}/metrics").text, "".join(ours)

    until(lambda: all("model_cancellation_total{" in page for page in pages()), "the cancellations")
    scraped.load(8)
    dynamo, ours = map(labels_of, pages())
    read = {name.removesuffix("_total") for name in READ_OF_FRONTENDS | READ_OF_ROUTERS}
    assert read - dynamo.keys() == set()
    assert read - ours.keys() == set()
    assert {
        name: dynamo[name] - ours[name] - OWN_LABELS for name in read if dynamo[name] - ours[name] - OWN_LABELS
    } == {}
    theirs, limits = map(buckets_of, pages())
    names = [name for name in limits if name.startswith(("dynamo_frontend_", "dynamo_component_router_"))]
    assert len(names) == 9
    assert {name: theirs[name] for name in names} == {name: limits[name] for name in names}
