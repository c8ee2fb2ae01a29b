"""What is sent for what changed: deltas, comparing by hash trees, moves, packing, the first transfer, and reads beside it."""
import os
import re
import shutil
import subprocess
import time

from kit import BUILD, GIB, MIB, PAGE, ROOT, Bench, Relay, Rsync, Stepper, clean_env, mark, median, row, wire_bytes


def changed(o):
    """A sync point by the share of pages changed, 64 bytes in each, file on tmpfs, and rsync on the same change."""
    pages = o.size // PAGE
    with Bench() as b:
        path = b.place("memory", True) + "/data"
        s = Stepper(b, path, o.size, b.shim_env(MEMSYNC_ACK="received"))
        s.step("s", 0, o.size, 1)
        s.step("m")
        rsync = Rsync(b, path)
        for count, name in ((26, "26 pages"), (pages // 1000, "0.1 %"), (pages // 100, "1 %"), (pages // 10, "10 %")):
            item = "%s of %d MiB on tmpfs" % (name, o.size // MIB)
            took, cost, wire = [], [], []
            for i in range(o.rounds + 1):
                s.step("r", count, count + i)
                cpu, bytes_ = b.cpu(s.pid), wire_bytes()
                time_ = s.step("m") / 1000
                time.sleep(0.3)  # what goes on behind the call is counted too
                if i:
                    took.append(time_)
                    cost.append(b.cpu(s.pid) - cpu)
                    wire.append(wire_bytes() - bytes_)
                if i <= 2:
                    rsync.again(item, count=i > 0)
            row(item, "memsync", "time", median(took), "ms")
            row(item, "memsync", "cpu", sum(cost) / len(cost), "s")
            row(item, "memsync", "wire", median(wire) / 1e6, "MB")
            row(item, "memsync", "share", 100 * count / pages, "%")
            rsync.report(item)
            if name == "1 %":
                scans = [c["scan"] / 1000 for c in b.captures()[-o.rounds:] if "scan" in c]
                mark(item, "sync point (ms)", median(took), 15)
                mark(item, "wire (MB)", median(wire) / 1e6, 0.9)
                mark(item, "collect by uffd (ms)", median(scans or [float("nan")]), 5)
            elif name == "26 pages":
                mark(item, "sync point (ms)", median(took), 2)
                mark(item, "wire (KB)", median(wire) / 1e3, 10)


RECONCILED = re.compile(r"reconciled (\S+): (\d+) of (\d+) pages differ, (\d+) bytes out, (\d+) bytes in, ([\d.]+) ms")


def reconciled(b, name, after):
    """The agent's next line about the region, and how many lines there are."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        found = [m.groups() for m in map(RECONCILED.search, open(b.log)) if m and m.group(1).endswith(name)]
        if len(found) > after:
            return [float(x) for x in found[-1][1:]], len(found)
        time.sleep(0.05)
    raise SystemExit("bench: no line about %s being reconciled within 120 s" % name)


def reconcile(o):
    """Comparing by hash trees between live agents, when the remote has forgotten epochs: of a region that is the same nevertheless, and of one with 26 other pages.
    And after the local agent was killed, when the file has to be hashed."""
    with Bench(store="memory") as b:
        relay = Relay(b, b.address)
        path = b.place("memory", True) + "/data"
        s = Stepper(b, path, o.size, b.shim_env(MEMSYNC_ACK="durable", MEMSYNC_REMOTE=relay.address))
        s.step("s", 0, o.size, 1)
        s.step("m")
        seen = 0
        for count, kind in ((0, "unchanged"), (26, "26 pages")):
            found = []
            for i in range(o.rounds):
                b.remember()
                if count:
                    s.step("r", count, 100 + i)
                else:
                    s.step("s", 0, 4096, 2)
                    s.step("m")
                    s.step("s", 0, 4096, 1)
                s.step("m")
                relay.say("down")
                b.forget()
                # An agent that has just been started has its tree to build: somebody else has asked for it.
                subprocess.run([BUILD + "/memsync", "verify", "--remote", b.address, "--file", path, path[1:]], env=clean_env(XDG_STATE_HOME=b.dir + "/other-state"),
                               stdout=subprocess.DEVNULL)
                relay.say("up")
                values, seen = reconciled(b, "/data", seen)
                found.append(values)
                s.step("m")
            differ, _, out, in_, ms = (median(v) for v in zip(*found))
            item = "reconcile %d MiB, %s" % (o.size // MIB, kind)
            row(item, "live", "pages", differ, "")
            row(item, "live", "time", ms, "ms")
            row(item, "live", "sent", out / 1e3, "KB")
            row(item, "live", "received", in_ / 1e3, "KB")
            if count:
                mark(item, "sent and received (KB)", (out + in_) / 1e3, 60)
            else:
                mark(item, "sent, received (KB, the more)", max(out, in_) / 1e3, 2)
                mark(item, "time (ms)", ms, 5)
        found, cost = [], []
        item = "reconcile %d MiB, cold" % (o.size // MIB)
        for i in range(o.rounds):
            b.kill_local()
            s.step("s", 0, 64, i)
            s.step("m")
            values, seen = reconciled(b, "/data", seen)
            cost.append(sum(b.cpu_of_local()))
            found.append(values)
        ms = median([v[-1] for v in found])
        row(item, "agent killed", "time", ms, "ms")
        row(item, "agent killed", "cpu", median(cost), "s")
        mark(item, "hashing from page cache (GB/s)", o.size / ms / 1e6, 5, at_most=False)


def insert(o):
    """A page inserted at the front of a file of random bytes: all others move by one page."""
    size = o.size // 4
    with Bench() as b:
        path = b.place("memory", True) + "/data"
        with open(path, "wb") as f:
            for _ in range(size // MIB):
                f.write(os.urandom(MIB))
        p = Stepper(b, path, size, b.shim_env(MEMSYNC_ACK="received"), program=["/usr/bin/python3", ROOT + "/bench/shift.py"])
        p.step("m")
        rsync = Rsync(b, path)
        item = "insert a page, %d MiB" % (size // MIB)
        took, wire, cost = [], [], []
        for i in range(o.rounds + 1):
            p.step("i", i)
            cpu, bytes_ = b.cpu(p.pid), wire_bytes()
            time_ = p.step("m") / 1000
            time.sleep(0.3)
            if i:
                took.append(time_)
                cost.append(b.cpu(p.pid) - cpu)
                wire.append(wire_bytes() - bytes_)
            if i <= 2:
                rsync.again(item, count=i > 0)
        row(item, "memsync", "time", median(took), "ms")
        row(item, "memsync", "cpu", median(cost), "s")
        row(item, "memsync", "wire", median(wire) / 1e6, "MB")
        rsync.report(item)
        mark(item, "wire (% of its size)", 100 * median(wire) / size, 5)


def packing(o):
    """Text-like data against lz4 -1 on the same 60 KiB blocks; and what trying to pack random data costs."""
    size = 8 * MIB if o.small else 32 * MIB
    with Bench() as b:
        path = b.place("memory", True) + "/text"
        subprocess.run(["/usr/bin/python3", ROOT + "/bench/text.py", path, str(size)], check=True)
        theirs, block = 0, 61440
        with open(path, "rb") as f:
            while part := f.read(block):
                theirs += len(subprocess.run(["lz4", "-1", "-c"], input=part, stdout=subprocess.PIPE, check=True).stdout)
        s = Stepper(b, path, size, b.shim_env(MEMSYNC_ACK="durable"))
        s.step("m")
        mine = b.sent()
        item = "text, %d MiB" % (size // MIB)
        row(item, "memsync", "packed to", 100 * mine / size, "%")
        row(item, "lz4 -1", "packed to", 100 * theirs / size, "%")
        heads = 60 * (size // block + 1) + 4096  # of frames; greetings
        mark(item, "packed, heads taken off / by lz4 -1", (mine - heads) / theirs, 1)
    cost = {}
    for _ in range(o.rounds):
        for line in subprocess.run([BUILD + "/bench/packing", "64" if o.small else "512"], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines():
            cost.setdefault(line.split()[0], []).append(float(line.split()[1]))
    for variant, values in cost.items():
        row("random data", variant, "cpu", median(values), "ms a GiB")
    mark("random data", "cpu more with packing (%)", 100 * (median([a / b for a, b in zip(cost["packing"], cost["plain"])]) - 1), 2)


def random_file(path, size):
    block = os.urandom(MIB)
    with open(path, "wb") as f:
        for i in range(size // MIB):
            f.write(block[i % MIB:] + block[:i % MIB])
    os.sync()


def transfer(b, path, size):
    """Seconds for the first transfer of a file, until it is durable."""
    s = Stepper(b, path, size, b.shim_env(MEMSYNC_ACK="durable", MEMSYNC_LOG="warn"))
    cpu = b.cpu(s.pid)
    took = s.step("m") / 1e6
    cpu = b.cpu(s.pid) - cpu
    s.close()
    return took, cpu


def bulk(o):
    """The first transfer of random data from warm page cache: into memory, and into a file beside dd with fdatasync on the same disk, by turns."""
    rate = {"mem:": [], "file:": [], "dd": []}
    cost = {"mem:": [], "file:": []}
    for _ in range(o.rounds):
        for kind in rate:
            with Bench(remote=kind != "dd", store="mem:" if kind == "mem:" else None) as b:
                path = b.place("memory", True) + "/data"
                random_file(path, o.size)
                if kind == "dd":
                    start = time.monotonic()
                    subprocess.run(["dd", "if=" + path, "of=" + b.dir + "/copy", "bs=1M", "conv=fdatasync", "status=none"], check=True)
                    took = time.monotonic() - start
                else:
                    took, cpu = transfer(b, path, o.size)
                    cost[kind].append(cpu)
                rate[kind].append(o.size / took / 1e9)
            os.sync()
    item = "first transfer of %d MiB" % (o.size // MIB)
    for kind, values in rate.items():
        row(item, kind, "rate", median(values), "GB/s")
    for kind, values in cost.items():
        row(item, kind, "cpu", median(values), "s")
    mark(item, "into mem: (GB/s)", median(rate["mem:"]), 1.2, at_most=False)
    mark(item, "file: / dd conv=fdatasync", median([a / c for a, c in zip(rate["file:"], rate["dd"])]), 0.8, at_most=False)


def reads(o):
    """Demand reads of one page each while a gigabyte goes to the same server: of another region, and of the one that is being written, as it was before."""
    for store in ("mem:", None):
        late = {"other": [], "same": []}
        for _ in range(o.rounds):
            with Bench(store=store) as b:
                random_file(b.dir + "/other", 64 * MIB)
                subprocess.run([BUILD + "/memsync", "import", b.dir + "/other", "other", "--remote", b.address], env=clean_env(XDG_STATE_HOME=b.dir + "/other-state"),
                               stdout=subprocess.DEVNULL, check=True)
                path = b.place("memory", True) + "/data"
                s = Stepper(b, path, o.size, b.shim_env(MEMSYNC_ACK="durable", MEMSYNC_LOG="warn"))
                s.step("m")
                s.step("s", 0, o.size, 5)
                readers = {name: subprocess.Popen([BUILD + "/bench/reads", b.address, region], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                           for name, region in (("other", "other"), ("same", path[1:]))}
                for p in readers.values():
                    p.stdout.readline()  # it has its pin
                s.step("m")
                for name, p in readers.items():
                    late[name].append([float(v) / 1000 for v in p.communicate()[0].split()])
        for name, values in late.items():
            item = "reads beside a transfer, %s" % (store or "file:")
            for i, what in enumerate(("reads", "median", "p99", "worst")):
                row(item, name, what, median([v[i] for v in values]) * (1000 if i == 0 else 1), "" if i == 0 else "ms")
            mark(item, "%s region, p99 (ms)" % name, median([v[2] for v in values]), 3)


def hub(o):
    """Sync points of one page through a hub over three replicas: all up, one killed, one back and catching up; and straight to one."""
    with Bench(remote=False) as b:
        replicas = dict(b.replica("replica%d" % i)[::-1] for i in range(3))
        addresses = list(replicas)
        b.store = "hub:" + ",".join(addresses)
        b.start_remote("127.0.0.1:0")
        path = b.place("memory", True)
        through = Stepper(b, path + "/hub", 64 * MIB, b.shim_env(MEMSYNC_ACK="durable", MEMSYNC_LOG="warn"))
        straight = Stepper(b, path + "/one", 64 * MIB, b.shim_env(MEMSYNC_ACK="durable", MEMSYNC_LOG="warn", MEMSYNC_REMOTE=addresses[0]))
        took = {}

        def measure(phase):
            for i in range(o.rounds):
                for s, way in ((through, "hub, " + phase), (straight, "one replica")):
                    took.setdefault(way, []).append(s.step("n", 30, i * 1000) / 1000)

        for s in (through, straight):
            s.step("s", 0, 64 * MIB, 1)
            s.step("m")
        measure("three up")
        replicas[addresses[2]].kill()
        replicas[addresses[2]].wait()
        measure("one killed")
        through.step("s", 0, 32 * MIB, 2)
        through.step("m")
        b.replica("replica2", addresses[2])
        measure("one catching up")
        for way, values in took.items():
            row("one page, replicas in memory", way, "sync point", median(values), "ms")
            row("one page, replicas in memory", way, "worst median of 30", max(values), "ms")
        up = median(took["hub, three up"])
        for phase in ("one killed", "one catching up"):
            mark("one page, replicas in memory", "%s / three up" % phase, median(took["hub, " + phase]) / up, 2)


ITEMS = {"changed": changed, "reconcile": reconcile, "insert": insert, "packing": packing, "bulk": bulk, "reads": reads, "hub": hub}
