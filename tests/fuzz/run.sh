#!/usr/bin/env bash
# Runs the fuzz targets over the seeds in corpus/ and whatever they come upon: each TARGET for a few seconds, as a test; or "all SECONDS", which are shared out
# between them, or "coverage" (needs the package llvm), which says how much of the codec the corpora reach. What a run finds new is kept in $BUILD/corpus, what it fails on in
# $BUILD/found: run $BUILD/tests/fuzz/TARGET with that file to see it again.
# cases
# timeout: 100
set -euo pipefail
cd "$(dirname "$0")/../.."
[ "${1:?a target, list, all SECONDS, or coverage}" = list ] || command -v clang >/dev/null || { echo "SKIP: clang is not installed (make deps)"; exit 77; }
targets=(frame step server reconcile nbd nbd_client)
fuzzers=build-fuzz

fuzz() { # TARGET SECONDS
    local kept=$fuzzers/corpus/$1 log=$fuzzers/$1.log
    mkdir -p "$kept" "$fuzzers/found"
    # Blocks are small and few whatever a peer says: an allocation of more than 64 MiB is a finding, and so is an input that takes 20 s.
    if ! "$fuzzers/tests/fuzz/$1" -max_total_time="$2" -max_len=2048 -timeout=20 -malloc_limit_mb=64 -print_final_stats=1 -verbosity=1 \
        -artifact_prefix="$fuzzers/found/$1-" "$kept" "tests/fuzz/corpus/$1" >"$log" 2>&1; then
        grep -vE '^#|NEW_FUNC' "$log" | tail -n 50
        echo "FAILED: $1; the input is kept in $fuzzers/found"
        exit 1
    fi
    awk -v target="$1" '/^#.*DONE/ { cov = $4; size = $8 } /number_of_executed_units/ { runs = $2 } /peak_rss_mb/ { rss = $2 }
        END { printf "%-10s %9d runs, %5d edges, corpus %s, %d MB\n", target, runs, cov, size, rss }' "$log"
}

case $1 in
list)
    printf '%s\n' "${targets[@]}"
    ;;
all)
    for target in "${targets[@]}"; do
        fuzz "$target" $((${2:?SECONDS} / ${#targets[@]}))
    done
    ;;
coverage) # of the codec and what is behind it, by what the runs have come upon so far
    make --no-print-directory BUILD=build-coverage CC=clang OPT='-O1 -g' SANITIZE='-fsanitize=fuzzer-no-link -fprofile-instr-generate -fcoverage-mapping' fuzz-targets >/dev/null
    objects=()
    for target in "${targets[@]}"; do
        mkdir -p "$fuzzers/corpus/$target"
        LLVM_PROFILE_FILE=build-coverage/$target.profraw build-coverage/tests/fuzz/"$target" -runs=0 "$fuzzers/corpus/$target" "tests/fuzz/corpus/$target" 2>/dev/null
        objects+=(-object "build-coverage/tests/fuzz/$target")
    done
    llvm-profdata merge -o build-coverage/all.profdata build-coverage/*.profraw
    llvm-cov report "build-coverage/tests/fuzz/${targets[0]}" "${objects[@]}" -instr-profile=build-coverage/all.profdata wire/frame.c wire/nbd.c wire/nbd_client.c agent/nbd agent/net agent/store agent/sync/reconcile.c agent/track/hashes.c |
        awk '/\.c / { printf "%-32s lines %6s of %5d   branches %s\n", $1, $10, $8, $13 }'
    ;;
*)
    fuzz "$1" 4
    ;;
esac
