"""What a program tells Prometheus of itself.

Each program has one registry, its Service's, which the runtime shows on the system port (DYN_SYSTEM_PORT) beside what
it counts of endpoints. The frontend shows its own on its HTTP port too. Names are Dynamo's where it has one, and begin
with `pipeline_` where it has none.
"""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import generate_latest

PHASE = "aggregated"  # Dynamo's name for workers that do both, prefill and decode
WORKER_TYPE = "decode"  # and for their type


def registry() -> CollectorRegistry:
    """One that has what the operating system knows of this process: CPU, memory, file descriptors."""
    # When each series was made would be a third of all lines, and nobody asks for it.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    made = CollectorRegistry()
    ProcessCollector(registry=made)
    return made


def text(registry: CollectorRegistry) -> str:
    """All its metrics, as Prometheus reads them. Safe in any thread: the runtime calls it in one of its own."""
    return generate_latest(registry).decode()


def log_buckets(least: float, most: float, count: int) -> Sequence[float]:
    """0, and limits that grow by a factor up to `most`, to two digits, as `generate_log_buckets` in Dynamo."""
    factor = (most / least) ** (1 / (count - 1))
    return [0.0] + [float(f"{least * factor**step:.1e}") for step in range(1, count)]


def exponential_buckets(least: float, factor: float, count: int) -> Sequence[float]:
    """Limits that grow by a factor, as Dynamo has them from Prometheus' own library."""
    return [least * factor**step for step in range(count)]
