#!/usr/bin/env bash
# Runs the whole pipeline on this machine: ./launch.sh --help
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
"$here/scripts/install"
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$here/.venv/bin/python" -m scripts.launch "$@"
