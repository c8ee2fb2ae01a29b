/* A parent and four children, eight threads in each, all storing to one file, calling write on a second, and syncing,
 * at once. Every thread has pages of its own, so that the result is known; the last stores of each are never synced but
 * by leaving. */
#include "plain.h"

#include <pthread.h>
#include <sys/wait.h>

#define PROCESSES 5u
#define THREADS 8u
#define WRITERS (PROCESSES * THREADS)
#define PAGES_EACH 6u
#define ROUNDS 12u
#define LEN ((size_t)WRITERS * PAGES_EACH * PAGE)

static unsigned char *map;
static int map_fd, call_fd;

/* Pages of the writers are dealt like cards, so that each 256 KiB has all of them. */
static size_t place(unsigned writer, unsigned page)
{
    return ((size_t)page * WRITERS + writer) * PAGE;
}

static void *work(void *arg)
{
    unsigned writer = *(unsigned *)arg;
    unsigned char *own = writer % 3 == 1 ? map_shared(map_fd, LEN, 0) : map;
    for (unsigned round = 0; round < ROUNDS; round++) {
        unsigned page = round % PAGES_EACH;
        fill(own + place(writer, page), PAGE, writer * 1000 + round);
        write_at(call_fd, 1000, (off_t)place(writer, page) + 17, writer * 1000 + round);
        if (writer % 4 == 0)
            MUST(fdatasync(call_fd) == 0);
        else if (round % 3 != 2)
            MUST(msync(own + place(writer, page), PAGE, MS_SYNC) == 0);
    }
    if (own != map && writer % 2)
        MUST(munmap(own, LEN) == 0);
    return NULL;
}

static void process(unsigned number)
{
    pthread_t thread[THREADS];
    unsigned writer[THREADS];
    for (unsigned i = 0; i < THREADS; i++) {
        writer[i] = number * THREADS + i;
        MUST(pthread_create(&thread[i], NULL, work, &writer[i]) == 0);
    }
    for (unsigned i = 0; i < THREADS; i++)
        MUST(pthread_join(thread[i], NULL) == 0);
}

/* The files are what the writers meant them to be: a fault here would be the program's own. */
static void check(void)
{
    unsigned char want[PAGE];
    for (unsigned w = 0; w < WRITERS; w++)
        for (unsigned p = 0; p < PAGES_EACH; p++) {
            fill(want, PAGE, w * 1000 + ROUNDS - PAGES_EACH + p);
            MUST(!memcmp(map + place(w, p), want, PAGE));
        }
}

int main(int argc, char **argv)
{
    char path[4096];
    if (argc != 2)
        return 2;
    map_fd = make_file(in_dir(path, argv[1], "stores"), (off_t)LEN);
    call_fd = make_file(in_dir(path, argv[1], "calls"), (off_t)LEN);
    map = map_shared(map_fd, LEN, 0);
    fill(map, LEN, 99);
    pid_t child[PROCESSES];
    for (unsigned i = 1; i < PROCESSES; i++) {
        child[i] = fork();
        MUST(child[i] >= 0);
        if (!child[i]) {
            process(i);
            exit(0);
        }
    }
    process(0);
    for (unsigned i = 1; i < PROCESSES; i++) {
        int status;
        MUST(waitpid(child[i], &status, 0) == child[i] && status == 0);
    }
    check();
    return 0;
}
