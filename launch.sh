#!/usr/bin/env bash
# Runs the whole pipeline on this machine: ./launch.sh --help
set -euo pipefail
cd "$(dirname "$0")"
scripts/install
exec .venv/bin/python scripts/launch.py "$@"
