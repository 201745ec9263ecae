import json
import subprocess
import sys
from pathlib import Path

from benchmarks.comparison import OURS, THEIRS
from tests.system.conftest import REPOSITORY


def test_our_pipeline_and_dynamo_s_frontend_give_the_same_answers(tmp_path: Path) -> None:
    """Under load, over several connections, from the same engines. No times: they are the machine's."""
    command = [sys.executable, "-m", "benchmarks.throughput", "--short", "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads((tmp_path / "throughput.json").read_text())
    turns = document["turns"]
    assert [(turn["engines"], turn["side"]) for turn in turns] == [
        (engines, side) for engines in ("simulated", "sglang") for side in (OURS, THEIRS)
    ]
    for one in [one for turn in turns for one in turn["results"]]:
        assert (one["measured"]["wrong"], one["measured"]["errors"]) == (0, []), one["point"]
        assert one["measured"]["answers"] > 0
        assert round(one["tokens"] / one["requests"]) == 100
    assert document["texts"]["compared"] > 0
    assert document["texts"]["different"] == 0
    assert (tmp_path / "throughput.png").stat().st_size > 10_000
    assert (tmp_path / "throughput.md").read_text() in result.stdout
