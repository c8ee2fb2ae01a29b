#!/usr/bin/env bash
# MEMSYNC_HOOKS: what a program stored is on the remote when a function of its own libraries returns, without any sync point of the program: functions of a library
# it links, through a pointer, with many arguments, and between two libraries opened late. Results and errno come through unchanged (the program looks).
# cases
# timeout: 60
#
# A case is how the program is linked, which decides what its offset tables look like when they are patched.
. "$(dirname "$0")/../lib.sh"

list() { printf '%s\n' lazy now noplt fixed-lazy fixed-now unprotected bad; }
[ "${1:?a case, or list}" = list ] && { list; exit 0; }
case $1 in
lazy) flags=(-Wl,-z,lazy) ;;
now) flags=(-Wl,-z,now) ;;
noplt) flags=(-fno-plt -Wl,-z,now) ;;
fixed-lazy) flags=(-no-pie -fno-pie -Wl,-z,lazy) ;;
fixed-now) flags=(-no-pie -fno-pie -Wl,-z,now) ;;
unprotected) flags=(-Wl,-z,norelro -Wl,-z,lazy) ;;
bad) flags=() ;;
*) fail "no such case: $1" ;;
esac

cc=${CC:-cc}
requires "$cc"
here=$TESTS/programs/lib
mkdir "$T/lib"
compile() { "$cc" -std=gnu17 -D_GNU_SOURCE -O2 -g "$@" || fail "$cc $*"; }
compile -shared -fPIC -DNAME=direct -o "$T/libdirect.so" "$here/hookslib.c"
compile -shared -fPIC -DNAME=inner -o "$T/lib/libinner.so" "$here/hookslib.c"
late=()
case $1 in lazy | now | unprotected) late=("${flags[@]}") ;; esac
# Opened by a bare name that only the program's own search path leads to, as does what it needs in turn.
compile -shared -fPIC "${late[@]}" -o "$T/lib/liblate.so" "$here/hookslate.c" -L"$T/lib" -linner '-Wl,-rpath,$ORIGIN'
compile "${flags[@]}" -o "$T/hooks" "$here/hooks.c" -L"$T" -ldirect '-Wl,-rpath,$ORIGIN:$ORIGIN/lib' -ldl

file=$W/file
yes | "$T/hooks" "$file" liblate.so >"$T/native.out" || [ "${PIPESTATUS[1]}" = 0 ] || fail "without the shim the program ended"
[ "$(wc -l <"$T/native.out")" = 8 ] || fail "the program has not said its 8 steps"
rm "$file"
start_remote

if [ "$1" = bad ]; then
    # Each fault is one line that quotes it, and the program runs on.
    hooks='x,direct_quiet=q(p),direct_wide=i(iz),direct_checkpoint=l,direct_checkpoin=l(pld)'
    yes | shim MEMSYNC_HOOKS="$hooks" -- "$T/hooks" "$file" liblate.so >"$T/shim.out" 2>"$T/program.err" ||
        [ "${PIPESTATUS[1]}" = 0 ] || fail "with bad hooks the program ended"
    same "$T/native.out" "$T/shim.out"
    for part in "'x'" "'direct_quiet=q(p)'" "'direct_wide=i(iz)'" "'direct_checkpoint=l'" "'direct_checkpoin'"; do
        [ "$(grep -cF "$part" "$T/program.err")" = 1 ] || fail "not one line about $part: $(cat "$T/program.err")"
    done
    [ "$(grep -c memsync "$T/program.err")" = 5 ] || fail "more lines than faults: $(cat "$T/program.err")"
    exit 0
fi

mkfifo "$T/in" "$T/out"
hooks='direct_checkpoint=l(pld), direct_wide=f(iulpdfildi),direct_quiet=v(p),inner_checkpoint=l(pld)'
shim MEMSYNC_HOOKS="$hooks" MEMSYNC_INTERVAL=off -- "$T/hooks" "$file" liblate.so <"$T/in" >"$T/out" 2>"$T/program.err" &
program=$!
exec 8>"$T/in" 9<"$T/out"
name=${file#/}
: >"$T/shim.out"
while read -r step <&9; do
    say "$step" >>"$T/shim.out"
    rm -f "$T/exported"
    memsync export "$name" "$T/exported" >"$T/export.out" 2>&1 || fail "memsync export after '$step': $(cat "$T/export.out")"
    remote=$(tr '\0' '\n' <"$T/exported" | head -n 1)
    if [ "$step" = unhooked ]; then
        [ "$remote" != unhooked ] || fail "published without a hook: this test shows nothing"
    else
        [ "$remote" = "$step" ] || fail "'$step' was stored, but on the remote is '$remote'"
    fi
    say go >&8
done
exec 8>&- 9<&-
wait "$program" || fail "under the shim the program ended with $?"
same "$T/native.out" "$T/shim.out"
quiet "$T/program.err"
