/* Random operations on files and their mappings, and a shadow copy that says what has to be there: loads and reads are
 * compared as they are made, all of the files at the checks, and what the remote has, which the test fetches.
 *
 *   exerciser run DIRECTORY SEED OPERATIONS [KEY=VALUE...]     says "check N" and waits for a line, "at N" likewise
 *   exerciser find DIRECTORY SEED OPERATIONS [KEY=VALUE...]    says which state the replica in replica= has
 *   exerciser list                                             the operations' names
 *
 *   start=DIR     the files are there (0, 1), and hold what is in DIR       max=SIZE     of a file (2 MiB)
 *   read=1        only what reads; start= tells the content                 every=N      operations between checks
 *   remote=DIR    copies of what the remote has, made at each check         pause=N      says "at N" there
 *   without=A,B   no such operations                                        keep=FILE    only the operations whose
 *   progress=FILE operations begun and acknowledged, for find                            numbers are in FILE's lines
 *   replica=DIR   for find                                                  mirror=1     not the calls that mirrors
 *                                                                           refuse
 */
#include "tests/faults/exerciser_maps.h"

enum { READS = 1, ALWAYS = 2 };

static struct operation {
    const char *name;
    void (*run)(void);
    unsigned weight, what;
} operations[] = {
    {"load", op_load, 60, READS},
    {"read", op_read, 60, READS},
    {"size", op_size, 10, READS},
    {"private", op_private, 15, READS},
    {"map", op_map, 40, READS},
    {"unmap", op_unmap, 25, READS},
    {"remap", op_remap, 25, READS},
    {"protect", op_protect, 15, READS},
    {"advise", op_advise, 25, READS},
    {"open", op_open, 40, READS},
    {"child_reads", op_child_reads, 3, READS},
    {"store", op_store, 150, 0},
    {"move", op_move, 10, 0},
    {"write", op_write, 100, 0},
    {"write_mapped", op_write_mapped, 15, 0},
    {"copy", op_copy, 15, 0},
    {"truncate", op_truncate, 40, 0},
    {"allocate", op_allocate, 10, 0},
    {"punch", op_punch, 15, 0},
    {"zero", op_zero, 15, 0},
    {"collapse", op_collapse, 5, 0},
    {"insert", op_insert, 5, 0},
    {"remove", op_remove, 5, 0},
    {"msync", op_msync, 20, 0},
    {"async", op_msync_async, 10, 0},
    {"sync", op_sync, 20, 0},
    {"child_writes", op_child_writes, 3, 0},
    {"race", op_race, 3, 0},
};
#define OPERATIONS (sizeof operations / sizeof *operations)

/* Shared with whoever finds out what the replica must have. */
static struct progress {
    uint32_t begun, points; /* moments at which the remote may take over a state, of which ... */
    uint32_t acknowledged;  /* ... this is the last that it has for certain */
} * progress;

static const char *start, *remote, *replica;
static uint32_t every, pause_at, count;
static bool *keep;

/* ---- which state the replica has: a dry run stops at each moment that may have been published
 *
 * A look at pages that are about to be moved, or mapped over, begins a publication that the program does not wait for:
 * what it stores meanwhile may be in it, or not. So if no state is the replica's as a whole, each byte may be from any
 * moment between two neighbouring states. */

static unsigned char *have[FILES];
static uint64_t have_size[FILES];
static uint32_t points, found;
static int differing_file;
static uint64_t differing_page;
static struct nearest {
    uint32_t point, op;
    uint64_t apart;
    int file;
    uint64_t page, size;
} nearest = {.apart = UINT64_MAX};

static unsigned char *seen[FILES]; /* for each byte: whether it had the replica's value since the last state */
static bool seen_size[FILES];
static size_t seen_entries;
static uint32_t found_between;

static void see(int file, uint64_t from, uint64_t to)
{
    const struct file *f = &files[file];
    for (uint64_t at = from; at < to; at++)
        seen[file][at] |= f->bytes[at] == have[file][at];
    seen_size[file] |= f->size == have_size[file];
}

/* After an operation: what it touched may be the replica's now. */
static void see_more(void)
{
    if (points < progress->acknowledged || found || found_between)
        return;
    bool all = true;
    for (; seen_entries < entry_count; seen_entries++)
        if (entries[seen_entries].file >= 0)
            see(entries[seen_entries].file, entries[seen_entries].from, entries[seen_entries].to);
    for (int i = 0; i < FILES && all; i++)
        all = seen_size[i] && !memchr(seen[i], 0, max_size);
    if (all)
        found_between = points;
}

static uint64_t pages_apart(int file)
{
    const struct file *f = &files[file];
    uint64_t apart = f->size != have_size[file];
    for (uint64_t at = 0; at < max_size; at += PAGE)
        if (memcmp(f->bytes + at, have[file] + at, PAGE)) {
            apart++;
            differing_file = file;
            differing_page = at;
        }
    return apart;
}

static void point(bool acknowledged)
{
    points++;
    if (!dry) {
        progress->points = points;
        if (acknowledged)
            progress->acknowledged = points;
        return;
    }
    if (points < progress->acknowledged || op > progress->begun)
        return;
    uint64_t apart = 0;
    for (int i = 0; i < FILES; i++)
        apart += pages_apart(i);
    if (!apart && !found)
        found = points;
    if (apart < nearest.apart)
        nearest = (struct nearest){points, op, apart, differing_file, differing_page, files[differing_file].size};
    see_more();
    for (int i = 0; i < FILES; i++) {
        memset(seen[i], 0, max_size);
        seen_size[i] = false;
        see(i, 0, max_size);
    }
}

static void tell_nearest(void)
{
    fprintf(stderr, "the replica has none of the states %u (acknowledged) to %u\n", progress->acknowledged, points);
    if (nearest.apart == UINT64_MAX)
        return;
    fprintf(stderr,
            "nearest is %u, after operation %u, but for %llu pages, such as %#llx of file %d (%llu bytes, there %llu), "
            "last touched by:\n",
            nearest.point, nearest.op, (unsigned long long)nearest.apart, (unsigned long long)nearest.page,
            nearest.file, (unsigned long long)nearest.size, (unsigned long long)have_size[nearest.file]);
    tell_page(nearest.file, nearest.page, progress->begun);
    fprintf(stderr, "what was done last, up to operation %u:\n", progress->begun);
    for (size_t i = entry_count > TOLD ? entry_count - TOLD : 0; i < entry_count; i++)
        fprintf(stderr, "  #%u %s, file %d [%#llx, %#llx)\n", entries[i].op, entries[i].what, entries[i].file,
                (unsigned long long)entries[i].from, (unsigned long long)entries[i].to);
}

/* ---- files */

static uint64_t load_file(const char *dir, int i, unsigned char *to)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%d", dir, i);
    int fd = open(path, O_RDONLY);
    if (fd < 0)
        return 0;
    ssize_t n, got = 0;
    while ((n = read(fd, to + got, LARGEST - (size_t)got)) > 0)
        got += n;
    MUST(n == 0);
    close(fd);
    return (uint64_t)got;
}

static void open_files(const char *dir)
{
    for (int i = 0; i < FILES; i++) {
        struct file *f = &files[i];
        snprintf(f->path, sizeof f->path, "%s/%d", dir, i);
        MUST(f->bytes = calloc(1, LARGEST));
        if (start)
            f->size = load_file(start, i, f->bytes);
        MUST(f->size <= max_size);
        open_slot(i, 0, read_only ? O_RDONLY : start ? O_RDWR : O_RDWR | O_CREAT | O_TRUNC);
        if (start)
            continue;
        f->size = draw(max_size);
        fill(f->bytes, f->size, seed + (uint64_t)i);
        note("first write", i, 0, f->size);
        REAL(pwrite(f->slots[0].fd, f->bytes, f->size, 0) == (ssize_t)f->size);
    }
    if (!read_only)
        for (int i = 0; i < FILES; i++)
            REAL(fsync(files[i].slots[0].fd) == 0);
    point(!read_only);
}

/* Everything, by the program's own eyes. */
static void look(void)
{
    for (int i = 0; i < FILES && !dry; i++) {
        int fd = open(files[i].path, O_RDONLY);
        REAL(fd >= 0);
        ssize_t got = pread(fd, buffer, LARGEST, 0);
        REAL(got >= 0);
        same_size("at a check", i, (uint64_t)got);
        same_bytes("at a check", i, 0, buffer, files[i].size);
        REAL(close(fd) == 0);
    }
    for (int i = 0; i < MAPS; i++) {
        struct map *m = &maps[i];
        if (m->used && m->prot & PROT_READ && map_end(m) > m->offset)
            same_bytes("mapping at a check", m->file, m->offset, m->at, map_end(m) - m->offset);
    }
}

static void ask(const char *word)
{
    char line[16];
    printf("%s %u\n", word, op);
    fflush(stdout);
    if (!fgets(line, sizeof line, stdin))
        _exit(3);
}

/* The last sync point has brought everything to the remote. */
static void check(void)
{
    look();
    if (!remote)
        return;
    for (int i = 0; i < FILES && !read_only; i++) {
        int fd = open(files[i].path, O_RDWR);
        REAL(fd >= 0 && fsync(fd) == 0 && close(fd) == 0);
    }
    point(!read_only);
    if (dry)
        return;
    ask("check");
    for (int i = 0; i < FILES; i++) {
        same_size("at the remote", i, load_file(remote, i, buffer));
        same_bytes("at the remote", i, 0, buffer, files[i].size);
    }
}

/* ---- the run */

static void died(int sig)
{
    char line[128];
    int n = snprintf(line, sizeof line, "seed %llu: signal %d in operation %u (%s)\n", (unsigned long long)seed, sig,
                     op, op_name);
    MUST(write(2, line, (size_t)n) == n);
    signal(sig, SIG_DFL);
    raise(sig);
}

static void one(void)
{
    unsigned all = 0;
    for (size_t i = 0; i < OPERATIONS; i++)
        all += operations[i].weight;
    chance = scramble(seed * 0x9e3779b97f4a7c15u + op);
    uint64_t which = draw(all);
    size_t i = 0;
    while (which >= operations[i].weight)
        which -= operations[i++].weight;
    op_name = operations[i].name;
    if (!dry)
        progress->begun = op;
    operations[i].run();
    if (dry)
        see_more();
    if (maps_used() > MAPS - 4)
        op_unmap();
}

static void leave_out(char *names)
{
    for (char *name = strtok(names, ","); name; name = strtok(NULL, ","))
        for (size_t i = 0; i <= OPERATIONS; i++) {
            MUST(i < OPERATIONS);
            if (!strcmp(operations[i].name, name)) {
                operations[i].weight = 0;
                break;
            }
        }
}

static void read_keep(const char *path)
{
    FILE *f = fopen(path, "r");
    unsigned n;
    MUST(f && (keep = calloc(count + 1, sizeof *keep)));
    while (fscanf(f, "%u", &n) == 1)
        if (n <= count)
            keep[n] = true;
    fclose(f);
}

static void map_progress(const char *path)
{
    int fd = path ? open(path, O_RDWR | O_CREAT, 0644) : -1;
    MUST(fd < 0 || ftruncate(fd, sizeof *progress) == 0);
    progress =
        mmap(NULL, sizeof *progress, PROT_READ | PROT_WRITE, fd < 0 ? MAP_SHARED | MAP_ANONYMOUS : MAP_SHARED, fd, 0);
    MUST(progress != MAP_FAILED);
    if (fd >= 0)
        close(fd);
}

static void parse(int argc, char **argv)
{
    const char *progress_path = NULL;
    for (int i = 5; i < argc; i++) {
        char *value = strchr(argv[i], '=');
        MUST(value);
        *value++ = 0;
        if (!strcmp(argv[i], "start"))
            start = value;
        else if (!strcmp(argv[i], "remote"))
            remote = value;
        else if (!strcmp(argv[i], "replica"))
            replica = value;
        else if (!strcmp(argv[i], "max"))
            max_size = page_down((uint64_t)atoll(value));
        else if (!strcmp(argv[i], "every"))
            every = (uint32_t)atoi(value);
        else if (!strcmp(argv[i], "pause"))
            pause_at = (uint32_t)atoi(value);
        else if (!strcmp(argv[i], "read"))
            read_only = true;
        else if (!strcmp(argv[i], "mirror"))
            mirrored = true;
        else if (!strcmp(argv[i], "without"))
            leave_out(value);
        else if (!strcmp(argv[i], "keep"))
            read_keep(value);
        else if (!strcmp(argv[i], "progress"))
            progress_path = value;
        else
            MUST(false && "a known key");
    }
    MUST(max_size <= LARGEST && (start || !read_only));
    map_progress(progress_path);
}

int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "list")) {
        for (size_t i = 0; i < OPERATIONS; i++)
            puts(operations[i].name);
        return 0;
    }
    if (argc < 5 || (strcmp(argv[1], "run") && strcmp(argv[1], "find"))) {
        fprintf(stderr, "usage: %s run|find DIRECTORY SEED OPERATIONS [KEY=VALUE...] | list\n", argv[0]);
        return 2;
    }
    dry = !strcmp(argv[1], "find");
    seed = strtoull(argv[3], NULL, 10);
    count = (uint32_t)atoi(argv[4]);
    parse(argc, argv);
    MUST(buffer = malloc(LARGEST));
    for (size_t i = 0; read_only && i < OPERATIONS; i++)
        operations[i].weight *= operations[i].what == READS;
    struct sigaction action = {.sa_handler = died};
    sigaction(SIGBUS, &action, NULL);
    sigaction(SIGSEGV, &action, NULL);
    for (int i = 0; i < FILES && dry; i++) {
        MUST((have[i] = calloc(1, LARGEST)) && (seen[i] = calloc(1, LARGEST)));
        have_size[i] = load_file(replica, i, have[i]);
    }
    chance = scramble(seed);
    open_files(argv[2]);
    if (!dry)
        printf("pid %d\n", (int)getpid()), fflush(stdout);
    for (op = 1; op <= count && !(dry && op > progress->begun); op++) {
        if (op == pause_at && !dry)
            ask("at");
        if (!keep || keep[op])
            one();
        if (every && (op % every == 0 || op == count)) {
            op_name = "check";
            check();
        }
    }
    if (op-- > count)
        point(false); /* the exit is one */
    if (!dry)
        return 0;
    if (!found && !found_between) {
        tell_nearest();
        return 1;
    }
    printf("%u%s\n", found ? found : found_between, !found ? " and some of what followed" : "");
    return 0;
}
