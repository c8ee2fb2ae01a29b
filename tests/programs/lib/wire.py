"""wire.py MEMSYNC FILE KIND HOW STEP...: makes FILE of SIZE bytes of text or of random ones (KIND), by stores into a mapping or by write (HOW), and takes the
steps; each ends with a sync point, after which it says how many bytes have gone to the remote for it."""
import itertools, json, mmap, os, random, subprocess, sys, time

SIZE, PAGE = 8 << 20, 4096
memsync, path, kind, how, *steps = sys.argv[1:]
dice = random.Random(7)


WORDS = ["".join(dice.choice("etaoinshrdlu") for _ in range(dice.randint(2, 9))) for _ in range(2000)]
WEIGHTS = list(itertools.accumulate(1 / (n + 5) for n in range(len(WORDS))))


def text(length):
    return " ".join(dice.choices(WORDS, cum_weights=WEIGHTS, k=length // 3 + 1)).encode()


def make(length):
    return (text(length) if kind == "text" else dice.randbytes(length))[:length]


def tool(*arguments):
    # It is none of the programs that are replicated.
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    return subprocess.run([memsync, *arguments], env=env, stdout=subprocess.PIPE, check=True).stdout


def status():
    return json.loads(tool("status", "--json"))


def sent():
    return sum(remote["bytes_out"] for remote in status()["remotes"])


fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
os.ftruncate(fd, SIZE)
mapping = mmap.mmap(fd, SIZE) if how == "map" else None


def put(content):
    """All of the file, in place."""
    if mapping:
        mapping[:] = content
        mapping.flush()
    else:
        os.pwrite(fd, content, 0)
        os.fsync(fd)


def get():
    return os.pread(fd, SIZE, 0)


before = 0
def damage(page):
    """The replica's page is no longer what was sent; after all of it had come."""
    replica = os.environ["REPLICA"]
    while open(replica, "rb").read() != get():
        time.sleep(0.01)
    with open(replica, "r+b") as file:
        file.seek(page * PAGE + 777)
        file.write(b"damaged")


for step in ["make"] + steps:
    if step.startswith("damage="):
        damage(int(step[7:]))
        continue
    if step == "verify":  # after which the remote has all hashes
        tool("verify", path[1:])
        continue
    old = get()
    if step == "make":
        new = make(SIZE)
    elif step == "insert":  # a page at the front: all others move by one
        new = make(PAGE) + old[:-PAGE]
    elif step == "remove":  # the first page goes
        new = old[PAGE:] + make(PAGE)
    elif step == "swap":  # the halves change places
        new = old[SIZE // 2 :] + old[: SIZE // 2]
    elif step == "twice":  # every page of the first quarter stands twice in the second half, which had none of them
        new = old[: SIZE // 2] + old[: SIZE // 4] * 2
    elif step == "touch":  # 64 bytes of one page
        new = old[:PAGE] + make(64) + old[PAGE + 64 :]
    elif step == "echo":  # a page changes by 64 bytes, and a later one becomes what it is now
        new = old[:PAGE] + make(64) + old[PAGE + 64 :]
        new = new[: 9 * PAGE] + new[PAGE : 2 * PAGE] + new[10 * PAGE :]
    elif step == "bytes":  # moved by no whole page
        new = make(100) + old[:-100]
    else:
        sys.exit(f"no step {step}")
    put(new)
    now = sent()
    print(step, now - before, flush=True)
    before = now
