#!/usr/bin/env bash
# Runs the whole pipeline on this machine: ./launch.sh --help
set -euo pipefail
cd "$(dirname "$0")"
scripts/install
[ -d models/random-llama ] || .venv/bin/python models/make_random.py >&2
exec .venv/bin/python scripts/launch.py "$@"
