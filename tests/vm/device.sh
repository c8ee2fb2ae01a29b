#!/usr/bin/env bash
# Regions as block devices of the kernel, in guests: tests/vm/lib/device.sh runs there.
# cases
# timeout: 240
set -euo pipefail
cd "$(dirname "$0")/../.."
case ${1:-list} in
list) printf '%s\n' ${VM:-6.1 6.12} ;;
*) exec tests/vm/lib/guest.sh -t 200 "$1" bash tests/vm/lib/device.sh ;;
esac
