#!/usr/bin/env bash
# TLS between agents, for programs and the tool: who is let in and who is not, what is said about it and how often, and that nothing
# goes over the wire in the clear.
# cases
# timeout: 60
. "$(dirname "$0")/../lib.sh"

cases=(certs_and_keys refused plain_and_tls host_name expired no_plaintext programs reconnects grants grants_hold listeners reload)
[ "${1:?a case, or list}" = list ] && { printf '%s\n' "${cases[@]}"; exit 0; }
requires openssl

memsync() { "$BUILD/memsync" "$@"; }
secrets() {
    memsync certs "$T/certs" >/dev/null
    memsync certs "$T/foreign" >/dev/null
    memsync keygen "$T/key" --name alice >/dev/null
    memsync keygen "$T/other" --name alice >/dev/null
    memsync keygen "$T/stranger" --name mallory >/dev/null
}
serve() { # OPTION...: a remote; its port in $PORT
    mkdir -p "$STORE"
    "$BUILD/memsync-agent" --listen "${LISTEN:-127.0.0.1:0}" --store "file:$STORE" --state "$T/remote-state" "$@" >"$T/remote.out" 2>>"$T/remote.err" &
    REMOTE_PID=$!
    poll 10 grep -q '^listening wire' "$T/remote.out" || fail "the agent does not start: $(cat "$T/remote.err")"
    PORT=$(sed -n 's/^listening wire .*://p' "$T/remote.out")
    export MEMSYNC_REMOTE=127.0.0.1:$PORT
}
with_certs() { MEMSYNC_CERT_DIR=${CERTS:-$T/certs} "$@"; }
with_key() { MEMSYNC_PSK_FILE=${KEY:-$T/key} "$@"; }
said() { # COUNT TEXT: the remote has said so, and no oftener
    poll 5 grep -q -- "$2" "$T/remote.err" || fail "the remote does not say \"$2\": $(cat "$T/remote.err")"
    [ "$(grep -c -- "$2" "$T/remote.err")" = "$1" ] || fail "\"$2\" is not said $1 times: $(cat "$T/remote.err")"
}
must_fail() { # TEXT COMMAND...: with that in what it says
    local text=$1
    shift
    if "$@" >"$T/client.out" 2>"$T/client.err"; then fail "$* is let in"; fi
    grep -q -- "$text" "$T/client.err" || fail "$*: not \"$text\" but: $(cat "$T/client.err")"
    [ ! -s "$T/client.out" ] || fail "$*: something is told: $(cat "$T/client.out")"
}
pattern() { for _ in $(seq 4000); do say "in the clear this could be read by anybody"; done; }
# A program that replicates W/data: the agent beside it is started with the same environment.
store() { # TEXT
    LD_PRELOAD=$BUILD/libmemsync_preload.so MEMSYNC_AGENT=$SOCKET MEMSYNC_REGIONS="$W/data,name=data" MEMSYNC_TIMEOUT=${WITHIN:-20s} \
        /usr/bin/python3 -c '
import mmap, os, sys
f = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(f, 1 << 20)
m = mmap.mmap(f, 1 << 20)
text = (sys.argv[2] + " ").encode()
m[:] = (text * ((1 << 20) // len(text) + 1))[: 1 << 20]
m.flush()' "$W/data" "$1" 2>>"$T/program.err"
}
pull() { # REGION: by an agent of its own, to standard output
    LD_PRELOAD=$BUILD/libmemsync_preload.so MEMSYNC_AGENT=$T/pull.sock MEMSYNC_REGIONS="$W/$1=pull,name=$1" /usr/bin/python3 -c '
import mmap, os, sys
f = os.open(sys.argv[1], os.O_RDONLY)
m = mmap.mmap(f, os.fstat(f).st_size, prot=mmap.PROT_READ)
sys.stdout.buffer.write(m[:])' "$W/$1" 2>>"$T/program.err"
}

secrets
case $1 in
certs_and_keys)
    serve --cert-dir "$T/certs" --psk-file "$T/key"
    pattern >"$T/file"
    with_certs memsync import "$T/file" one >/dev/null
    with_key memsync export one "$T/back"
    cmp "$T/file" "$T/back"
    MEMSYNC_REMOTE=tls:$MEMSYNC_REMOTE with_key memsync ls | grep -q '^one' || fail "tls: before the address"
    [ "$(stat -c %a "$T/key" "$T/certs/ca-key.pem" "$T/certs/server-key.pem" "$T/certs/client-key.pem" | sort -u)" = 600 ] || fail "modes"
    openssl verify -CAfile "$T/certs/ca-cert.pem" -purpose sslserver "$T/certs/server-cert.pem" >/dev/null || fail "server-cert.pem"
    openssl verify -CAfile "$T/certs/ca-cert.pem" -purpose sslclient "$T/certs/client-cert.pem" >/dev/null || fail "client-cert.pem"
    chmod 644 "$T/key"
    must_fail "chmod 600" with_key memsync ls
    ;;
refused)
    serve --cert-dir "$T/certs" --psk-file "$T/key"
    KEY=$T/other must_fail "TLS" with_key memsync ls
    said 1 "binder does not verify"
    KEY=$T/stranger must_fail "TLS" with_key memsync ls
    said 1 "alert unknown ca" # there are certificates, too, and this one knows no authority
    CERTS=$T/foreign must_fail "its certificate is refused" with_certs memsync ls
    said 2 "alert unknown ca"
    mkdir "$T/mixed" # knows the server's authority, but shows another's certificate
    cp "$T/foreign"/client-*.pem "$T/certs/ca-cert.pem" "$T/mixed"
    CERTS=$T/mixed must_fail "unknown ca" with_certs memsync ls
    said 1 "its certificate is refused"
    cp "$T/certs/server-cert.pem" "$T/mixed/client-cert.pem" # a server's certificate is no client's
    cp "$T/certs/server-key.pem" "$T/mixed/client-key.pem"
    CERTS=$T/mixed must_fail "TLS" with_certs memsync ls
    said 1 "unsuitable certificate purpose\|unsupported certificate purpose"
    # openssl for one that would speak an older version
    openssl s_client -connect "$MEMSYNC_REMOTE" -tls1_2 -cert "$T/certs/client-cert.pem" -key "$T/certs/client-key.pem" </dev/null >"$T/old" 2>&1 && fail "TLS 1.2 is let in"
    grep -q "alert protocol version" "$T/old" || fail "$(cat "$T/old")"
    said 1 "unsupported protocol"
    ;;
plain_and_tls)
    serve --cert-dir "$T/certs"
    must_fail "speaks without TLS" memsync ls
    said 1 "speaks without TLS"
    kill -TERM "$REMOTE_PID"
    wait "$REMOTE_PID"
    serve
    must_fail "speaks no TLS" with_certs memsync ls
    said 1 "speaks TLS, and this end does not"
    MEMSYNC_REMOTE=tls:$MEMSYNC_REMOTE must_fail "nothing to show" memsync ls
    ;;
host_name)
    rm "$T/certs"/server-*.pem
    memsync certs "$T/certs" elsewhere.example >/dev/null
    serve --cert-dir "$T/certs"
    must_fail "IP address mismatch" with_certs memsync ls
    MEMSYNC_REMOTE=localhost:$PORT must_fail "[Hh]ostname mismatch" with_certs memsync ls
    ;;
expired)
    openssl x509 -x509toreq -in "$T/certs/client-cert.pem" -signkey "$T/certs/client-key.pem" -out "$T/req" 2>/dev/null
    openssl x509 -req -in "$T/req" -CA "$T/certs/ca-cert.pem" -CAkey "$T/certs/ca-key.pem" -CAcreateserial -days -1 -out "$T/certs/client-cert.pem" 2>/dev/null
    serve --cert-dir "$T/certs"
    must_fail "expired" with_certs memsync ls
    said 1 "certificate has expired"
    ;;
no_plaintext) # a relay that keeps what passes
    serve --psk-file "$T/key"
    /usr/bin/python3 - "$PORT" "$T/wire" >"$T/relay.out" 2>"$T/relay.err" <<'PY' &
import asyncio, sys
taken = open(sys.argv[2], "wb", buffering=0)
firsts = open(sys.argv[2] + ".firsts", "w", buffering=1)
async def copy(r, w):
    first = True
    while data := await r.read(65536):
        if first:
            print("record" if data[0] == 22 else "other", file=firsts)
            first = False
        taken.write(data)
        w.write(data)
        await w.drain()
    w.close()
async def serve(r, w):
    ur, uw = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
    await asyncio.gather(copy(r, uw), copy(ur, w), return_exceptions=True)
async def main():
    s = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(s.sockets[0].getsockname()[1], flush=True)
    await s.serve_forever()
asyncio.run(main())
PY
    poll 10 test -s "$T/relay.out" || fail "no relay"
    export MEMSYNC_REMOTE=127.0.0.1:$(cat "$T/relay.out")
    pattern >"$T/file"
    with_key memsync import "$T/file" secret-name >/dev/null
    with_key memsync export secret-name "$T/back"
    cmp "$T/file" "$T/back"
    with_key store "in the clear this could be read by anybody" || fail "$(cat "$T/program.err")"
    poll 10 grep -qa "in the clear" "$STORE/data" || fail "nothing has come: $(cat "$T/program.err")"
    before=$(wc -l <"$T/wire.firsts")
    head -c $((24 << 20)) /dev/zero | tr '\0' x >"$T/file"
    with_key memsync import "$T/file" big >/dev/null
    with_key pull big >"$T/pulled" || fail "$(cat "$T/program.err")"
    cmp "$T/file" "$T/pulled"
    # one of the tool, one of the agent, and at least one more of it for bulk, both ways
    [ "$(wc -l <"$T/wire.firsts")" -ge $((before + 6)) ] || fail "no further sockets"
    ! grep -q other "$T/wire.firsts" || fail "a socket without TLS"
    ! grep -qaF xxxxxxxxxxxxxxxx "$T/wire" || fail "a pull is on the wire"
    [ "$(stat -c %s "$T/wire")" -gt 2000 ] || fail "the relay was gone around"
    for what in "in the clear" secret-name; do
        ! grep -qaF "$what" "$T/wire" || fail "\"$what\" is on the wire"
    done
    ;;
programs)
    serve --cert-dir "$T/certs"
    with_certs store "first" || fail "$(cat "$T/program.err")"
    with_certs store "second" || fail "$(cat "$T/program.err")"
    with_certs memsync export data "$T/back"
    cmp "$W/data" "$T/back"
    # a mount over TLS, and its further sockets
    head -c $((24 << 20)) /dev/urandom >"$T/file"
    with_certs memsync import "$T/file" big >/dev/null
    with_certs pull big >"$T/pulled" || fail "$(cat "$T/program.err")"
    cmp "$T/file" "$T/pulled"
    ! grep -q TLS "$T/remote.err" || fail "$(cat "$T/remote.err")"
    # the agent that was started without does not dial a program's TLS remote in the clear
    "$BUILD/memsync-agent" --socket "$T/third.sock" --state "$T/third" >"$T/third.out" 2>"$T/third.err" &
    poll 10 grep -q listening "$T/third.out" || fail "no third agent"
    WITHIN=1s MEMSYNC_ON_LOSS=fail SOCKET=$T/third.sock with_certs store third || :
    poll 5 grep -q "nothing to show" "$T/third.err" || fail "$(cat "$T/third.err")"
    ! grep -q "speaks without TLS" "$T/remote.err" || fail "it was dialled in the clear"
    ;;
reconnects)
    serve --psk-file "$T/key"
    with_key "$BUILD/memsync-agent" --socket "$SOCKET" --state "$T/local" >"$T/local.out" 2>"$T/local.err" & # one agent all the time
    poll 10 grep -q listening "$T/local.out" || fail "no agent"
    store "before" || fail "$(cat "$T/program.err")"
    for round in 1 2 3; do
        kill -KILL "$REMOTE_PID"
        wait "$REMOTE_PID" 2>/dev/null || :
        rm "$T/remote.out"
        LISTEN=127.0.0.1:$PORT serve --psk-file "$T/key"
        with_key store "round $round" || fail "$(cat "$T/program.err")"
        with_key memsync export data "$T/back.$round"
        cmp "$W/data" "$T/back.$round"
    done
    ;;
grants)
    cat >"$T/grants" <<'END'
# who    what          may
alice    open/**       read
client   open/**       read,write
client   own/?         read,write,admin
END
    say x >"$T/file"
    serve --cert-dir "$T/certs" --psk-file "$T/key" --grants "$T/grants"
    with_certs memsync import "$T/file" open/a/b >/dev/null
    with_certs memsync import "$T/file" own/1 >/dev/null
    must_fail "do not let this peer write" with_certs memsync import "$T/file" own/12
    must_fail "do not let this peer write" with_key memsync import "$T/file" open/a/b --force
    said 1 "client\|is refused to write own/12"
    with_key memsync export open/a/b "$T/back"
    must_fail "do not let this peer read" with_key memsync export own/1 "$T/back2"
    [ "$(with_key memsync ls | awk '{print $1}' | grep -c own)" = 0 ] || fail "own/1 is listed for alice"
    must_fail "do not let this peer administer" with_certs memsync rm open/a/b
    with_certs memsync rm own/1 >/dev/null || fail "own/1 cannot be removed"
    say "alice ** everything" >"$T/wrong"
    must_fail "is not IDENTITY GLOB" "$BUILD/memsync-agent" --listen 127.0.0.1:0 --store mem: --grants "$T/wrong" --state "$T/s"
    ;;
grants_hold) # nobody without an identity, when there are grants
    say "alice ** read,write,admin" >"$T/grants"
    say x >"$T/file"
    serve --grants "$T/grants"
    must_fail "do not let this peer write" memsync import "$T/file" a
    MEMSYNC_REMOTE=file:$STORE memsync import "$T/file" a >/dev/null || fail "this user's own socket"
    must_fail "do not let this peer read" memsync export a "$T/back"
    ;;
listeners)
    must_fail "without TLS would let" "$BUILD/memsync-agent" --listen 0.0.0.0:0 --store mem: --state "$T/s"
    must_fail "nothing to show" "$BUILD/memsync-agent" --listen 127.0.0.1:0 --store mem: --tls require --state "$T/s"
    must_fail "without TLS would let" "$BUILD/memsync-agent" --listen 0.0.0.0:0 --store mem: --tls off --psk-file "$T/key" --state "$T/s"
    LISTEN=0.0.0.0:0 serve --psk-file "$T/key"
    with_key memsync ls >/dev/null
    ;;
reload)
    serve --psk-file "$T/key"
    KEY=$T/stranger must_fail TLS with_key memsync ls
    cat "$T/stranger" >>"$T/key"
    kill -HUP "$REMOTE_PID"
    again() { KEY=$T/stranger with_key memsync ls >/dev/null 2>&1; }
    poll 5 again || fail "the key that was added is not taken: $(cat "$T/remote.err")"
    say nonsense >>"$T/key"
    kill -HUP "$REMOTE_PID"
    said 1 "stays as it was: .*line 3"
    again || fail "a broken file has taken the keys away"
    ;;
esac
