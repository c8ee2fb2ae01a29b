"""Ordinary Python programs that keep their state in mapped files. Each is run under the shim by replicate.sh: workload.py NAME DIRECTORY."""
import mmap
import os
import random
import sqlite3
import time
import sys


def mmap_flush(where):
    rnd = random.Random(1)
    with open(where + "/data", "w+b") as f:
        f.truncate(300 * 4096 + 77)
        m = mmap.mmap(f.fileno(), 0)
        for round in range(20):
            for _ in range(30):
                at = rnd.randrange(len(m) - 200)
                m[at : at + 200] = rnd.randbytes(200)
            m.flush()
            m.flush(4096 * 8, 4096 * 4)
        m.close()


def mmap_resize(where):
    rnd = random.Random(2)
    with open(where + "/data", "w+b") as f:
        f.write(b"x" * 10000)
        f.flush()
        m = mmap.mmap(f.fileno(), 0)
        for size in (50000, 4096 * 100, 70001, 4096 * 300 + 5, 9000, 4096 * 64):
            m[len(m) - 100 :] = rnd.randbytes(100)
            m.resize(size)
            m[len(m) - 1000 :] = rnd.randbytes(1000)
            m[0:500] = rnd.randbytes(500)
            if size % 2:
                m.flush()
        m.move(100, 5000, 3000)


def mmap_noflush(where):
    fd = os.open(where + "/data", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 4096 * 50)
    m = mmap.mmap(fd, 0)
    m[1000:30000] = random.Random(3).randbytes(29000)
    os._exit(0)


def numpy_flush(where):
    import numpy

    rnd = numpy.random.default_rng(4)
    a = numpy.memmap(where + "/array", dtype="float64", mode="w+", shape=(700, 500))
    for i in range(10):
        a[i * 50 : i * 50 + 20, :] = rnd.random((20, 500))
        a.flush()
    a += 1.0
    a.flush()


def numpy_noflush(where):
    import numpy

    rnd = numpy.random.default_rng(5)
    a = numpy.memmap(where + "/array", dtype="int32", mode="w+", shape=(600, 600))
    a[:] = rnd.integers(0, 1 << 30, (600, 600))
    b = numpy.memmap(where + "/array", dtype="int32", mode="r+", shape=(600, 600))
    b[100:200] *= 3
    numpy.save(where + "/saved.npy", rnd.random(10000))
    c = numpy.load(where + "/saved.npy", mmap_mode="r+")
    c[::7] = 0.25


def lmdb_store(where, **options):
    import lmdb

    rnd = random.Random(6)
    env = lmdb.open(where + "/db", map_size=32 << 20, max_dbs=4, **options)
    table = env.open_db(b"table")
    for round in range(40):
        with env.begin(write=True) as txn:
            for i in range(50):
                txn.put(b"key-%06d" % rnd.randrange(3000), rnd.randbytes(rnd.randrange(10, 3000)), db=table)
            txn.delete(b"key-%06d" % rnd.randrange(3000), db=table)
            txn.put(b"round", b"%d" % round)
    env.close()


def lmdb_writemap(where):
    lmdb_store(where, writemap=True)


def lmdb_default(where):
    lmdb_store(where)


def lmdb_nosync(where):
    lmdb_store(where, writemap=True, sync=False)


def lmdb_async(where):
    lmdb_store(where, writemap=True, map_async=True)


def two_writers(where):
    """One of the two processes that write one WAL database at the same time."""
    db = sqlite3.connect(where + "/db", timeout=60, isolation_level=None)
    until = time.monotonic() + 60
    while True:
        try:  # two that change the mode at once are refused without waiting
            db.execute("pragma journal_mode=wal")
            break
        except sqlite3.OperationalError:
            if time.monotonic() > until:
                raise
    db.execute("pragma synchronous=full")
    db.execute("create table if not exists t(id integer primary key, who text, body blob)")
    for i in range(60):
        db.execute("begin immediate")
        db.execute("insert into t(who, body) values(?, ?)", (str(os.getpid()), os.urandom(2000)))
        db.execute("delete from t where id = (select min(id) from t) and id % 3 = 0")
        db.execute("commit")
    db.close()


def endless(where, commit):
    """Commits rounds until DIR/../stop exists, and says which are acknowledged."""
    print("pid", os.getpid(), flush=True)
    number = commit(None)
    while not os.path.exists(where + "/../stop"):
        number += 1
        try:
            commit(number)
            print("acked", number, flush=True)
        except Exception as e:
            print("failed", number, e, flush=True)


def crash_lmdb(where):
    """Each transaction writes its number under 20 keys, and values of another size."""
    import lmdb

    env = lmdb.open(where + "/db", map_size=16 << 20, writemap=True)

    def commit(number):
        with env.begin(write=number is not None) as txn:
            if number is None:
                return int(txn.get(b"k0") or 0)
            for i in range(20):
                txn.put(b"k%d" % i, b"%d" % number)
                txn.put(b"v%d" % (number * 7 % 50 + i), os.urandom((number * 131 + i * 977) % 3000))

    endless(where, commit)


def crash_sqlite(where, mode):
    db = sqlite3.connect(where + "/db", timeout=60, isolation_level=None)
    db.execute("pragma journal_mode=" + mode)
    db.execute("pragma synchronous=full")
    db.execute("pragma wal_autocheckpoint=20")
    db.execute("create table if not exists n(i integer primary key, number integer)")
    db.execute("create table if not exists t(id integer primary key, body blob)")
    for i in range(20):
        db.execute("insert or ignore into n values(?, 0)", (i,))

    def commit(number):
        if number is None:
            return db.execute("select max(number) from n").fetchone()[0]
        db.execute("begin immediate")
        db.execute("update n set number = ?", (number,))
        db.execute("insert or replace into t values(?, ?)", (number % 50, os.urandom(number * 131 % 3000)))
        db.execute("commit")

    endless(where, commit)


def crash_wal(where):
    crash_sqlite(where, "wal")


def crash_rollback(where):
    crash_sqlite(where, "delete")


def check_lmdb(where):
    import lmdb

    if not os.path.exists(where + "/db/data.mdb") or os.path.getsize(where + "/db/data.mdb") == 0:
        print(0)
        return
    env = lmdb.open(where + "/db", readonly=True, lock=False)
    with env.begin() as txn:
        numbers = {int(txn.get(b"k%d" % i) or 0) for i in range(20)}
        for _ in txn.cursor():
            pass
    if len(numbers) != 1:
        sys.exit("transactions torn: %s" % numbers)
    print(numbers.pop())


def check_sqlite(where):
    if not os.path.exists(where + "/db"):
        print(0)
        return
    db = sqlite3.connect(where + "/db")
    result = db.execute("pragma integrity_check").fetchall()
    if result != [("ok",)]:
        sys.exit("integrity_check: %s" % result)
    if not db.execute("select 1 from sqlite_master where name = 'n'").fetchall():
        print(0)
        return
    numbers = {row[0] for row in db.execute("select number from n")} or {0}
    if len(numbers) != 1:
        sys.exit("transactions torn: %s" % numbers)
    print(numbers.pop())


def read_numpy(where):
    import numpy

    a = numpy.memmap(where + "/array", dtype="uint8", mode="r")
    print(a.size, int(a.sum()))


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
