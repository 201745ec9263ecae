import re
import subprocess
import sys

from tests.system.conftest import REPOSITORY


def test_both_routers_are_measured() -> None:
    command = [sys.executable, "-m", "benchmarks.decisions", "--trees", "1000", "--fleets", "2", "--rounds", "1"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^\| 1,000 \| 2 \|( [\d.]+ \|){6}$", result.stdout, re.MULTILINE)
    assert len(re.findall(r"^\| [^|]+ \| [\d,]+ \| [\d,]+ \| [\d.]+ \|$", result.stdout, re.MULTILINE)) == 6
