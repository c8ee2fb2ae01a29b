"""A client of the block device protocol that does what none should:  nbdpeer.py HOST:PORT handshake|hostile|flood"""
import os
import random
import socket
import struct
import sys
import time

HOST, PORT = sys.argv[1].rsplit(":", 1)
OPTION, REQUEST = b"IHAVEOPT", 0x25609513


def dial(flags=3):
    s = socket.create_connection((HOST, int(PORT)), timeout=20)
    hello = take(s, 18)
    assert hello[:16] == b"NBDMAGICIHAVEOPT", hello
    if flags is not None:
        s.sendall(struct.pack(">I", flags))
    return s


def take(s, n):
    got = b""
    while len(got) < n:
        more = s.recv(n - len(got))
        if not more:
            raise EOFError(got)
        got += more
    return got


def option(s, number, data=b""):
    s.sendall(OPTION + struct.pack(">II", number, len(data)) + data)


def reply(s):
    magic, number, kind, n = struct.unpack(">QIII", take(s, 20))
    assert magic == 0x3E889045565A9, hex(magic)
    return number, kind, take(s, n)


def name(text, infos=()):
    return struct.pack(">I", len(text)) + text + struct.pack(">H", len(infos)) + b"".join(struct.pack(">H", i) for i in infos)


def go(s, export=b"disk"):
    option(s, 7, name(export))
    while True:
        _, kind, data = reply(s)
        if kind != 3:
            assert kind == 1, (hex(kind), data)
            return s


def request(s, command, cookie=0, offset=0, length=0, flags=0, payload=b""):
    s.sendall(struct.pack(">IHHQQI", REQUEST, flags, command, cookie, offset, length) + payload)


def simple(s, cookie=None):
    magic, error, got = struct.unpack(">IIQ", take(s, 16))
    assert magic == 0x67446698 and (cookie is None or got == cookie), (hex(magic), got)
    return error


def closed(s):
    """It is closed; whatever still comes before that is of no interest."""
    try:
        while s.recv(65536):
            pass
    except ConnectionError:
        pass


def handshake():
    whole = struct.pack(">I", 3) + OPTION + struct.pack(">II", 8, 0) + OPTION + struct.pack(">II", 3, 0)
    whole += OPTION + struct.pack(">II", 7, len(name(b"disk"))) + name(b"disk")
    whole += struct.pack(">IHHQQI", REQUEST, 0, 1, 1, 0, 65536) + b"x" * 100
    for cut in range(len(whole)):  # gone in every state, and in the middle of each
        s = dial(None)
        s.sendall(whole[:cut])
        s.close()
    s = dial(None)  # one byte at a time
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for i in range(len(whole) - 128):
        s.sendall(whole[i : i + 1])
    assert reply(s)[1] == 1
    s.close()
    closed(dial(0xFFFFFFFF))  # flags that nobody knows
    for flags in (0, 1, 2, 3):  # the old way
        s = dial(flags)
        option(s, 1, b"disk")
        size, _ = struct.unpack(">QH", take(s, 10))
        assert size == 64 << 20, size
        if not flags & 2:
            assert take(s, 124) == bytes(124)
        request(s, 0, 7, 0, 4096)
        assert simple(s, 7) == 0 and len(take(s, 4096)) == 4096
        request(s, 2)
        closed(s)
    s = dial()
    option(s, 1, b"none")
    closed(s)


def refused(s, number, data, *kinds):
    option(s, number, data)
    got = reply(s)
    assert got[0] == number and got[1] & 0xFFFF in kinds and got[1] >> 31, (number, hex(got[1]), got[2])


def hostile():
    s = dial()
    refused(s, 5, b"", 1)  # STARTTLS
    refused(s, 5, b"x", 1, 3)
    refused(s, 11, b"", 1)
    refused(s, 0xFFFFFFFF, b"abc", 1)
    refused(s, 7, name(b"none"), 6)
    refused(s, 7, b"", 3)
    refused(s, 7, struct.pack(">I", 0xFFFFFFFF) + b"disk\0\0", 3)
    refused(s, 7, name(b"di\0k"), 3)
    refused(s, 7, name(b"../../etc/passwd"), 6)
    refused(s, 7, name(b"x" * 4096), 6)
    refused(s, 7, name(b"x" * 4097), 3)
    refused(s, 7, struct.pack(">I", 4) + b"disk" + struct.pack(">H", 65535), 3)
    refused(s, 3, b"x", 3)
    refused(s, 10, struct.pack(">I", 4) + b"disk" + struct.pack(">I", 0), 3)  # no structured replies yet
    refused(s, 6, b"y" * 1000000, 9)
    option(s, 8)
    assert reply(s)[1] == 1
    refused(s, 10, struct.pack(">I", 4) + b"disk" + struct.pack(">I", 0xFFFFFFFF), 9, 3)
    refused(s, 10, struct.pack(">I", 4) + b"disk" + struct.pack(">II", 1, 0xFFFFFFF0) + b"base:", 3)
    go(s)
    request(s, 7, 1, 0, 4096)  # no context was chosen
    assert take(s, 20)[:8] == struct.pack(">IHH", 0x668E33EF, 1, 0x8001)
    s.close()
    s = dial()
    s.sendall(OPTION + struct.pack(">II", 6, 0xFFFFFFFF))
    closed(s)
    s = dial()
    s.sendall(b"IHAVENOT" + struct.pack(">II", 6, 0))
    closed(s)
    s = go(dial())
    bad = [(0, 0, 0, 0), (0, 1 << 63, 4096, 0), (0, (64 << 20) - 1, 2, 0), (0, 0, 0xFFFFFFFF, 0), (0, 0, 4096, 4), (99, 0, 0, 0), (7, 0, 1, 0),
           (4, 1 << 40, 0xFFFFFFFF, 0), (6, 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF, 0), (3, 5, 0, 0), (3, 0, 5, 0), (6, 0, 4096, 0x8000)]
    for i, (command, offset, length, flags) in enumerate(bad):
        request(s, command, i, offset, length, flags)
        assert simple(s, i) in (22, 28), bad[i]
    request(s, 1, 50, 64 << 20, 5, 0, b"12345")  # its payload is not taken for a request
    assert simple(s, 50) == 28
    request(s, 1, 51, 0, 40 << 20, 0, bytes(40 << 20))
    assert simple(s, 51) == 22
    request(s, 0, 52, 0, 100)
    assert simple(s, 52) == 0 and len(take(s, 100)) == 100
    s.sendall(b"\0" * 28)
    closed(s)
    random.seed(5)
    for i in range(100):
        s = go(dial()) if i % 2 else dial()
        s.sendall(random.randbytes(random.randrange(1, 300)))
        s.close()


def flood():
    """Asks for everything and reads nothing: bounded by what it may have under way, and nobody else is kept from work."""
    idle = [dial(None) for _ in range(50)]
    asking = [go(dial()) for _ in range(30)]
    for s in asking:
        s.settimeout(0.2)
        try:
            for i in range(2000):
                request(s, 0, i, 0, 8 << 20)
        except TimeoutError:
            pass
    names = dial()
    names.settimeout(0.2)
    try:
        for _ in range(200000):
            option(names, 3)
    except TimeoutError:
        pass
    begin = time.time()
    s = go(dial())
    for i in range(20):
        request(s, 0, i, 0, 4096)
        assert simple(s, i) == 0 and len(take(s, 4096)) == 4096
    assert time.time() - begin < 30, time.time() - begin
    many = []
    try:  # more connections than it takes: those are closed, the others live
        for _ in range(400):
            many.append(dial(None))
    except (EOFError, ConnectionError):
        pass
    assert 100 < len(many) < 400, len(many)
    request(s, 0, 99, 0, 4096)
    assert simple(s, 99) == 0
    for c in idle + asking + many + [names, s]:
        c.close()


{"handshake": handshake, "hostile": hostile, "flood": flood}[sys.argv[2]]()
