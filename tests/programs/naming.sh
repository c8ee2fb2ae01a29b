#!/usr/bin/env bash
# A rename and an unlink are sync points of their own: when the call returns the remote has what it did, although the program has no file open any more.
# cases
# timeout: 120
. "$(dirname "$0")/../lib.sh"

cases=(replace unlink)
[ "${1:?a case, or list}" = list ] && { printf '%s\n' "${cases[@]}"; exit 0; }

start_remote
cat >"$T/program.py" <<'PY'
import os, subprocess, sys
what, where, region, out, tool = sys.argv[1:]
plain = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}

def remote():
    run = subprocess.run([tool, "export", region, out], env=plain, capture_output=True)
    return open(out, "rb").read() if run.returncode == 0 else None

stale = 0
for i in range(30):
    content = b"%d" % (i % 10) * (i * 3000 + 10)
    with open(where + "/conf.new", "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(where + "/conf.new", where + "/conf")
    stale += remote() != content
    if what == "unlink":
        os.unlink(where + "/conf")
        stale += remote() is not None
print(stale, "of 30 rounds were not at the remote when the call returned")
sys.exit(stale != 0)
PY
region=${W#/}/conf
shim MEMSYNC_REGIONS="$W/*" -- /usr/bin/python3 "$T/program.py" "$1" "$W" "$region" "$T/out" "$BUILD/memsync" 2>"$T/program.err" || fail "a name changed later there than here"
quiet "$T/program.err"
stop_local
stop_remote
[ "$1" = unlink ] || same_tree
