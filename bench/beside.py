"""What bulk does to what is urgent on the same connection, and how much of a long line it fills: bench/beside.sh, with all sockets and with one, by turns."""
import subprocess

from kit import BUILD, ROOT, clean_env, mark, median, row


def line(which, o, seconds):
    """Medians over rounds of what bench/beside says, for the bundle and for one socket; None where it cannot be had."""
    got = {"bundle": [], "one socket": []}
    for _ in range(o.rounds):
        for variant, values in got.items():
            command = [ROOT + "/bench/beside.sh", which, str(seconds)] + (["one"] if variant != "bundle" else [])
            done = subprocess.run(command, env=clean_env(BUILD=BUILD), stdout=subprocess.PIPE, text=True)
            if done.returncode == 77:
                print("  " + done.stdout.strip())
                return None
            done.check_returncode()
            values.append({what + " " + metric: float(value) for what, metric, value in map(str.split, done.stdout.splitlines())})
    return {variant: {k: median([v[k] for v in values]) for k in values[0]} for variant, values in got.items()}


def beside(o):
    """Demand reads and one-page sync points while bulk fills a gigabit line, all on one connection."""
    result = line("1gbit", o, 2 if o.small else 5)
    for variant, m in (result or {}).items():
        row("beside bulk at 1 Gbit/s", variant, "bulk", m["bulk MB_s"], "MB/s")
        for what, name in (("read", "demand read"), ("sync", "sync point, received")):
            for state in ("idle", "busy"):
                for p in ("p50", "p99"):
                    row("beside bulk at 1 Gbit/s", variant, "%s, %s, %s" % (name, state, p), m["%s_%s %s_us" % (what, state, p)] / 1000, "ms")
    if result:
        for what in ("read", "sync"):
            for p in ("p50", "p99"):
                m = result["bundle"]
                more = (m["%s_busy %s_us" % (what, p)] - m["%s_idle %s_us" % (what, p)]) / 1000
                mark("beside bulk at 1 Gbit/s", "%s %s, more than idle (ms)" % (what, p), more, 1)


def far(o):
    """Bulk over lines of 25 and 40 ms, there and back."""
    for ms in ("25", "40"):
        result = line(ms, o, 4 if o.small else 10)
        for variant, m in (result or {}).items():
            row("bulk over %s ms" % ms, variant, "bulk", m["bulk MB_s"], "MB/s")
            row("bulk over %s ms" % ms, variant, "sockets", m["sockets count"], "")


ITEMS = {"beside": beside, "far": far}
