"""Sync points and bulk: what a program notices."""
import os
import statistics
import subprocess
import time

from kit import BUILD, GIB, MIB, PAGE, ROOT, Bench, Stepper, clean_env, mark, marks, median, row, wire_bytes


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


ITEMS = {"pairs": pairs, "one-percent-disk": one_percent_disk, "one-page": one_page, "lmdb": lmdb_commits, "rewrite": rewrite, "slope": slope, "two-programs": two_programs}
