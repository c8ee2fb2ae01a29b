#!/usr/bin/python3
"""Makes the seeds in tests/fuzz/corpus: frame/ from a real exchange between two agents and the tool, server/ from small programs in that target's own words,
nbd_client/ from what servers answer.

    BUILD=build tests/fuzz/seeds.py        needs the parts built (make); run again when the protocol has changed

Of the exchange, of every type of frame (and kind of extent) the shortest few that differ in length are kept, payloads of up to 700 bytes (one whole page
beside them); each seed is the type and the payload, as the target takes it. step/ gets the beginnings of both directions, cut into their frames.
"""
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import threading

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.path.abspath(os.environ.get("BUILD", ROOT + "/build"))
CORPUS = ROOT + "/tests/fuzz/corpus"
PAGES = 13


def frames(stream):
    at = 0
    while at + 24 <= len(stream):
        kind, length, number = stream[at + 2], *struct.unpack(">II", stream[at + 4:at + 12])
        if at + 24 + length > len(stream):
            return
        yield kind, number, stream[at + 24:at + 24 + length]
        at += 24 + length


def relay(target, seen):
    """A listener whose connections are passed on to target; all that goes by is kept in seen."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(a, b, kept):
        try:
            while part := a.recv(65536):
                kept.extend(part)
                b.sendall(part)
        except OSError:
            pass
        for s in (a, b):
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def serve():
        while True:
            near = listener.accept()[0]
            far = socket.create_connection(target)
            for a, b in ((near, far), (far, near)):
                seen.append(bytearray())
                threading.Thread(target=pump, args=(a, b, seen[-1]), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return "127.0.0.1:%d" % listener.getsockname()[1]


def exchange():
    """A program's epochs (whole pages, a few bytes changed, zeros, pages moved), a listing, an export, a comparison, a removal, a refusal."""
    seen, work = [], tempfile.mkdtemp(prefix="memsync-seeds.")
    env = {k: v for k, v in os.environ.items() if not k.startswith("MEMSYNC_")}
    env.update(XDG_STATE_HOME=work + "/state", MEMSYNC_AGENT=work + "/agent.sock")
    remote = subprocess.Popen([BUILD + "/memsync-agent", "--listen", "127.0.0.1:0", "--store", "mem:"], stdout=subprocess.PIPE, text=True,
                              env={**env, "XDG_STATE_HOME": work + "/remote"})
    try:
        host, port = remote.stdout.readline().split()[2].rsplit(":", 1)
        address = relay((host, int(port)), seen)
        program = """
import mmap, os, sys
f = open(sys.argv[1], "w+b"); f.truncate(40960); m = mmap.mmap(f.fileno(), 40960)
m[:4096] = bytes(range(256)) * 16; m[8192:8300] = b"x" * 108; m.flush()
m[10:20] = b"0123456789"; m.flush()
m[12288:16384] = m[0:4096]; m[8192:12288] = bytes(4096); m.flush()
m[16384:20480] = (b"all work and no play " * 200)[:4096]; m.flush()
m[24576:28672] = os.urandom(4096); m.flush()
m[32768:36864] = m[24576:28672]; m.flush()
os.rename(sys.argv[1], sys.argv[1] + ".new")
"""
        os.mkdir(work + "/files")
        subprocess.run(["/usr/bin/python3", "-c", program, work + "/files/a"], check=True, env={
            **env, "LD_PRELOAD": BUILD + "/libmemsync_preload.so", "MEMSYNC_REMOTE": address, "MEMSYNC_REGIONS": work + "/files/*,name=%b"})
        tool = [BUILD + "/memsync"]
        subprocess.run(tool + ["stop"], env=env, check=True, stdout=subprocess.DEVNULL)
        for words in (["ls"], ["export", "a.new", work + "/copy"], ["verify", "a.new", "--file", work + "/copy"], ["import", work + "/copy", "d/e"], ["rm", "d/e"], ["rm", "none"]):
            subprocess.run(tool + words + ["--remote", address], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    finally:
        remote.terminate()
        remote.wait()
        shutil.rmtree(work)
    return seen


def save(target, name, data):
    os.makedirs("%s/%s" % (CORPUS, target), exist_ok=True)
    with open("%s/%s/%s" % (CORPUS, target, name), "wb") as f:
        f.write(bytes(data))


def record():
    seen, best = exchange(), {}
    for stream in seen:
        for kind, _, payload in frames(bytes(stream)):
            what = (kind, payload[20:24] if kind == PAGES else b"")
            if len(payload) <= 700 or (kind == PAGES and len(payload) <= 4200):
                best.setdefault(what, {}).setdefault(len(payload), payload)
    for (kind, what), found in best.items():
        for length in sorted(found)[:3]:
            save("frame", "%d-%d-%d" % (kind, what[3] if what else 0, length), bytes([kind]) + found[length])
    for i, stream in enumerate(s for s in seen[:2]):
        out = bytearray()
        some = [f for f in frames(bytes(stream)) if len(f[2]) < 256][:9]
        for kind, number, payload in some:
            out += bytes([kind, number & 255, 0, len(payload)]) + payload
        save("step", "exchange-%d" % i, bytes([len(some)]) + out)


# ---- the server target's words, see step() there

BEGIN, END, ABORT, QUIET, CUT = [0, 0], [8, 0, 0], [10, 0], [22, 0], [23, 0]


def op(handle, kind):  # 0: create, 1: unlink, 128 + to: rename
    return [2, handle, kind]


def region(handle, how=0, *more):
    return [3, handle, how, *more]


def pages(handle, *extents, packed=False):
    return [5, handle, len(extents) - 1 | (128 if packed else 0), *sum(extents, [])]


def data(page, fill):
    return [0, page, fill]


def some_bytes(where, length, fill):
    return [64, where, length >> 8, length & 255, fill]


def zeros(page):
    return [1, page]


def delta(page, fill, mask):
    return [2, page, fill, mask >> 8, mask & 255]


def copy(page, source, theirs=0):
    return [3, page, source, theirs]


def pin(name):
    return [13, 0, name]


def read(page):
    return [14, 0, 1, page]


def hashes(level, fresh=0):
    return [15, 0, 1 | fresh << 5, 16, level]


def epoch(*parts):
    return BEGIN + sum(parts, []) + END


PROGRAMS = {
    "writes": epoch(region(0), pages(0, data(1, 5), some_bytes(0xc3, 900, 6), zeros(3))) + QUIET + epoch(region(0, 32, 9), pages(0, data(8, 1))),
    "rests": epoch(region(0), pages(0, delta(1, 9, 0x8001), delta(2, 7, 0xffff))) + QUIET + epoch(region(0), pages(0, copy(4, 1), copy(5, 0))) + QUIET,
    "packs": epoch(region(0), pages(0, data(1, 5), data(2, 5), packed=True), pages(0, delta(3, 3, 0x0f00), packed=True)) + QUIET,
    "ahead": epoch(region(0), pages(0, data(1, 5))) + epoch(region(0), pages(0, delta(1, 6, 0x10))) + epoch(region(0), pages(0, copy(2, 1))) +
             epoch(region(0), pages(0, delta(2, 8, 0x30))) + QUIET,
    "refused": epoch(region(0), pages(0, copy(2, 1, 0xff))) + epoch(region(0), pages(0, delta(1, 6, 0x10))) + QUIET + epoch(region(0), pages(0, data(1, 1))),
    "cuts": epoch(region(0, 16, 2), pages(0, data(5, 5))) + QUIET + epoch(region(0, 16, 1), pages(0, delta(0, 6, 0x10))) + QUIET,
    "creates": epoch(op(1, 0), region(1), pages(1, data(0, 3))) + QUIET + epoch(op(1, 1)) + epoch(op(1, 0), region(1), pages(1, data(0, 3), delta(1, 1, 1))) + QUIET,
    "two": epoch(op(1, 0), region(1), region(0), pages(1, data(0, 3)), pages(0, data(0, 4)), region(2)) + QUIET + epoch(op(2, 0), region(2), region(1), pages(1, copy(1, 0))),
    "renames": epoch(op(0, 128 + 2)) + QUIET + epoch(region(0), pages(0, data(1, 1))) + QUIET,
    "pins": pin(0) + QUIET + read(0) + hashes(0) + hashes(1) + epoch(region(0), pages(0, data(1, 9))) + QUIET + read(1) + hashes(0, 1) + [16, 0, 0] + pin(3) + QUIET + read(0),
    "cut": epoch(region(0), pages(0, data(1, 5))) + epoch(region(0), pages(0, data(2, 5))) + CUT + epoch(region(0), pages(0, data(3, 5))) + BEGIN + region(0),
    "aborts": BEGIN + region(0) + pages(0, data(1, 5)) + ABORT + epoch(region(0), pages(0, data(2, 5))) + [18, 0, 3] + QUIET,
    "removes": [17, 0, 3] + QUIET + [17, 0, 0xc3] + QUIET + [17, 1, 0] + QUIET,
    "small": epoch(region(0, 32, 0xc1), pages(0, some_bytes(0xc0, 2000, 7))) + QUIET + epoch(region(0, 32 | 16, 0xc0, 9), pages(0, data(7, 5))) + QUIET,
    "jumps": epoch(region(0, 1, 40), pages(0, data(1, 5))) + QUIET + epoch(region(0), pages(0, delta(1, 5, 1))) + QUIET,
}

# The reconcile target's: sizes, how many pages are another's, which, and then what the answers are made into.
COMPARISONS = {
    "same": [0, 0, 0, 0],
    "few": [0, 0, 0, 5, 0, 3, 1, 0, 90, 2, 1, 40, 0, 1, 43, 7, 0, 0, 1],
    "longer": [1, 0, 40, 1, 2, 50, 9, 3, 0, 200, 1, 2, 0, 3, 1, 1, 0],
    "shorter": [0, 1, 0, 20, 9, 2, 1, 0, 4, 0, 19, 2],
    "lies": [0, 0, 0, 2, 0, 3, 1, 0, 90, 2, 0, 0, 0, 0, 0xe1, 0, 9, 3, 0, 0xe2, 0, 30, 0, 0xe4, 0xff],
}

# The client of block devices: what it is (see make() there), what it asks, and the server's bytes as nbdkit and qemu-nbd send them; or, with 1, that target's words.
GREETING = b"NBDMAGICIHAVEOPT\0\3"
READS = bytes([3, 0, 4, 15, 2, 0, 255, 3, 0, 3, 4, 0, 0])  # 16 bytes at 64, the status of 256, a WRITE, a FLUSH


def reply(option, kind, data=b""):
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


def export(size):
    return reply(7, 3, struct.pack(">HQH", 0, size, 0xDED)) + reply(7, 1)


def simple(cookie, error=0, data=b""):
    return struct.pack(">IIQ", 0x67446698, error, cookie) + data


def chunk(last, kind, cookie, data=b""):
    return struct.pack(">IHHQI", 0x668E33EF, last, kind, cookie, len(data)) + data


def extents(context, *pairs):
    return struct.pack(">I", context) + b"".join(struct.pack(">II", *p) for p in pairs)


UNSUP, CHUNKED = 0x80000001, reply(8, 1) + reply(10, 4, b"\0\0\0\1base:allocation") + reply(10, 1)
BLOCKS = reply(7, 3, struct.pack(">HIII", 3, 512, 4096, 32 << 20))
SAID = struct.pack(">IH", 22, 18) + b"operation past EOF"
CLIENTS = {
    "pieces": bytes([0, 9]) + READS + GREETING + CHUNKED + BLOCKS + export(65536) + chunk(0, 1, 1, struct.pack(">Q", 64) + b"A" * 8) +
              chunk(1, 2, 1, struct.pack(">QI", 72, 8)) + chunk(1, 5, 2, extents(1, (128, 0), (128, 3))) + simple(3) + simple(4),
    "joined": bytes([0, 9]) + READS + GREETING + CHUNKED + export(65536) + chunk(0, 1, 1, struct.pack(">Q", 72) + b"C" * 8) + chunk(0, 2, 1, struct.pack(">QI", 64, 4)) +
              chunk(0, 1, 1, struct.pack(">Q", 68) + b"B" * 4) + chunk(1, 0, 1) + simple(3),
    "short": bytes([0, 9]) + READS + GREETING + CHUNKED + export(65536) + simple(3) + chunk(1, 2, 1, struct.pack(">QI", 64, 15)),
    "behind": bytes([0, 9]) + READS + GREETING + CHUNKED + export(65536) + simple(3) + chunk(1, 5, 2, extents(1, (256, 0), (1, 3))),
    "blocks": bytes([0, 9]) + READS + GREETING + CHUNKED + reply(7, 3, struct.pack(">HIII", 3, 512, 0, 65536)) + export(65536) + simple(4),
    "contexts": bytes([0, 9]) + READS + GREETING + CHUNKED[:-20] + CHUNKED[20:] + export(65536) + simple(4),
    "errors": bytes([0, 9]) + READS + GREETING + CHUNKED + export(65536) + chunk(1, 0x8001, 1, SAID) + chunk(0, 0x8002, 2, SAID + bytes(8)) + chunk(1, 0, 2) + simple(3, 28),
    "simple": bytes([0, 9]) + READS + GREETING + reply(8, UNSUP) + export(65536) + simple(1, 0, b"0123456789abcdef") + simple(2, 95) + simple(3) + simple(4),
    "name": bytes([0, 9]) + READS + GREETING + reply(8, UNSUP) + reply(7, UNSUP) + struct.pack(">QH", 65536, 0xDED) + simple(1, 22),
    "notfixed": bytes([4, 9]) + READS + b"NBDMAGICIHAVEOPT\0\0" + struct.pack(">QH", 65536, 0xD6D) + bytes(124) + simple(4),
    "list": bytes([2, 9]) + READS + GREETING + reply(3, 2, b"\0\0\0\1r") + reply(3, 2, b"\0\0\0\3d/ea note") + reply(3, 1),
    "refused": bytes([0, 9]) + READS + GREETING + CHUNKED + reply(7, 0x80000006, b"export 'q' not present"),
    "oldstyle": bytes([0, 9]) + READS + b"NBDMAGIC\0\0\x42\2\x81\x86\x12\x53" + bytes(136),
    "answers": bytes([1, 9]) + READS + bytes([0x02, 0x00, 8, 0, 0x02, 0x81, 8, 8, 0x12, 0x83, 2, 128, 128, 0x20, 0x30]),
    "lies": bytes([1, 9]) + READS + bytes([0x02, 0x04, 3, 5, 0x0A, 0x00, 8, 0, 7, 1, 0x02, 0x86, 0, 0x21, 22, 0x27, 9]),
    "unstructured": bytes([3, 9]) + READS + bytes([0x30, 0x21, 28, 0x11, 95, 0x00, 0x07, 16]),
}

if __name__ == "__main__":
    for target in ("frame", "step", "server", "reconcile", "nbd_client"):  # those of nbd are written by hand
        shutil.rmtree(CORPUS + "/" + target, ignore_errors=True)
    record()
    for name, program in PROGRAMS.items():
        save("server", name, [0] + program)
    for name, answers in COMPARISONS.items():
        save("reconcile", name, answers)
    for name, client in CLIENTS.items():
        save("nbd_client", name, client)
    print(subprocess.run(["du", "-ab", "--max-depth=1", CORPUS], stdout=subprocess.PIPE, text=True).stdout, end="")
