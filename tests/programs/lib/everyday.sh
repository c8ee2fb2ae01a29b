#!/usr/bin/env bash
# What everyday.sh runs, natively and under the shim: everyday.sh PROGRAM, in an empty directory and on relative names, so that nothing it prints depends on where it
# is. Steps may fail; their exit codes are told.
set -u
step() {
    local code=0
    "$@" || code=$?
    echo "-- $1 ${2:-} ended with $code"
}
some_files() {
    mkdir -p tree/sub/deep
    for i in 1 2 3 4 5 6 7 8; do
        seq "$i" 37 4000 >"tree/file$i"
        printf 'line %d\0binary\n' "$i" >"tree/sub/b$i"
    done
    ln -s file1 tree/link
    touch -d '2024-01-02 03:04:05 UTC' tree/* tree/sub/* tree/sub
}
run_ls() {
    some_files
    step ls -laR --time-style=long-iso --hide-control-chars -I nothing tree | sed 's/^total .*//'
    step ls missing
    step ls -d tree /etc/passwd
    step stat -c '%n %s %A %h' tree/file1 tree/link tree/sub
    step find tree -type f -newermt 2023-01-01 -printf '%P %s\n' | sort
}
run_pipelines() {
    some_files
    step bash -c 'cat tree/file* | sort -n | uniq -c | awk "{s += \$1 * \$2} END {print s, NR}"'
    step bash -c 'yes | head -n 3; echo "${PIPESTATUS[@]}"'
    step bash -c 'exec 5>out 6<tree/file2; read -r a <&6; echo "$a" >&5; exec 5>&- 6<&-; cat out; diff <(sort tree/file1) <(sort -r tree/file1 | sort) && echo same'
    step bash -c 'trap "echo caught" USR1; kill -USR1 $$; (exit 7); echo $?; sleep 5 & kill $!; wait $!; echo $?'
    step bash -c 'x=$(mktemp -u); for i in 1 2 3; do (echo $i; exit $i) & done; wait; echo done' | sort
    step bash -c 'coproc cat; echo hello >&${COPROC[1]}; read -r x <&${COPROC[0]}; echo $x; ulimit -n 64; echo {1..5} | xargs -n 1 -P 3 echo | sort'
    step bash -c 'cat <<<"here" >>out; tee a b <out >c; cmp a b && cmp b c; : >a; wc -c a b; exec 0<&- 1<&- 2<&-; echo unseen'
    step bash -c '{ bash -c "kill -9 \$\$"; echo $?; } 2>killed'
    rm killed # it names the process
    step env -i /bin/sh -c 'set; echo $0' | grep -Ev '^(PPID|PWD)=' | sort
}
run_files() {
    some_files
    step cp -a tree copy
    step diff -r tree copy
    step mv copy/file1 copy/file2
    step cp tree/file3 copy/file2
    step cp --reflink=never --sparse=always tree/file4 copy/sparse
    step dd if=/dev/zero of=zeros bs=1000 count=77 seek=3 status=none
    step dd if=tree/file1 of=zeros conv=notrunc,fsync bs=100 seek=9 count=4 status=none
    step truncate -s 12345 zeros
    step fallocate -l 20000 zeros
    step ln zeros again
    step rm -r copy/sub
    step rmdir copy
    step install -m 640 zeros installed
    step sync zeros
    step split -b 5000 zeros part.
    step sha256sum zeros again installed part.*
    step shred -u -n 1 again
}
run_text() {
    some_files
    step grep -rc 1 tree/file1 tree/file2
    step grep -rl binary tree | sort
    step grep nothing tree/file1
    step sort -S 64k -T . --parallel=2 -k1,1nr tree/file*
    step sed -i 's/7/seven/' tree/file3
    step sed -n '$p' tree/file3
    step awk 'NR % 50 == 0 { print FILENAME, $0 > "awk.out" } END { print NR }' tree/file1 tree/file2
    step comm -12 tree/file1 tree/file2
    step head -c 1000 tree/file5
    step tail -n 3 tree/file6
    step od -c tree/sub/b1
    step perl -e 'open(F, "+<", "tree/file7"); seek(F, 100, 0); print F "perl"; close F; print -s "tree/file7", "\n"; exit 3'
}
run_tar() {
    some_files
    step tar --sort=name --mtime=2024-01-01Z --owner=0 --group=0 --numeric-owner -cf all.tar tree
    step tar -tvf all.tar
    step gzip -nk all.tar
    step sha256sum all.tar all.tar.gz
    step bash -c 'mkdir out && tar -C out -xzf all.tar.gz && diff -r tree out/tree && echo same'
    step tar -xf tree/file1
    step tar --delete -f all.tar tree/file2
    step tar -df all.tar
}
run_git() {
    export HOME=$PWD GIT_CONFIG_NOSYSTEM=1 GIT_AUTHOR_DATE='2024-01-01T00:00:00Z' GIT_COMMITTER_DATE='2024-01-01T00:00:00Z'
    export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@example.org GIT_COMMITTER_NAME=c GIT_COMMITTER_EMAIL=c@example.org
    some_files
    cd tree
    step git init -q -b main .
    step git add .
    step git commit -q -m first
    for i in 1 2 3 4 5; do
        echo "$i" >>file1
        step git commit -q -a -m "change $i"
    done
    step git log --oneline --stat
    step git checkout -q -b side HEAD~2
    echo side >side
    step git add side
    step git commit -q -m side
    step git merge -q main -m merged
    step git gc -q --prune=now
    step git fsck --full
    step git count-objects -v | grep -v size
    step git diff HEAD~1 --stat
    step git stash list
    step git clone -q . ../clone
    step git -C ../clone rev-parse HEAD
    step git status --short
    step git grep -c 1 -- file1 file2
    step git rebase -q missing
    rm -rf .git ../clone/.git # its index and logs name inodes and times
}
run_python() {
    some_files
    step /usr/bin/python3 - <<'P'
import glob, hashlib, json, mmap, multiprocessing, os, shutil, subprocess, sys, tempfile, threading
for name in sorted(glob.glob("tree/file*")):
    print(name, hashlib.sha256(open(name, "rb").read()).hexdigest()[:16])
with open("m", "w+b") as f:
    f.write(b"x" * 10000)
    f.flush()
    with mmap.mmap(f.fileno(), 0) as m:
        m[5000:5005] = b"hello"
        m.flush()
        m.resize(20000)
        print(m.find(b"hello"), len(m))
print(subprocess.run(["sort", "-rn"], input=b"1\n3\n2\n", stdout=subprocess.PIPE).stdout)
print(subprocess.run("exit 5", shell=True, close_fds=True).returncode, os.system("exit 6") >> 8)
with multiprocessing.Pool(3) as pool:
    print(pool.map(abs, range(-5, 5)))
pid = os.fork()
if not pid:
    open("child", "w").write("from the child")
    os._exit(9)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), open("child").read())
threads = [threading.Thread(target=lambda i=i: open(f"t{i}", "w").write(str(i) * 1000)) for i in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
with tempfile.TemporaryDirectory(dir=".") as d:
    shutil.copytree("tree", d + "/copy", symlinks=True)
    print(len(os.listdir(d + "/copy")))
os.replace("t0", "t1")
print(sorted(os.listdir(".")), sorted(os.listdir("/proc/self/fd"), key=int)[:3])
try:
    os.waitpid(-1, 0)
except ChildProcessError as e:
    print(e)
json.dump({"a": [1, 2]}, open("j", "w"))
sys.exit(4)
P
}
run_compile() {
    cat >hello.c <<'P'
#include <math.h>
#include <stdio.h>
int main(void) { printf("%.3f\n", sqrt(2)); return 3; }
P
    step gcc -O2 -Wall -c -o hello.o hello.c
    step gcc -o hello hello.o -lm
    step ./hello
    step ar rcsD libhello.a hello.o
    step nm -g libhello.a
    step strip -o stripped hello
    step gcc -E -P -x c - <<<'#define A 1
A'
    step gcc -c missing.c
    printf 'all: a b\n%%: ; @echo made $@ >$@; cat $@\n' >Makefile
    step make -s -j2 | sort
    step gcc -flto -pipe -g0 -o lto hello.c -lm
    step ./lto
}
run_sqlite() {
    step sqlite3 :memory: 'create table t(a, b); with recursive c(x) as (select 1 union all select x + 1 from c where x < 20000)
        insert into t select x, hex(x * 7919) from c; create index i on t(b); select count(*), sum(a), min(b) from t where b > 3; pragma integrity_check;'
    step sqlite3 db 'pragma journal_mode=wal; create table t(a); insert into t values(1), (2); select * from t; pragma integrity_check;'
    step sqlite3 db 'pragma journal_mode=delete; pragma mmap_size=1000000; insert into t select a + 10 from t; select sum(a) from t;'
    step sqlite3 db 'select nothing from nowhere;'
}

"run_$1"
exit 5
