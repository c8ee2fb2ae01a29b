"""Remote regions at local paths: what a program notices, beside nbdkit and nbdfuse, with a local file and loopback TCP as limits. Round trips are made by the relay."""
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

from kit import BUILD, MIB, PAGE, Bench, clean_env, mark, median, row

MAPPED = BUILD + "/bench/mapped"
TRIPS = (0, 1, 5, 10, 25, 40)  # ms


def mapped(*words, env=None):
    """The numbers that it says (the last of seq is a sum)."""
    done = subprocess.run([MAPPED, *map(str, words)], env=env or clean_env(), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit("bench: mapped %s: exit %d" % (" ".join(map(str, words)), done.returncode))
    return done.stdout.split()


def soon(what, seconds=10):
    until = time.monotonic() + seconds
    while not what():
        if time.monotonic() > until:
            sys.exit("bench: it never came to be ready")
        time.sleep(0.01)


class Far:
    """A link of so many milliseconds there and back; None: no relay, the address itself."""

    def __init__(self, target, ms):
        self.p, self.address = None, target
        if ms is not None:
            self.p = subprocess.Popen([BUILD + "/bench/relay", target, "--delay", str(ms / 2)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.address = self.p.stdout.readline().split()[1]

    def __enter__(self):
        return self.address

    def __exit__(self, *_):
        if self.p:
            self.p.kill()
            self.p.wait()


class Mount(Bench):
    """Files on this host, the same ones as regions at a remote, and whoever else serves them."""

    def __init__(self, **sizes):
        super().__init__(store="memory")
        self.near, self.far = self.memory + "/near", self.dir + "/far"
        os.makedirs(self.near)
        for name, size in {"warm": PAGE, **sizes}.items():
            with open("%s/%s" % (self.near, name), "wb") as f:
                subprocess.run(["head", "-c", str(size), "/dev/urandom"], stdout=f, check=True)
            self.send(name)
        self.peer = all(map(shutil.which, ("nbdkit", "nbdfuse", "fusermount3"))) and os.path.exists("/dev/fuse")
        if not self.peer:
            print("  no nbdkit, nbdfuse or /dev/fuse: without them")

    def send(self, name):
        subprocess.run([BUILD + "/memsync", "import", "--remote", self.address, self.near + "/" + name, name], env=clean_env(XDG_STATE_HOME=self.dir + "/state"),
                       stdout=subprocess.DEVNULL, check=True)

    def env(self, address, mode="pull", order="fault", **more):
        return self.shim_env(MEMSYNC_REMOTE=address, MEMSYNC_LOG="warn", MEMSYNC_REGIONS="%s/*=%s,name=%%b,order=%s" % (self.far, mode, order), **more)

    def fresh(self):
        """The local agent and all that it had fetched go."""
        agents = self.local_agents()
        self.kill_local()
        soon(lambda: not any(os.path.exists("/proc/%d" % a) for a in agents))

    def pulled(self, address, what, name, *words, order="fault", **more):
        """mapped on a region at an agent that is connected, and has nothing of it."""
        got = mapped(what, self.far + "/" + name, *words, self.far + "/warm", env=self.env(address, order=order, **more))
        self.fresh()
        return got


class Fuse:
    """A file served by nbdkit and mounted by nbdfuse, nothing of it cached: with it, the path."""

    def __init__(self, bench, name, ms):
        self.bench = bench
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.server = subprocess.Popen(["nbdkit", "-f", "-r", "-i", "127.0.0.1", "-p", str(port), "file", "%s/%s" % (bench.near, name)], **quiet)
        soon(lambda: self.answers(port))
        self.link = Far("127.0.0.1:%d" % port, ms)
        self.dir = bench.dir + "/fuse"
        os.makedirs(self.dir, exist_ok=True)
        self.fuse = subprocess.Popen(["nbdfuse", "-r", self.dir + "/file", "nbd://" + self.link.address], **quiet)
        soon(lambda: os.path.exists(self.dir + "/file"))

    @staticmethod
    def answers(port):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return True
        except OSError:
            return False

    def __enter__(self):
        return self.dir + "/file"

    def __exit__(self, *_):
        subprocess.run(["fusermount3", "-u", "-z", self.dir], check=True)
        for p in (self.fuse, self.server):
            p.terminate()
            p.wait()
        self.link.__exit__()


class Tcp:
    """Plain TCP over the same link: with it, the address."""

    def __init__(self, ms):
        self.p = subprocess.Popen([MAPPED, "serve"], stdout=subprocess.PIPE, text=True)
        self.link = Far(self.p.stdout.readline().split()[1], ms)

    def __enter__(self):
        return self.link.address

    def __exit__(self, *_):
        self.link.__exit__()
        self.p.send_signal(signal.SIGKILL)
        self.p.wait()


def trip_name(ms):
    return "no relay" if ms is None else "%d ms" % ms


def pull(o):
    """The first read of a region through a mapping, from its beginning to its end, all that was fetched ahead included."""
    rate, sums = {}, set()

    def note(variant, ms, got):
        rate.setdefault((variant, ms), []).append(float(got[1]) / float(got[2]) / 1000)

    with Mount(data=o.size) as b:
        path, all_of_it = b.near + "/data", (o.size, 60)
        b.pulled(b.address, "seq", "data", *all_of_it)  # memory that nobody has used yet is slow
        for _ in range(min(o.rounds, 3)):
            got = mapped("seq", path, *all_of_it)
            note("local file", None, got)
            sums.add(got[3])
            for ms in (None, *TRIPS):
                with Far(b.address, ms) as address:
                    got = b.pulled(address, "seq", "data", *all_of_it)
                    note("memsync", ms, got)
                    sums.add(got[3])
        for ms in (None, *TRIPS):
            with Tcp(ms) as address:
                note("TCP", ms, [0, o.size, mapped("stream", address, o.size)[0]])
            if b.peer:
                with Fuse(b, "data", ms) as there:
                    note("nbdkit + nbdfuse", ms, mapped("seq", there, o.size, 5 if ms is None else 3))
    for (variant, ms), values in rate.items():
        row("first read, %d MiB" % (o.size // MIB), variant, trip_name(ms) if variant != "local file" else "", median(values), "GB/s")
    ours = {ms: median(rate["memsync", ms]) for ms in (None, *TRIPS)}
    mark("first read", "sums that differ", len(sums) - 1, 0)
    mark("first read", "without the relay (GB/s)", ours[None], 1.0, at_most=False)
    mark("first read", "at 25 ms / at 0 ms", ours[25] / ours[0], 0.7, at_most=False)
    if b.peer:
        for ms in (None, *TRIPS):
            mark("first read", "memsync / nbdfuse, " + trip_name(ms), ours[ms] / median(rate["nbdkit + nbdfuse", ms]), 1, at_most=False)


def touch(o):
    """The first touch of single pages at random, nothing fetched ahead."""
    took = {}
    count = 200 if o.small else 2000
    with Mount(data=o.size) as b:
        for i in range(o.rounds):
            for ms in (None, 1, 25):
                n = count if ms is None else count // 5 if ms == 1 else 40
                with Far(b.address, ms) as address:
                    took.setdefault(("memsync", ms), []).append(b.pulled(address, "touch", "data", n, i, "normal", order="none"))
                with Tcp(ms) as address:
                    took.setdefault(("TCP, 4 KiB there and back", ms), []).append(mapped("trips", address, n))
                if ms is None:
                    took.setdefault(("userfault here", ms), []).append(mapped("fault", n))
                if b.peer:
                    with Fuse(b, "data", ms) as there:
                        took.setdefault(("nbdkit + nbdfuse", ms), []).append(mapped("touch", there, n, i, "random"))
    p50 = {}
    for (variant, ms), values in took.items():
        for k, p in enumerate(("p50", "p99")):
            row("first touch", variant, "%s, %s" % (trip_name(ms), p), median([float(v[k]) for v in values]), "us")
        p50[variant, ms] = median([float(v[0]) for v in values])
    for ms in (None, 1, 25):
        parts = p50["TCP, 4 KiB there and back", ms] + p50["userfault here", None]
        mark("first touch", "p50 / (TCP + userfault), " + trip_name(ms), p50["memsync", ms] / parts, 1.2)
        if b.peer and ms != 25:  # there both are the round trip
            mark("first touch", "p50 / nbdfuse's, " + trip_name(ms), p50["memsync", ms] / p50["nbdkit + nbdfuse", ms], 1)


def opens(o):
    """From open to the first byte, of regions that the connected agent has not seen."""
    names = ["r%d" % i for i in range(16)]
    with Mount(**{name: 4 * MIB for name in names}) as b:
        got = {}
        for _ in range(o.rounds):
            for ms in (None, 0, 1, 25):
                with Far(b.address, ms) as address:
                    got.setdefault(ms, []).append(mapped("open", b.far + "/warm", *[b.far + "/" + n for n in names], env=b.env(address)))
                    b.fresh()
                with Tcp(ms) as address:
                    got.setdefault(("TCP", ms), []).append(mapped("trips", address, 16))
    for ms in (None, 0, 1, 25):
        p50 = median([float(v[0]) for v in got[ms]]) / 1000
        trip = median([float(v[0]) for v in got["TCP", ms]]) / 1000
        row("open to first byte", "memsync", trip_name(ms) + ", p50", p50, "ms")
        row("open to first byte", "memsync", trip_name(ms) + ", p99", median([float(v[1]) for v in got[ms]]) / 1000, "ms")
        row("open to first byte", "TCP, 4 KiB there and back", trip_name(ms) + ", p50", trip, "ms")
        mark("open to first byte", "more than a round trip, %s (ms)" % trip_name(ms), p50 - trip, 1)


def beside_stream(address, size, count):
    """Round trips with 4 KiB beside a stream of that many bytes, plain TCP: what the link and the processors cost anybody."""
    busy = subprocess.Popen([MAPPED, "stream", address, str(2 * size)], stdout=subprocess.DEVNULL, env=clean_env())
    time.sleep(0.1)
    got = mapped("trips", address, count)
    busy.kill()
    busy.wait()
    return float(got[1])


def beside_pull(o):
    """Single pages touched at random while all the rest streams in."""
    got = {}
    with Mount(data=o.size) as b:
        for i in range(o.rounds):
            for ms in (None, 0, 1, 25):
                with Far(b.address, ms) as address:
                    got.setdefault(ms, []).append(b.pulled(address, "beside", "data", 30, i))
                if i == 0:
                    with Tcp(ms) as address:
                        got["TCP", ms] = float(mapped("trips", address, 50)[0])
                        got["beside", ms] = beside_stream(address, o.size, 20 if ms == 25 else 200)
    for ms in (None, 0, 1, 25):
        trip, item = got["TCP", ms] / 1000, "fault beside the pull, " + trip_name(ms)
        rate = median([o.size / float(v[3]) / 1000 for v in got[ms]])
        row(item, "memsync", "faults a run", median([float(v[0]) for v in got[ms]]), "")
        row(item, "memsync", "p50", median([float(v[1]) for v in got[ms]]) / 1000, "ms")
        p99 = median([float(v[2]) for v in got[ms]]) / 1000
        row(item, "memsync", "p99", p99, "ms")
        row(item, "memsync", "rate of the pull", rate, "GB/s")
        row(item, "TCP beside a TCP stream", "p99", got["beside", ms] / 1000, "ms")
        mark(item, "p99, more than a round trip (ms)", p99 - trip, 3)


def writeback(o):
    """Regions that are written to: the sync point that sends all of one, rewritten; and what a store costs, beside one to a memfd."""
    size, rate, cost = o.size // 2, {}, {}
    with Mount(data=size, spare=size) as b:
        mapped("store", b.far + "/spare", size, 1, env=b.env(b.address, mode="mirror"))  # memory that nobody has used yet is slow
        b.drain()
        b.fresh()
        for ms in (None, *TRIPS):
            with Far(b.address, ms) as address:
                mine = [float(x) for x in mapped("store", b.far + "/data", size, 3, env=b.env(address, mode="mirror", MEMSYNC_ACK="received"))]
                b.drain()
                b.fresh()
            theirs = [float(x) for x in mapped("store", "-", size, 3)]
            rate[ms] = size / mine[2] / 1000
            row("write-back, %d MiB" % (size // MIB), "mirror", trip_name(ms), rate[ms], "GB/s")
            for k in range(2):
                cost.setdefault(("mirror", k), []).append(mine[k] / (size / PAGE) * 1000)
                cost.setdefault(("memfd", k), []).append(theirs[k] / (size / PAGE) * 1000)
    for (variant, k), values in cost.items():
        row("a store a page", variant, ("first after a sync point", "again")[k], median(values), "ns")
    for ms in (None, 0, 25, 40):
        mark("write-back", "%s (GB/s)" % trip_name(ms), rate[ms], 0.5, at_most=False)
    mark("a store to a resident page", "mirror / memfd", median([m / t for m, t in zip(cost["mirror", 1], cost["memfd", 1])]), 1.2)


QUERIES = {
    "lmdb": ["/usr/bin/python3", "-c", """
import lmdb, random, sys
env = lmdb.open(sys.argv[1], readonly=True, lock=False, subdir=False)
random.seed(1)
with env.begin() as t:
    print(sum(len(t.get(b'%08d' % random.randrange(int(sys.argv[2])))) for _ in range(200)))"""],
    "sqlite": ["sqlite3"],
}


def databases(b, rows):
    subprocess.run(["/usr/bin/python3", "-c", """
import lmdb, os, sys
env = lmdb.open(sys.argv[1], subdir=False, map_size=1 << 30, lock=False)
with env.begin(write=True) as t:
    for i in range(int(sys.argv[2])):
        t.put(b'%08d' % i, os.urandom(200))""", b.near + "/lmdb", str(rows)], check=True)
    script = """create table t(id integer primary key, k text, v blob);
with recursive n(i) as (select 1 union all select i + 1 from n where i < %d) insert into t select i, printf('%%08d', (i * 7919) %% %d), randomblob(200) from n;
create index k on t(k);""" % (rows, rows)
    subprocess.run(["sqlite3", b.near + "/sqlite"], input=script, text=True, check=True)
    b.send("lmdb")
    b.send("sqlite")


def recorded(o):
    """The second start of a query over 25 ms: pages asked for in the order in which the first run touched them, or one by one."""
    rows, took, said = 20000 if o.small else 200000, {}, {}
    with Mount() as b, Far(b.address, 25) as address:
        databases(b, rows)
        wanted = ",".join("'%08d'" % (i * 3571 % rows) for i in range(150))
        for what in QUERIES:
            path = b.far + "/" + what
            command = [*QUERIES[what], path, str(rows)] if what == "lmdb" else \
                ["sqlite3", "-cmd", "pragma mmap_size=1000000000", "file:%s?immutable=1" % path, "select sum(length(v)) from t where k in (%s)" % wanted]
            for order in ("none", "recorded", "fault"):
                for i in range(2 if order == "none" else 4 if order == "recorded" else 3):
                    if order != "none" or i == 0:
                        mapped("seq", b.far + "/warm", 1, 1, env=b.env(address, order=order))  # the agent is up
                    start = time.monotonic()
                    out = subprocess.run(command, env=b.env(address, order=order), stdout=subprocess.PIPE, text=True, check=True).stdout
                    if i or order == "none":
                        took.setdefault((what, order), []).append((time.monotonic() - start) * 1000)
                    said.setdefault(what, set()).add(out)
                    b.drain()  # it keeps the order when the last viewer goes
                    b.fresh()
                    if order == "none" and i:
                        break
        for (what, order), values in took.items():
            row("second start over 25 ms", what, "order=" + order, median(values), "ms")
        for what in QUERIES:
            mark("second start over 25 ms", what + ": answers that differ", len(said[what]) - 1, 0)
            mark("second start over 25 ms", what + ": none / recorded", median(took[what, "none"]) / median(took[what, "recorded"]), 5, at_most=False)


ITEMS = {"pull": pull, "touch": touch, "open": opens, "beside-pull": beside_pull, "recorded": recorded, "writeback": writeback}
