"""Measures what memsync costs, against the program without it and against rsync, in one run, by turns; prints a table and writes $BUILD/bench/results.csv.

A row is item, variant, metric, value, unit. A mark compares a value with its threshold. CPU seconds are those of program, local agent and remote together;
wire bytes are what the loopback device carried meanwhile, headers and acknowledgements too.
"""
import argparse
import atexit
import csv
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.path.abspath(os.environ.get("BUILD", ROOT + "/build"))
SHIM = BUILD + "/libmemsync_preload.so"
PAGE, MIB, GIB = 4096, 1 << 20, 1 << 30
TICK = os.sysconf("SC_CLK_TCK")

rows, marks = [], []


def row(item, variant, metric, value, unit):
    rows.append((item, variant, metric, value, unit))
    print("  %-34s %-26s %-22s %12.3f %s" % (item, variant, metric, value, unit), flush=True)


def mark(item, what, value, limit, at_most=True):
    good = value <= limit if at_most else value >= limit
    marks.append((item, what, value, limit, at_most, good))
    print("  %s %s: %.3f (%s %g)" % ("PASS" if good else "FAIL", what, value, "at most" if at_most else "at least", limit), flush=True)


def clean_env(**more):
    env = {k: v for k, v in os.environ.items() if not k.startswith("MEMSYNC_") and k not in ("LD_PRELOAD", "XDG_RUNTIME_DIR")}
    env.update(more)
    return env


def cpu_of(pid):
    try:
        fields = open("/proc/%d/stat" % pid).read().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICK


def wire_bytes():
    for line in open("/proc/net/dev"):
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    return 0


class Bench:
    """A remote, a directory on disk, one in memory, and the programs of one item; all of it goes at its end."""

    def __init__(self, remote=True, store=None):
        self.dir = tempfile.mkdtemp(prefix="memsync-bench.", dir=os.environ.get("TMPDIR", "/tmp"))
        self.memory = tempfile.mkdtemp(prefix="memsync-bench.", dir="/dev/shm")
        self.socket, self.log = self.dir + "/agent.sock", self.dir + "/agent.log"
        self.children, self.remote, self.address = [], None, ""
        atexit.register(self.end)
        if remote:
            self.remote = subprocess.Popen([BUILD + "/memsync-agent", "--listen", "127.0.0.1:0", "--store", store or "file:" + self.dir + "/store"],
                                           stdout=subprocess.PIPE, text=True, env=clean_env(XDG_STATE_HOME=self.dir + "/remote-state"))
            line = self.remote.stdout.readline()
            if not line.startswith("listening wire "):
                sys.exit("bench: the remote agent did not start: %r" % line)
            self.address = line.split()[2]

    def shim_env(self, **more):
        return clean_env(**{**dict(LD_PRELOAD=SHIM, MEMSYNC_AGENT=self.socket, MEMSYNC_REMOTE=self.address, XDG_STATE_HOME=self.dir + "/state",
                                   MEMSYNC_REGIONS="%s/**;%s/**" % (self.dir + "/shim", self.memory + "/shim"), MEMSYNC_TIMEOUT="120s",
                                   MEMSYNC_INTERVAL="off", MEMSYNC_LOG="debug", MEMSYNC_LOG_FILE=self.log), **more})

    def place(self, kind, shim):
        path = "%s/%s" % (self.memory if kind == "memory" else self.dir, "shim" if shim else "native")
        os.makedirs(path, exist_ok=True)
        return path

    def local_agents(self):
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.readlink("/proc/%s/exe" % pid).split(" ")[0].endswith("/memsync-agent") and \
                        self.dir.encode() in open("/proc/%s/environ" % pid, "rb").read() and \
                        b"--listen" not in open("/proc/%s/cmdline" % pid, "rb").read():
                    found.append(int(pid))
            except OSError:
                pass
        return found

    def cpu(self, *programs):
        return sum(cpu_of(pid) for pid in [*programs, *self.local_agents(), *([self.remote.pid] if self.remote else [])])

    def captures(self):
        """The agent's lines about captures so far, as dictionaries of numbers."""
        out = []
        try:
            for line in open(self.log):
                if re.search(r"\bcapture \S+ regions=", line):
                    out.append({k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", line)})
        except OSError:
            pass
        return out

    def drain(self):
        subprocess.run([BUILD + "/memsync", "stop"], env=clean_env(MEMSYNC_AGENT=self.socket, XDG_STATE_HOME=self.dir + "/state"),
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300)

    def end(self):
        if not self.dir:
            return
        for child in self.children:
            child.close()
        for pid in self.local_agents():
            os.kill(pid, signal.SIGKILL)
        if self.remote:
            self.remote.kill()
            self.remote.wait()
        shutil.rmtree(self.dir, ignore_errors=True)
        shutil.rmtree(self.memory, ignore_errors=True)
        self.dir = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()


class Stepper:
    def __init__(self, bench, path, size, env):
        self.p = subprocess.Popen([BUILD + "/tests/programs/stepper", path, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  text=True, bufsize=1, env=env)
        bench.children.append(self)
        self.pid = int(self.p.stdout.readline().split()[1])

    def begin(self, *words):
        self.p.stdin.write(" ".join(map(str, words)) + "\n")

    def answer(self):
        line = self.p.stdout.readline().split()
        if len(line) != 3 or line[1] != "0":
            sys.exit("bench: a step failed: %s" % line)
        return int(line[2])

    def step(self, *words):
        self.begin(*words)
        return self.answer()

    def close(self):
        if self.p.poll() is None:
            try:
                self.p.stdin.write("q\n")
                self.p.stdin.close()
                self.p.wait(60)
            except (OSError, subprocess.TimeoutExpired):
                self.p.kill()
                self.p.wait()


def median(values):
    return statistics.median(values)


# ---- the items

def pairs(o):
    """mmap and munmap of what no rule matches."""
    with Bench() as b:
        took = {}
        for _ in range(o.rounds):
            for variant, env in (("native", clean_env()), ("shim", b.shim_env())):
                out = subprocess.run([BUILD + "/bench/pairs", b.place("disk", False) + "/file"], env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
                for line in out.splitlines():
                    took.setdefault((line.split()[0], variant), []).append(float(line.split()[1]))
        for (kind, variant), values in took.items():
            row("pairs", variant, kind, median(values), "ns")
        for kind, limit in (("anonymous", 100), ("file", 300)):
            mark("pairs", "mmap+munmap, %s: ns more than native" % kind, median(took[kind, "shim"]) - median(took[kind, "native"]), limit)


def rsync_server(b):
    s = socket.socket()
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
    s.close()
    os.makedirs(b.memory + "/rsynced")
    with open(b.dir + "/rsyncd.conf", "w") as f:
        f.write("use chroot = no\nuid = %d\ngid = %d\n[x]\npath = %s\nread only = no\n" % (os.getuid(), os.getgid(), b.memory + "/rsynced"))
    p = subprocess.Popen(["rsync", "--daemon", "--no-detach", "--config", b.dir + "/rsyncd.conf", "--port", str(port), "--address", "127.0.0.1"],
                         stderr=subprocess.DEVNULL)
    atexit.register(p.kill)
    for _ in range(500):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            time.sleep(0.01)
    return p, "rsync://127.0.0.1:%d/x/" % port


def one_percent_memory(o):
    """A sync point of a region with 1 % of its pages changed by 64 bytes each, file on tmpfs, against rsync on the same change."""
    size, dirty = o.size, o.size // PAGE // 100
    with Bench() as b:
        path = b.place("memory", True) + "/data"
        s = Stepper(b, path, size, b.shim_env(MEMSYNC_ACK="received"))
        s.step("s", 0, size, 1)
        s.step("m")
        daemon, url = rsync_server(b) if shutil.which("rsync") else (None, None)
        rsync = ["rsync", "--inplace", "--no-whole-file", "--ignore-times", path, url]
        if daemon:
            subprocess.run(["rsync", "--inplace", "--whole-file", path, url], check=True)
        mine, theirs, scans, cost, wire = [], [], [], [], []
        cost_rsync, wire_rsync = [], []
        for i in range(o.rounds + 1):
            s.step("r", dirty, 100 + i)
            cpu, bytes_ = b.cpu(s.pid), wire_bytes()
            took = s.step("m") / 1000
            time.sleep(0.3)  # what goes on behind the call is counted too
            if i:
                mine.append(took)
                cost.append(b.cpu(s.pid) - cpu)
                wire.append(wire_bytes() - bytes_)
            if daemon:
                bytes_, used, start = wire_bytes(), os.times(), time.monotonic()
                subprocess.run(rsync, check=True)
                if i:
                    theirs.append((time.monotonic() - start) * 1000)
                    cost_rsync.append(os.times().children_user + os.times().children_system - used.children_user - used.children_system)
                    wire_rsync.append(wire_bytes() - bytes_)
        scans = [c["scan"] / 1000 for c in b.captures()[-o.rounds:] if "scan" in c]
        item = "1 %% of %d MiB, tmpfs" % (size // MIB)
        row(item, "received", "sync point", median(mine), "ms")
        row(item, "received", "cpu", median(cost), "s")
        row(item, "received", "wire", median(wire) / 1e6, "MB")
        mark(item, "sync point (ms)", median(mine), 25)
        if scans:
            row(item, "received", "collect", median(scans), "ms")
            mark(item, "collect by uffd (ms)", median(scans), 5)
        else:
            print("  no capture line in the agent's debug log: collect is not measured")
            marks.append((item, "collect by uffd (ms)", float("nan"), 5, True, False))
        if daemon:
            row(item, "rsync --inplace", "the same change", median(theirs), "ms")
            row(item, "rsync --inplace", "cpu, client only", median(cost_rsync), "s")
            row(item, "rsync --inplace", "wire", median(wire_rsync) / 1e6, "MB")
            row(item, "rsync / received", "time", median(theirs) / median(mine), "x")
            daemon.terminate()


def one_percent_disk(o):
    """The same on the disk, against the native msync."""
    size, dirty = o.size, o.size // PAGE // 100
    with Bench() as b:
        s = {v: Stepper(b, b.place("disk", v != "native") + "/data", size, clean_env() if v == "native" else b.shim_env(MEMSYNC_ACK="received"))
             for v in ("native", "received")}
        for v in s:
            s[v].step("s", 0, size, 1)
            s[v].step("m")
        took = {v: [] for v in s}
        for i in range(o.rounds + 1):
            for v in s:
                s[v].step("r", dirty, 100 + i)
                t = s[v].step("m") / 1000
                if i:
                    took[v].append(t)
                time.sleep(0.3)
                os.sync()
        item = "1 %% of %d MiB, disk" % (size // MIB)
        for v in s:
            row(item, v, "sync point", median(took[v]), "ms")
        mark(item, "received / native", median(took["received"]) / median(took["native"]), 1.3)


def one_page(o):
    """A durable sync point of one page, replica on the same disk."""
    with Bench() as b:
        size = 64 * MIB
        s = {v: Stepper(b, b.place("disk", v != "native") + "/data", size, clean_env() if v == "native" else b.shim_env(MEMSYNC_ACK=v))
             for v in ("native", "durable", "received", "async")}
        for v in s:
            s[v].step("s", 0, size, 1)
            s[v].step("m")
            s[v].step("n", 20, 1)
        took, cost, wire = {v: [] for v in s}, {v: [] for v in s}, {v: [] for v in s}
        count = 10 if o.small else 50
        for i in range(o.rounds):
            for v in s:
                cpu, bytes_ = b.cpu(s[v].pid), wire_bytes()
                took[v].append(s[v].step("n", count, i * 1000) / 1000)
                cost[v].append((b.cpu(s[v].pid) - cpu) / count)
                wire[v].append((wire_bytes() - bytes_) / count)
        for v in s:
            row("one page, disk", v, "sync point", median(took[v]), "ms")
            row("one page, disk", v, "cpu", median(cost[v]) * 1000, "ms")
            row("one page, disk", v, "wire", median(wire[v]), "bytes")
        mark("one page, disk", "durable / native", median(took["durable"]) / median(took["native"]), 2.5)


def lmdb_commits(o):
    """LMDB with writemap, small transactions; the ratios are medians over rounds, each of which runs all three by turns."""
    for size in ([16 * MIB] if o.small else [64 * MIB, GIB]):
        item = "LMDB, %d MiB map" % (size // MIB)
        rate = {v: [] for v in ("native", "durable", "async")}
        for _ in range(o.rounds):
            for v in rate:
                with Bench(remote=v != "native") as b:
                    os.sync()
                    env = clean_env() if v == "native" else b.shim_env(MEMSYNC_ACK=v, MEMSYNC_LOG="warn")
                    p = subprocess.run(["/usr/bin/python3", ROOT + "/bench/commits.py", b.place("disk", v != "native") + "/db", str(size), "1" if o.small else "3"],
                                       env=env, stdout=subprocess.PIPE, text=True, check=True)
                    rate[v].append(float(p.stdout.split()[1]))
                    b.drain()
        for v in rate:
            row(item, v, "commits", median(rate[v]), "/s")
        for v, limit in (("durable", 0.40), ("async", 0.85)):
            ratio = median([a / n for a, n in zip(rate[v], rate["native"])])
            if size <= 64 * MIB:
                mark(item, "%s / native" % v, ratio, limit, at_most=False)
            else:
                row(item, v + " / native", "commits", ratio, "x")


def rewrite(o):
    """Pages rewritten in full ten times between sync points: with pauses in which the agents finish what goes on behind the sync points, and without."""
    size = 16 * MIB if o.small else 64 * MIB
    for kind in ("disk", "memory"):
        for how, pause in (("paused", 500), ("sustained", 0)):
            took = {}
            with Bench() as b:
                for _ in range(o.rounds):
                    for v in ("native", "async", "received", "durable"):
                        env = clean_env() if v == "native" else b.shim_env(MEMSYNC_ACK=v, MEMSYNC_LOG="warn")
                        out = subprocess.run([BUILD + "/bench/rewrite", b.place(kind, v != "native") + "/" + v, str(size), "10", "3", str(pause)],
                                             env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
                        for line in out.splitlines():
                            took.setdefault((v, line.split()[0]), []).append(float(line.split()[1]) / 1000)
            item = "rewritten ten times, %s, %s" % (kind, how)
            for (v, what), values in took.items():
                row(item, v, what, median(values), "ms")
            for v in ("async", "received", "durable"):
                for what in ("stores", "all"):
                    ratio = median([n / x for n, x in zip(took["native", what], took[v, what])])
                    if (kind, how, v, what) == ("disk", "paused", "durable", "stores"):
                        mark(item, "rate of the stores, durable / native", ratio, 0.95, at_most=False)
                    else:
                        row(item, v + " / native", "rate of " + what, ratio, "x")


def slope(o):
    """Collect of 1,000 dirty pages in sparse regions of growing size."""
    sizes = [s * (MIB * 64 if o.small else GIB) for s in (1, 2, 4, 8, 16)]
    scan = {}
    for size in sizes:
        with Bench() as b:
            s = Stepper(b, b.place("memory", True) + "/data", size, b.shim_env(MEMSYNC_ACK="received"))
            s.step("m")
            for i in range(o.rounds + 1):
                s.step("r", 1000, i)
                s.step("m")
            values = [c["scan"] / 1000 for c in b.captures()[-o.rounds:] if "scan" in c]
            if not values:
                print("  no capture line in the agent's debug log")
                marks.append(("slope", "collect (ms a GiB)", float("nan"), 1, True, False))
                return
            scan[size] = median(values)
        row("collect, 1000 pages dirty", "%d MiB" % (size // MIB), "scan", scan[size], "ms")
    x, y = [s / GIB for s in sizes], [scan[s] for s in sizes]
    mx, my = statistics.mean(x), statistics.mean(y)
    mark("collect, 1000 pages dirty", "slope (ms a GiB)", sum((a - mx) * (c - my) for a, c in zip(x, y)) / sum((a - mx) ** 2 for a in x), 1)


def two_programs(o):
    """The first transfer of a large file by one program, beside another's one-page sync points, on one agent. Where the disk is shared, what the native
    msync then takes is reported too: the disk's own queue is nobody's fault."""
    size = o.size
    for kind, store in (("memory", "mem:"), ("memory", None), ("disk", None)):
        with Bench(store=store) as b:
            big = b.place(kind, True) + "/big"
            with open(big, "wb") as f:
                block = os.urandom(MIB)
                for i in range(size // MIB):
                    f.write(block[i:] + block[:i])
                os.fsync(f.fileno())
            os.sync()
            env = b.shim_env(MEMSYNC_ACK="received", MEMSYNC_LOG="warn")
            small = {"received": Stepper(b, b.place(kind, True) + "/small", MIB, env), "native": Stepper(b, b.place(kind, False) + "/small", MIB, clean_env())}
            alone, beside = {v: [] for v in small}, {v: [] for v in small}
            for v in small:
                small[v].step("m")
                small[v].step("n", 50, 0)
                alone[v] = [small[v].step("n", 20, i) / 1000 for i in range(o.rounds)]
            start = time.monotonic()
            bulk = Stepper(b, big, size, env)
            bulk.begin("m")
            os.set_blocking(bulk.p.stdout.fileno(), False)
            while not bulk.p.stdout.readline():
                for v in small:
                    beside[v].append(small[v].step("n", 3, len(beside[v])) / 1000)
            took = time.monotonic() - start
            item = "two programs, %s, %s store" % (kind, "mem:" if store else "file:")
            row(item, "bulk", "first transfer", size / took / 1e6, "MB/s")
            for v in small:
                row(item, v + " alone", "one-page sync point", median(alone[v]), "ms")
                row(item, v + " beside the bulk", "one-page sync point", median(beside[v] or [float("nan")]), "ms")
                row(item, v + " beside the bulk", "worst median of 3", max(beside[v] or [float("nan")]), "ms")
            ratio = median(beside["received"] or [float("nan")]) / median(alone["received"])
            if kind == "memory":
                mark(item, "beside / alone", ratio, 2)
            else:
                row(item, "received, beside / alone", "time", ratio, "x")
                row(item, "native, beside / alone", "time", median(beside["native"] or [float("nan")]) / median(alone["native"]), "x")


ITEMS = {"pairs": pairs, "one-percent-memory": one_percent_memory, "one-percent-disk": one_percent_disk, "one-page": one_page, "lmdb": lmdb_commits,
         "rewrite": rewrite, "slope": slope, "two-programs": two_programs}


def main():
    parser = argparse.ArgumentParser(description="memsync's measurements")
    parser.add_argument("item", nargs="*", help="which ones (all): " + " ".join(ITEMS))
    parser.add_argument("--small", action="store_true", help="small sizes: to see that it works, not for the numbers")
    parser.add_argument("--rounds", type=int, default=5)
    o = parser.parse_args()
    if o.item == ["list"]:
        print("\n".join(ITEMS))
        return 0
    unknown = [i for i in o.item if i not in ITEMS]
    if unknown:
        parser.error("no such item: %s (there are: %s)" % (" ".join(unknown), " ".join(ITEMS)))
    o.size = 64 * MIB if o.small else GIB
    print("%s, %d CPUs, load %.2f" % (os.uname().release, os.cpu_count(), os.getloadavg()[0]))
    for name in o.item or ITEMS:
        print("%s: %s" % (name, ITEMS[name].__doc__))
        ITEMS[name](o)
    out = BUILD + "/bench/results.csv"
    os.makedirs(os.path.dirname(out), exist_ok=True)
    with open(out, "w", newline="") as f:
        w = csv.writer(f)
        w.writerow(("item", "variant", "metric", "value", "unit"))
        w.writerows(rows)
        w.writerows((i, "threshold %g" % limit, what, value, "pass" if good else "fail") for i, what, value, limit, _, good in marks)
    print("\n%-34s %-44s %12s %12s" % ("item", "threshold", "measured", "limit"))
    for item, what, value, limit, at_most, good in marks:
        print("%-34s %-44s %12.3f %s %9g  %s" % (item, what, value, "<=" if at_most else ">=", limit, "pass" if good else "FAIL"))
    print("%d of %d thresholds met; %s" % (sum(m[5] for m in marks), len(marks), out))
    return 0 if all(m[5] for m in marks) else 1


sys.exit(main())
