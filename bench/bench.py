"""Measures what memsync costs, against the program without it and against rsync, in one run, by turns; prints a table and writes $BUILD/bench/results.csv (kit.py says
what its rows are).
"""
import argparse
import csv
import os
import shutil
import subprocess
import sys

import beside
import delta
import mount
import nbd
import sync
from kit import BUILD, GIB, MIB, ROOT, marks, rows

ITEMS = {**sync.ITEMS, **delta.ITEMS, **beside.ITEMS, **mount.ITEMS, **nbd.ITEMS}


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
    if shutil.which("gnuplot") and any(r[0].endswith("tmpfs") for r in rows):
        subprocess.run(["gnuplot", "-e", "table='%s'; picture='%s'" % (out, BUILD + "/bench/changed.svg"), ROOT + "/bench/changed.gp"])
    if shutil.which("gnuplot") and any(r[0].startswith(("first read", "write-back")) for r in rows):
        subprocess.run(["gnuplot", "-e", "table='%s'; picture='%s'" % (out, BUILD + "/bench/mount.svg"), ROOT + "/bench/mount.gp"])
    print("\n%-34s %-44s %12s %12s" % ("item", "threshold", "measured", "limit"))
    for item, what, value, limit, at_most, good in marks:
        print("%-34s %-44s %12.3f %s %9g  %s" % (item, what, value, "<=" if at_most else ">=", limit, "pass" if good else "FAIL"))
    print("%d of %d thresholds met; %s" % (sum(m[5] for m in marks), len(marks), out))
    return 0 if all(m[5] for m in marks) else 1


sys.exit(main())
