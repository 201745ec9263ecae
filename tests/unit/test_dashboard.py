"""The dashboard asks for what the programs tell, in queries that Prometheus understands."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from common.http.metrics import FrontendMetrics
from common.metrics import registry
from common.routing.fleet import Fleet
from common.routing.metrics import RouterMetrics
from common.routing.worker import Worker
from scripts.launch import scraping
from tests.unit.stand_ins import worker_info

import pytest
from dynamo.prometheus_names import name_prefix, work_handler

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
DASHBOARD = json.loads((DASHBOARDS / "pipeline.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]

needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool: apt install prometheus")


def told() -> set[str]:
    """The names of all samples that the programs tell Prometheus."""
    made, fleet = registry(), Fleet()
    fleet.add(Worker(1, worker_info(1)))
    FrontendMetrics(made, bool)
    RouterMetrics(made, fleet, "9")
    names = set[str]()
    for family in made.collect():
        ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        names |= {family.name + end for end in ends}
    return names | {f"{name_prefix.COMPONENT}_{work_handler.REQUESTS_TOTAL}"}  # by the runtime


def plain(query: str) -> str:
    """A query as Grafana sends it."""
    for variable, value in (("$__rate_interval", "1m"), ("$model", ".*"), ("$worker", ".*")):
        query = query.replace(variable, value)
    return query


def test_every_metric_that_it_names_exists() -> None:
    assert len(QUERIES) > 30
    names = {name for query in QUERIES for name in re.findall(r"\b(?:dynamo|pipeline|process)_\w+\b(?![,)])", query)}
    assert names - told() == set()


def test_every_metric_of_our_own_is_on_it() -> None:
    ours = {name for name in told() if name.startswith("pipeline_")}
    missing = {name for name in ours if not any(name in query for query in QUERIES)}
    assert missing <= {"pipeline_worker_event_batches_total"}


def test_its_panels_have_a_place_and_a_reason() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in PANELS]
    assert len(set(places)) == len(places)
    assert all(panel["description"] and panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in PANELS)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_its_data_source_is_for_the_user_to_choose() -> None:
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}
    variables = {variable["name"]: variable["type"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "model": "query", "worker": "query"}


@needs_promtool
def test_prometheus_understands_its_queries(tmp_path: Path) -> None:
    rules = [{"record": f"query:{number}", "expr": plain(query)} for number, query in enumerate(QUERIES)]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(QUERIES)} rules found" in done.stdout


@needs_promtool
def test_prometheus_understands_its_configuration(tmp_path: Path) -> None:
    written = tmp_path / "prometheus.yml"
    written.write_text(json.dumps(scraping({"engine 0": 18000, "engine 1": 18001, "router": 18002})))
    for file in (DASHBOARDS / "prometheus.yml", written):
        done = subprocess.run(["promtool", "check", "config", str(file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_program_is_a_job_and_each_part_has_its_name() -> None:
    jobs = scraping({"engine 0": 18000, "engine 1": 18001, "router": 18002})["scrape_configs"]
    assert [job["job_name"] for job in jobs] == ["engine", "router"]
    assert jobs[0]["static_configs"][1] == {"targets": ["127.0.0.1:18001"], "labels": {"part": "engine 1"}}
