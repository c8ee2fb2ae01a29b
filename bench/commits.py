"""LMDB commits per second with writemap: commits.py DIRECTORY MAP_SIZE SECONDS. Small transactions, one put of 100 bytes each, on a map filled a quarter."""
import os
import random
import sys
import time

import lmdb

where, size, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
rnd = random.Random(1)
env = lmdb.open(where, map_size=size, writemap=True)
value = os.urandom(100)
with env.begin(write=True) as txn:
    for i in range(size // 4 // 160):
        txn.put(b"%016d" % i, value)
keys = size // 4 // 160
for _ in range(20):
    with env.begin(write=True) as txn:
        txn.put(b"%016d" % rnd.randrange(keys), value)
count, start = 0, time.monotonic()
while time.monotonic() - start < seconds:
    with env.begin(write=True) as txn:
        txn.put(b"%016d" % rnd.randrange(keys), value)
    count += 1
print("commits %.2f" % (count / (time.monotonic() - start)))
