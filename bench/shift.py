"""shift.py FILE SIZE: maps FILE; "i SEED" inserts a page at its front, so that all others move by one; "m" is msync. Answers as the stepper of the tests does."""
import mmap
import os
import random
import sys
import time

path, size = sys.argv[1], int(sys.argv[2])
fd = os.open(path, os.O_RDWR)
m = mmap.mmap(fd, size)
print("pid %d" % os.getpid(), flush=True)
for line in sys.stdin:
    what, *rest = line.split()
    if what == "q":
        break
    start = time.monotonic()
    if what == "i":
        m.move(4096, 0, size - 4096)
        m[:4096] = random.Random(int(rest[0])).randbytes(4096)
    else:
        m.flush()
    print("%s 0 %d" % (what, (time.monotonic() - start) * 1e6), flush=True)
