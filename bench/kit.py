"""What the measurements share: rows and marks, agents, programs, rsync, a bad link.

A row is item, variant, metric, value, unit. A mark compares a value with its threshold. CPU seconds are those of program, local agent and remote together, of rsync
those of both its sides; wire bytes are what the loopback device carried meanwhile, headers and acknowledgements too.
"""
import atexit
import json
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
        self.store = "file:%s/store" % (self.memory if store == "memory" else self.dir) if store in (None, "memory") else store
        if remote:
            self.start_remote("127.0.0.1:0")

    def start_remote(self, listen):
        self.remote = subprocess.Popen([BUILD + "/memsync-agent", "--listen", listen, "--store", self.store], stdout=subprocess.PIPE, text=True,
                                       env=clean_env(XDG_STATE_HOME=self.dir + "/remote-state"))
        line = self.remote.stdout.readline()
        if not line.startswith("listening wire "):
            sys.exit("bench: the remote agent did not start: %r" % line)
        self.address = line.split()[2]

    def replica(self, name, listen="127.0.0.1:0"):
        """One more remote, for a hub: its process and address."""
        p = subprocess.Popen([BUILD + "/memsync-agent", "--listen", listen, "--store", "file:%s/%s" % (self.memory, name)], stdout=subprocess.PIPE, text=True,
                             env=clean_env(XDG_STATE_HOME="%s/%s-state" % (self.dir, name), MEMSYNC_LOG="off"))
        atexit.register(p.kill)
        return p, p.stdout.readline().split()[2]

    def remember(self):
        """What the remote has now is what it has again after forget()."""
        self.remote.terminate()
        self.remote.wait()
        subprocess.run(["cp", "-a", "--sparse=always", self.store[5:], self.store[5:] + ".then"], check=True)
        self.start_remote(self.address)

    def forget(self):
        self.remote.kill()
        self.remote.wait()
        shutil.rmtree(self.store[5:])
        os.rename(self.store[5:] + ".then", self.store[5:])
        self.start_remote(self.address)

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

    def cpu_of_local(self):
        return [cpu_of(pid) for pid in self.local_agents()]

    def kill_local(self):
        for pid in self.local_agents():
            os.kill(pid, signal.SIGKILL)

    def sent(self):
        """Bytes that the local agent has sent so far, by its own count."""
        out = subprocess.run([BUILD + "/memsync", "status", "--json"], env=clean_env(MEMSYNC_AGENT=self.socket), stdout=subprocess.PIPE)
        return sum(remote["bytes_out"] for remote in json.loads(out.stdout)["remotes"])

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
    def __init__(self, bench, path, size, env, program=(BUILD + "/tests/programs/stepper",)):
        self.p = subprocess.Popen([*program, path, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
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


class Rsync:
    """rsync to a daemon, of one file, with its defaults and with options that suit files changed in place."""

    ways = {"rsync": [], "rsync --block-size=4096 --no-whole-file --inplace": ["--block-size=4096", "--no-whole-file", "--inplace"]}

    def __init__(self, bench, path):
        self.path, self.found = path, {}
        if not shutil.which("rsync"):
            self.ways = {}
            return
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.makedirs(bench.memory + "/rsynced")
        with open(bench.dir + "/rsyncd.conf", "w") as f:
            f.write("use chroot = no\nuid = %d\ngid = %d\n[x]\npath = %s\nread only = no\n" % (os.getuid(), os.getgid(), bench.memory + "/rsynced"))
        self.daemon = subprocess.Popen(["rsync", "--daemon", "--no-detach", "--config", bench.dir + "/rsyncd.conf", "--port", str(port), "--address", "127.0.0.1"],
                                       stderr=subprocess.DEVNULL)
        bench.children.append(self)
        self.url = "rsync://127.0.0.1:%d/x/" % port
        until = time.monotonic() + 10
        while time.monotonic() < until:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.01)
        for i, way in enumerate(self.ways):
            self.run(i, ["--whole-file", "--inplace"])

    def run(self, i, options):
        subprocess.run(["rsync", "--ignore-times", *options, self.path, "%s%d" % (self.url, i)], check=True)

    def cpu(self):
        fields = open("/proc/%d/stat" % self.daemon.pid).read().rsplit(")", 1)[1].split()
        t = os.times()
        return t.children_user + t.children_system + sum(map(int, fields[11:15])) / TICK

    def again(self, item, count):
        for i, (way, options) in enumerate(self.ways.items()):
            bytes_, cpu, start = wire_bytes(), self.cpu(), time.monotonic()
            self.run(i, options)
            took = time.monotonic() - start
            if count:
                self.found.setdefault((item, way), []).append((took * 1000, self.cpu() - cpu, (wire_bytes() - bytes_) / 1e6))

    def report(self, item):
        for way in self.ways:
            for metric, unit, values in zip(("time", "cpu", "wire"), ("ms", "s", "MB"), zip(*self.found[item, way])):
                row(item, way, metric, median(values), unit)

    def close(self):
        self.daemon.kill()
        self.daemon.wait()


class Relay:
    """A link to be cut; see relay.c."""

    def __init__(self, bench, target, *options):
        self.p = subprocess.Popen([BUILD + "/bench/relay", target, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        bench.children.append(self)
        self.address = self.p.stdout.readline().split()[1]

    def say(self, words):
        self.p.stdin.write(words + "\n")

    def close(self):
        self.p.kill()
        self.p.wait()
