import json
import subprocess
import sys
from pathlib import Path

from tests.system.conftest import REPOSITORY


def test_routing_by_cache_beats_routing_blindly(tmp_path: Path) -> None:
    """No times: they are the machine's. What is cached is the router's doing: agents come back every few seconds, so
    round robin finds their prompts where one of the last turns happened to go, and computes more than twice as much."""
    command = [sys.executable, "-m", "benchmarks.routing", "--short", "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads((tmp_path / "routing.json").read_text())
    runs = {run["policy"]: run for run in document["runs"]}
    for run in runs.values():
        assert (run["rejected"], run["failed"], run["lost_passes"]) == (0, 0, 0), run["errors"]
    computed = {policy: 1 - run["cached_share"] for policy, run in runs.items()}
    assert computed["kv"] < 0.7 * computed["round-robin"]
    simulated = {figures["policy"]: figures for figures in document["simulated"]}
    assert abs(runs["kv"]["cached_share"] - simulated["kv"]["cached"]) < 0.1
    assert (tmp_path / "routing.png").stat().st_size > 10_000
    assert (tmp_path / "routing.md").read_text() in result.stdout
