#!/usr/bin/env bash
# The measurements: bench/run.sh [ITEM...] [--small] [--rounds N]; "bench/run.sh list" names the items. Nothing else should run meanwhile.
set -euo pipefail
cd "$(dirname "$0")/.."
exec /usr/bin/python3 bench/bench.py "$@"
