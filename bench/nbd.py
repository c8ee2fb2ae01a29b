"""Regions as network block devices, beside nbdkit and qemu-nbd over a file of the same content on the same disk, by turns, all on loopback."""
import json
import os
import shutil
import socket
import subprocess
import sys

from kit import BUILD, GIB, MIB, Bench, clean_env, mark, median, row
from mount import soon

JOBS = [(rw, depth) for rw in ("randread", "randwrite") for depth in (1, 32)]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Servers(Bench):
    """name: URI of everybody's device."""

    def __init__(self, size):
        super().__init__(remote=False)
        self.uris, self.processes = {}, []
        self.image = self.dir + "/image"
        with open(self.image, "wb") as f:
            subprocess.run(["head", "-c", str(size), "/dev/urandom"], stdout=f, check=True)
        self.ours()
        self.peer("nbdkit", lambda port, path: ["nbdkit", "-f", "-i", "127.0.0.1", "-p", port, "file", path])
        self.peer("qemu-nbd", lambda port, path: ["qemu-nbd", "-f", "raw", "-t", "-e", "0", "-b", "127.0.0.1", "-p", port, path])

    def ours(self):
        self.remote = subprocess.Popen([BUILD + "/memsync-agent", "--listen", "127.0.0.1:0", "--nbd", "127.0.0.1:0", "--store", self.store], stdout=subprocess.PIPE,
                                       text=True, env=clean_env(XDG_STATE_HOME=self.dir + "/remote-state"))
        wire, nbd = (self.remote.stdout.readline().split()[2] for _ in range(2))
        subprocess.run([BUILD + "/memsync", "import", "--remote", wire, self.image, "disk"], env=clean_env(XDG_STATE_HOME=self.dir + "/state"), check=True,
                       stdout=subprocess.DEVNULL)
        self.uris["memsync"] = "nbd://%s/disk" % nbd

    def peer(self, name, command):
        if not shutil.which(name):
            print("  no %s: without it" % name)
            return
        port, path = str(free_port()), self.dir + "/" + name
        shutil.copy(self.image, path)
        self.processes.append(subprocess.Popen(command(port, path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        self.uris[name] = "nbd://127.0.0.1:" + port
        soon(lambda: not subprocess.run(["nbdinfo", "--size", self.uris[name]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode)

    def end(self):
        for p in self.processes:
            p.kill()
            p.wait()
        self.processes = []
        super().end()


def copied(uri, size):
    """GB/s of nbdcopy to nowhere, by its own clock and start."""
    begun = os.times().elapsed
    subprocess.run(["nbdcopy", uri, "null:"], check=True)
    return size / 1e9 / (os.times().elapsed - begun)


def fio(uri, rw, depth, seconds):
    done = subprocess.run(["fio", "--name=x", "--ioengine=nbd", "--uri=" + uri, "--rw=" + rw, "--bs=4k", "--size=64M", "--iodepth=%d" % depth, "--time_based",
                           "--runtime=%g" % seconds, "--output-format=json"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit("bench: fio %s %s: %s" % (rw, uri, done.stdout))
    return json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0][rw[4:]]["iops"]


def devices(o):
    """a region as a network block device, beside nbdkit and qemu-nbd"""
    if not all(map(shutil.which, ("nbdcopy", "nbdinfo", "fio"))):
        print("  no nbdcopy, nbdinfo or fio: not measured")
        return
    size, item, found = o.size if o.size < GIB else 512 * MIB, "block device", {}
    rounds = min(o.rounds, 3)
    with Servers(size) as s:
        for again in range(rounds + 1):  # the first one warms up
            for name, uri in s.uris.items():
                found.setdefault((name, "nbdcopy"), []).append(copied(uri, size))
        for rw, depth in JOBS:
            for again in range(rounds + 1):
                for name, uri in s.uris.items():
                    found.setdefault((name, "%s, depth %d" % (rw, depth)), []).append(fio(uri, rw, depth, 1 if again else 0.3))
        for what, unit in [("nbdcopy", "GB/s")] + [("%s, depth %d" % job, "/s") for job in JOBS]:
            best = {name: median(found[name, what][1:]) for name in s.uris}
            for name, value in best.items():
                row(item, name, what, value, unit)
            others = [value for name, value in best.items() if name != "memsync" and (what != "nbdcopy" or name == "nbdkit")]
            if others:
                mark(item, what + " / " + ("nbdkit's" if what == "nbdcopy" else "the better of the two"), best["memsync"] / max(others), 1, at_most=False)


ITEMS = {"nbd": devices}
