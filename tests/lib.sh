# What every test script shares; sourced, never run. A test gets a directory of its own ($T), agents of its own, and no MEMSYNC_ variable from outside.
#
#   $BUILD     where the parts under test are          $T        private directory, removed at the end (kept when KEEP is set)
#   $W         where the programs keep their files     $STORE    directory of the remote's store
#   $REMOTE    the remote's address, once started      $REMOTE_PID
set -euo pipefail
export LC_ALL=C

TESTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
BUILD=$(realpath -m "${BUILD:-$TESTS/../build}")
export BUILD
for variable in $(compgen -e MEMSYNC_ || true); do
    unset "$variable"
done
unset LD_PRELOAD XDG_RUNTIME_DIR

T=$(realpath "$(mktemp -d "${TMPDIR:-/tmp}/memsync-test.XXXXXX")")
W=$T/work
STORE=$T/store
REMOTE='' REMOTE_PID=''
SOCKET=$T/agent.sock
export XDG_STATE_HOME=$T/state
extra_dirs=() # removed with $T
mounted=()    # unmounted before that
mkdir "$W"

say() { printf '%s\n' "$*"; }
fail() {
    say "FAILED: $*" >&2
    exit 1
}
# A missing program is a reason to skip, but not where everything is meant to be there.
skip() {
    say "SKIP: $*"
    [ "${CI:-}" = true ] && exit 1
    exit 77
}
requires() {
    local program
    for program; do
        command -v "$program" >/dev/null || skip "$program is not installed (make deps)"
    done
}
requires_python() {
    /usr/bin/python3 -c "import ${1}" 2>/dev/null || skip "python3 has no ${1} (make deps)"
}
requires_root() { [ "$(id -u)" = 0 ] || { say "SKIP: $*: needs root"; exit 77; }; }

# poll SECONDS COMMAND...: until the command succeeds; the time is a deadline, not a wait.
poll() {
    local until=$((SECONDS + $1 + 1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$until" ] || return 1
        sleep 0.02
    done
}
gone() { ! alive "$1"; }
alive() {
    local state
    state=$(sed -n 's/^State:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null) && [ -n "$state" ] && [ "${state:0:1}" != Z ]
}

# Processes that carry this test's directory in their command line or environment, so nobody else's.
our_processes() {
    local proc
    for proc in /proc/[0-9]*; do
        [ -O "$proc" ] || [ "$EUID" = 0 ] || continue
        if [ "${proc#/proc/}" != "$BASHPID" ] && cat "$proc/cmdline" "$proc/environ" 2>/dev/null | grep -qaF "$T"; then
            say "${proc#/proc/}"
        fi
    done
    return 0
}
our_agents() {
    local pid
    for pid in $(our_processes); do
        if [[ "$(readlink "/proc/$pid/exe" 2>/dev/null)" == */memsync-agent* ]] && alive "$pid"; then
            say "$pid"
        fi
    done
}
# Those of them that are not remotes we started.
local_agents() {
    local pid
    for pid in $(our_agents); do
        grep -qzx -- --listen "/proc/$pid/cmdline" 2>/dev/null || say "$pid"
    done
}

finish() {
    local code=$? pid
    trap - EXIT
    set +e
    for pid in $(jobs -p) $(our_processes); do
        kill -KILL "$pid" 2>/dev/null
    done
    wait 2>/dev/null
    if [ "$code" != 0 ] && [ "$code" != 77 ]; then
        local log
        for log in "$T"/*.err; do
            [ -s "$log" ] && { say "--- $(basename "$log")"; tail -n 40 "$log"; } >&2
        done
    fi
    if [ -n "${KEEP:-}" ]; then
        say "kept: $T ${extra_dirs[*]}" >&2
    else
        [ "${#mounted[@]}" = 0 ] || umount -l "${mounted[@]}"
        chmod -R u+rwX "$T" 2>/dev/null
        rm -rf "$T" "${extra_dirs[@]}"
    fi
    exit "$code"
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

# as_nobody SCRIPT ARGUMENT...: a test script again, by an ordinary user, from copies that this user can read. For root only.
as_nobody() {
    local home=$T/nobody script
    script=$(realpath "$1")
    mkdir -p "$home/tmp" "$home/build/tests"
    cp -r "$TESTS" "$home/tests"
    cp "$BUILD"/libmemsync_preload.so "$BUILD"/memsync-agent "$BUILD"/memsync "$home/build/"
    cp -r "$BUILD/tests/programs" "$BUILD/tests/faults" "$home/build/tests/"
    chmod 711 "$T"
    chown -R 65534:65534 "$home"
    setpriv --reuid=65534 --regid=65534 --clear-groups --bounding-set=-all env -i PATH="$PATH" HOME="$home" TMPDIR="$home/tmp" BUILD="$home/build" \
        ${CI:+CI="$CI"} ${TRACE:+TRACE="$TRACE"} bash "$home/tests/${script#"$TESTS/"}" "${@:2}"
}

# Files of the programs on a file system in memory instead of the disk's.
work_in_memory() {
    [ "$(stat -f -c %T /dev/shm 2>/dev/null)" = tmpfs ] || skip "/dev/shm is not a tmpfs"
    rmdir "$W"
    W=$(mktemp -d /dev/shm/memsync-test.XXXXXX)
    extra_dirs+=("$W")
}

remote_ready() {
    alive "$REMOTE_PID" || fail "the remote agent ended before it listened"
    REMOTE=$(sed -n 's/^listening wire //p' "$T/remote.out" | head -n 1)
    [ -n "$REMOTE" ]
}
# start_remote [STORE-URL [OPTION...]]: at $LISTEN, or any free port.
start_remote() {
    local store=${1:-file:$STORE}
    : >"$T/remote.out"
    "$BUILD/memsync-agent" --listen "${LISTEN:-127.0.0.1:0}" --store "$store" "${@:2}" >"$T/remote.out" 2>>"$T/remote.err" &
    REMOTE_PID=$!
    poll 20 remote_ready || fail "the remote agent did not say that it listens within 20 s"
}
# Clean: what is left are plain files, exact.
stop_remote() {
    local code=0
    kill -TERM "$REMOTE_PID"
    poll "${1:-60}" gone "$REMOTE_PID" || fail "the remote agent did not end within ${1:-60} s of SIGTERM"
    wait "$REMOTE_PID" || code=$?
    REMOTE_PID=''
    [ "$code" = 0 ] || fail "the remote agent ended with $code after SIGTERM"
}
kill_remote() {
    kill -KILL "$REMOTE_PID" 2>/dev/null || true
    wait "$REMOTE_PID" 2>/dev/null || true
    REMOTE_PID=''
}

# shim [VARIABLE=VALUE...] -- COMMAND...: the command under the shim, with this test's local agent, for at most $LIMIT seconds (90). PRELOAD= in the
# environment runs every test without the shim: all that compare must then fail.
# TRACE=1 keeps the debug log of shim and agent, which a failing test shows.
shim() {
    local variables=()
    while [ "$1" != -- ]; do
        variables+=("$1")
        shift
    done
    shift
    timeout -k 5 "${LIMIT:-90}" env MEMSYNC_AGENT="$SOCKET" MEMSYNC_REMOTE="$REMOTE" MEMSYNC_REGIONS="$W/**" "${variables[@]}" \
        ${TRACE:+MEMSYNC_LOG=debug MEMSYNC_LOG_FILE="$T/trace.err"} LD_PRELOAD="${PRELOAD-$BUILD/libmemsync_preload.so}" "$@"
}
memsync() { MEMSYNC_AGENT="$SOCKET" MEMSYNC_REMOTE="$REMOTE" "$BUILD/memsync" "$@"; }
no_local_agents() { [ -z "$(local_agents)" ]; }
# Drains and ends the local agent, if one runs still.
stop_local() {
    no_local_agents && return 0
    memsync stop >"$T/stop.out" 2>&1 || no_local_agents || fail "memsync stop: $(cat "$T/stop.out")"
    poll 30 no_local_agents || fail "the local agent did not end within 30 s of memsync stop"
}

same() { cmp -- "$1" "$2" >&2 || fail "$2 differs from $1"; }
# Where the replica of a file is, under its default name.
replica() { say "$STORE/${1#/}"; }

tracked_files() { (cd "$1" && find . -type f ! -name '*-shm' ! -name '*-lock' ! -name lock.mdb ! -path './.memsync/*' | sort); }
# Every file under $W is in the store, nothing else is, byte for byte.
same_tree() {
    local root=${1:-$(replica "$W")} file
    [ -d "$root" ] || fail "no replica: $root does not exist"
    diff <(tracked_files "$W") <(tracked_files "$root") >&2 || fail "local (<) and replica (>) hold different files"
    [ -n "$(tracked_files "$W")" ] || fail "the program left no file to compare"
    while read -r file; do
        same "$W/$file" "$root/$file"
    done < <(tracked_files "$W")
}
# The program's stderr must hold nothing from us: whatever we say there is something that went wrong.
quiet() {
    ! grep -n 'memsync' "$1" >&2 || fail "the shim or agent complained"
}

# A program that is walked through: stepper_start FILE SIZE [VARIABLE=VALUE...], then step LINE..., whose answer is in $ANSWER (its result) and $TOOK (us).
STEPPER='' STEPPER_PID='' STEP_IN='' STEP_OUT=''
pipes() { # NAME: two named pipes, open for reading and writing so that opening them never waits
    rm -f "$T/$1.in" "$T/$1.out"
    mkfifo "$T/$1.in" "$T/$1.out"
}
stepper_start() {
    local file=$1 size=$2
    shift 2
    pipes step
    exec {STEP_IN}<>"$T/step.in" {STEP_OUT}<>"$T/step.out"
    LIMIT=${LIMIT:-600} shim "$@" -- "$BUILD/tests/programs/stepper" "$file" "$size" <"$T/step.in" >"$T/step.out" 2>>"$T/program.err" &
    STEPPER=$!
    read -r -t 60 -u "$STEP_OUT" _ STEPPER_PID || fail "the stepper did not start: $(cat "$T/program.err")"
}
step_begin() { say "$*" >&"$STEP_IN"; }
step_answer() { # SECONDS: false when none came
    local what
    read -r -t "$1" -u "$STEP_OUT" what ANSWER TOOK
}
step() {
    step_begin "$@"
    step_answer "${STEP_LIMIT:-60}" || fail "step '$*' was not answered within ${STEP_LIMIT:-60} s: $(cat "$T/program.err")"
}
stepped() { # step, and it must succeed
    step "$@"
    [ "$ANSWER" = 0 ] || fail "step '$*': $ANSWER"
}
stepper_end() {
    local code=0
    say "${1:-q}" >&"$STEP_IN"
    wait "$STEPPER" || code=$?
    exec {STEP_IN}>&- {STEP_OUT}>&-
    [ "$code" = "${2:-0}" ] || fail "the stepper ended with $code"
}

# The relay between the local agent and the remote: start_relay [OPTION...] makes $REMOTE its address; relay LINE commands it.
RELAY_IN='' RELAY_OUT='' DIRECT=''
start_relay() {
    local address
    pipes relay
    exec {RELAY_IN}<>"$T/relay.in" {RELAY_OUT}<>"$T/relay.out"
    "$BUILD/bench/relay" "$REMOTE" "$@" <"$T/relay.in" >"$T/relay.out" 2>>"$T/relay.err" &
    read -r -t 10 -u "$RELAY_OUT" _ address || fail "the relay did not start"
    DIRECT=$REMOTE
    REMOTE=$address
}
relay() { say "$*" >&"$RELAY_IN"; }
relay_heard() { read -r -t "$1" -u "$RELAY_OUT" HEARD; }
