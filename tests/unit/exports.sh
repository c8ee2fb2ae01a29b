#!/usr/bin/env bash
# The preload library shows exactly the calls that shim/exports.map lists: no helper of ours ever stands in for a program's own function.
set -euo pipefail
cd "$(dirname "$0")/../.."
library=${BUILD:-build}/libmemsync_preload.so
listed=$(sed -n '/global:/,/local:/s/^ *\([a-z_0-9A-Z]*\);$/\1/p' shim/exports.map | sort)
shown=$(nm -D --defined-only "$library" | awk '{ sub("@.*", "", $3); print $3 }' | sort)
[ -n "$listed" ] || { echo "shim/exports.map lists nothing"; exit 1; }
diff <(echo "$listed") <(echo "$shown")
# No symbol of the loader, of fork's relatives or of malloc may be among them.
if grep -xE 'vfork|clone|clone3|posix_spawnp?|fork|dlsym|(m|c|re)alloc|free' <<<"$shown"; then exit 1; fi
echo "$(wc -l <<<"$shown") symbols, as listed"
