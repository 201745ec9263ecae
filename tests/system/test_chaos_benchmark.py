"""Two of each part under load: whatever is killed, stopped or restarted, nothing is lost."""

import json
import subprocess
import sys
from pathlib import Path

from tests.system.conftest import REPOSITORY


def test_nothing_is_lost(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--short", "--engines", "2", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    calm, *results = json.loads((tmp_path / "chaos.json").read_text())["results"]
    assert (calm["fault"], calm["at"]) == ("nothing", [])
    assert len(results) == 6
    for result in results:
        assert result["running"] == 32, result["fault"]
        assert [outcome["error"] for outcome in result["outcomes"] if outcome["error"]] == [], result["fault"]
    assert results[-1]["fault"] == "restart each"
    assert len(results[-1]["outcomes"]) > 100  # it went on until all were restarted
    assert done.stdout.count("\n| ") == 8
    assert (tmp_path / "chaos.png").exists()
