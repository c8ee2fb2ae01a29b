"""cmp for files that are mostly holes: same_sparse.py A B compares sizes, and the bytes wherever either file has data."""
import os
import sys


def data(fd, size):
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(fd, at, os.SEEK_HOLE)
        yield at, end
        at = end


a, b = (os.open(name, os.O_RDONLY) for name in sys.argv[1:3])
size = os.fstat(a).st_size
if size != os.fstat(b).st_size:
    sys.exit("%s has %d bytes, %s %d" % (sys.argv[1], size, sys.argv[2], os.fstat(b).st_size))
for fd in (a, b):
    for at, end in data(fd, size):
        while at < end:
            n = min(1 << 20, end - at)
            if os.pread(a, n, at) != os.pread(b, n, at):
                sys.exit("%s and %s differ at %d..%d" % (sys.argv[1], sys.argv[2], at, at + n))
            at += n
