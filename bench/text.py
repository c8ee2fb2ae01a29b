"""text.py FILE SIZE: fills FILE with words as frequent as a language's."""
import itertools
import random
import sys

path, size = sys.argv[1], int(sys.argv[2])
dice = random.Random(7)
words = ["".join(dice.choice("etaoinshrdlu") for _ in range(dice.randint(2, 9))) for _ in range(2000)]
weights = list(itertools.accumulate(1 / (n + 5) for n in range(len(words))))
with open(path, "wb") as f:
    while f.tell() < size:
        part = " ".join(dice.choices(words, cum_weights=weights, k=100000)).encode()
        f.write(part[:size - f.tell()])
