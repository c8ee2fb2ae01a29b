/* A hook is a libffi closure for one function at one address: it calls that address, publishes, and returns what the
 * function returned. Its code takes the address's place in the offset tables.
 *
 * Tables are changed inside dl_iterate_phdr, whose lock keeps libraries from being unloaded meanwhile and orders the
 * threads that do this. A slot not yet bound (lazy binding) holds the way into the dynamic linker, which would
 * overwrite a hook when it is called: such a slot gets the hook of the function that dlsym finds. That is the right one
 * at the start, when all is in the global scope. Libraries opened later are bound while they are opened, if they can
 * be, so that the dynamic linker says which function they mean.
 *
 * Hooks are never freed: a thread may be inside. */
#include "shim/calls.h"
#include "shim/shim.h"

#include <dlfcn.h>
#include <ffi.h>
#include <link.h>
#include <string.h>

#if defined __x86_64__
#define RELOC_SLOT R_X86_64_JUMP_SLOT
#define RELOC_GOT R_X86_64_GLOB_DAT
#elif defined __aarch64__
#define RELOC_SLOT R_AARCH64_JUMP_SLOT
#define RELOC_GOT R_AARCH64_GLOB_DAT
#endif

#define CALLS_MAX 64u
#define CALLS_TEXT 8192u
#define CALL_ARGUMENTS 24u
#define HOOKS_MAX 512u

struct call {
    const char *name;
    ffi_cif cif;
    ffi_type *arguments[CALL_ARGUMENTS];
    uintptr_t global; /* what dlsym finds for the name, 0 for nothing */
    uintptr_t next;   /* and what behind this library */
    bool hooked;
};

struct hook {
    struct call *call;
    uintptr_t original, code;
};

struct module {
    uintptr_t base, low, high;       /* load address; bounds of its segments */
    uintptr_t relro_low, relro_high; /* read-only since it was relocated */
    const ElfW(Sym) * symbols;
    const char *strings;
};

static struct call calls[CALLS_MAX];
static unsigned calls_count;
static char calls_text[CALLS_TEXT];
static struct hook hooks[HOOKS_MAX];
static unsigned hooks_count;

static void through(ffi_cif *cif, void *result, void **arguments, void *of)
{
    const struct hook *h = of;
    ffi_call(cif, FFI_FN(h->original), result, arguments);
    int saved = errno;
    shim_publish();
    errno = saved;
}

static ffi_type *type_of(char letter)
{
    switch (letter) {
    case 'v':
        return &ffi_type_void;
    case 'i':
        return &ffi_type_sint;
    case 'u':
        return &ffi_type_uint;
    case 'l':
        return &ffi_type_slong;
    case 'p':
        return &ffi_type_pointer;
    case 'd':
        return &ffi_type_double;
    case 'f':
        return &ffi_type_float;
    default:
        return NULL;
    }
}

#define LETTERS "letters are v (void, a result only), i int, u unsigned, l long, p pointer, d double, f float"

static bool left_out(const char *hook, const char *why)
{
    say(SAY_ERROR, "MEMSYNC_HOOKS: '%s' %s; it is left out", hook, why);
    return false;
}

/* One FUNCTION=RESULT(ARGUMENTS), which is cut up. */
static bool parse_call(struct call *c, char *text)
{
    char *equals = strchr(text, '=');
    if (!equals || equals == text)
        return left_out(text, "is not of the form FUNCTION=RESULT(ARGUMENTS), e.g. checkpoint=i(pl)");
    ffi_type *result = type_of(equals[1]);
    if (!result)
        return left_out(text, "has no letter for its result after the '='; " LETTERS);
    size_t end = strlen(text);
    if (equals[2] != '(' || text[end - 1] != ')' || &text[end - 1] < &equals[3])
        return left_out(text, "has no argument letters in parentheses after its result, e.g. checkpoint=i(pl)");

    unsigned n = 0;
    for (const char *a = equals + 3; *a != ')' || a[1]; a++) {
        if (n == CALL_ARGUMENTS)
            return left_out(text, "has more than 24 arguments");
        c->arguments[n] = type_of(*a);
        if (!c->arguments[n] || *a == 'v')
            return left_out(text, "has an argument that is none of the letters; " LETTERS);
        n++;
    }
    if (ffi_prep_cif(&c->cif, FFI_DEFAULT_ABI, n, result, c->arguments) != FFI_OK)
        return left_out(text, "cannot be called that way on this machine");
    *equals = 0;
    c->name = text;
    return true;
}

static struct call *call_named(const char *name)
{
    for (unsigned i = 0; i < calls_count; i++)
        if (!strcmp(calls[i].name, name))
            return &calls[i];
    return NULL;
}

/* The code to be called instead of `original`, 0 when there is none. It may be one of ours already. */
static uintptr_t hook_for(struct call *c, uintptr_t original)
{
    for (unsigned i = 0; i < hooks_count; i++)
        if (hooks[i].code == original || (hooks[i].call == c && hooks[i].original == original))
            return hooks[i].code;
    void *code;
    ffi_closure *closure = hooks_count < HOOKS_MAX ? ffi_closure_alloc(sizeof *closure, &code) : NULL;
    struct hook *h = &hooks[hooks_count];
    if (!closure || ffi_prep_closure_loc(closure, &c->cif, through, h, code) != FFI_OK) {
        say_once(SAY_ERROR, "MEMSYNC_HOOKS: no memory, or no leave, for a hook of '%s'; its calls are not seen",
                 c->name);
        return 0;
    }
    *h = (struct hook){.call = c, .original = original, .code = (uintptr_t)code};
    hooks_count++;
    return h->code;
}

#ifdef RELOC_SLOT

static uintptr_t round_down(uintptr_t at, uintptr_t page)
{
    return at & ~(page - 1);
}

static void slot_set(const struct module *m, uintptr_t *slot, uintptr_t value)
{
    uintptr_t at = (uintptr_t)slot, page = (uintptr_t)sysconf(_SC_PAGESIZE);
    bool sealed = at >= m->relro_low && at < m->relro_high;
    void *start = (void *)round_down(at, page);
    if (sealed && syscall(SYS_mprotect, start, page, PROT_READ | PROT_WRITE)) {
        say_once(SAY_ERROR, "MEMSYNC_HOOKS: an offset table cannot be made writable: %e; calls through it are not seen",
                 errno);
        return;
    }
    __atomic_store_n(slot, value, __ATOMIC_RELEASE);
    if (sealed)
        syscall(SYS_mprotect, start, page, PROT_READ);
}

static bool inside(const struct module *m, uintptr_t at)
{
    return at >= m->low && at < m->high;
}

static void slot_hook(const struct module *m, const ElfW(Rela) * rela)
{
    unsigned type = (unsigned)ELF64_R_TYPE(rela->r_info);
    if (type != RELOC_SLOT && type != RELOC_GOT)
        return;
    const ElfW(Sym) *symbol = &m->symbols[ELF64_R_SYM(rela->r_info)];
    unsigned kind = ELF64_ST_TYPE(symbol->st_info);
    if (kind != STT_FUNC && kind != STT_GNU_IFUNC && kind != STT_NOTYPE)
        return;
    struct call *c = call_named(m->strings + symbol->st_name);
    uintptr_t *slot = (uintptr_t *)(m->base + rela->r_offset);
    uintptr_t value = __atomic_load_n(slot, __ATOMIC_ACQUIRE);
    if (!c || !value)
        return;
    bool own = symbol->st_shndx != SHN_UNDEF && value == m->base + symbol->st_value;
    if (type == RELOC_SLOT && !own && inside(m, value)) { /* not bound yet */
        value = c->global;
        /* A program at a fixed address that takes the function's address stands in for it with its own way there. */
        if (symbol->st_shndx == SHN_UNDEF && inside(m, value))
            value = c->next;
    }
    uintptr_t code = value ? hook_for(c, value) : 0;
    if (!code)
        return;
    c->hooked = true;
    if (code != value)
        slot_set(m, slot, code);
}

/* glibc makes most of these addresses absolute in place, but not where the table is read-only. */
static uintptr_t absolute(const struct module *m, ElfW(Addr) address)
{
    return address < m->base ? m->base + address : address;
}

static void tables_hook(struct module *m, const ElfW(Dyn) * dynamic)
{
    uintptr_t slots = 0, others = 0;
    size_t slots_size = 0, others_size = 0;
    for (; dynamic->d_tag != DT_NULL; dynamic++) {
        ElfW(Addr) p = dynamic->d_un.d_ptr;
        switch (dynamic->d_tag) {
        case DT_SYMTAB:
            m->symbols = (const ElfW(Sym) *)absolute(m, p);
            break;
        case DT_STRTAB:
            m->strings = (const char *)absolute(m, p);
            break;
        case DT_JMPREL:
            slots = absolute(m, p);
            break;
        case DT_PLTRELSZ:
            slots_size = dynamic->d_un.d_val;
            break;
        case DT_RELA:
            others = absolute(m, p);
            break;
        case DT_RELASZ:
            others_size = dynamic->d_un.d_val;
            break;
        default:
            break;
        }
    }
    if (!m->symbols || !m->strings)
        return;
    for (size_t i = 0; slots && i < slots_size / sizeof(ElfW(Rela)); i++)
        slot_hook(m, (const ElfW(Rela) *)slots + i);
    for (size_t i = 0; others && i < others_size / sizeof(ElfW(Rela)); i++)
        slot_hook(m, (const ElfW(Rela) *)others + i);
}

/* The C library and what a hook itself runs on keep their own calls. */
static bool left_alone(const struct module *m, const char *path)
{
    static const char *const names[] = {"libc.so.", "ld-linux", "linux-vdso", "linux-gate", "libffi.so."};
    if (inside(m, (uintptr_t)through))
        return true;
    const char *slash = strrchr(path, '/');
    const char *base = slash ? slash + 1 : path;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strncmp(base, names[i], strlen(names[i])))
            return true;
    return false;
}

static int module_hook(struct dl_phdr_info *info, size_t size, void *arg)
{
    (void)size;
    (void)arg;
    struct module m = {.base = info->dlpi_addr, .low = UINTPTR_MAX};
    const ElfW(Dyn) *dynamic = NULL;
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    for (size_t i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *p = &info->dlpi_phdr[i];
        uintptr_t start = m.base + p->p_vaddr, end = start + p->p_memsz;
        if (p->p_type == PT_LOAD) {
            m.low = start < m.low ? start : m.low;
            m.high = end > m.high ? end : m.high;
        } else if (p->p_type == PT_GNU_RELRO) {
            m.relro_low = round_down(start, page);
            m.relro_high = round_down(end, page);
        } else if (p->p_type == PT_DYNAMIC) {
            dynamic = (const ElfW(Dyn) *)start;
        }
    }
    if (dynamic && !left_alone(&m, info->dlpi_name ? info->dlpi_name : ""))
        tables_hook(&m, dynamic);
    return 0;
}

#endif

void calls_opened(void)
{
    if (!calls_count)
        return;
#ifdef RELOC_SLOT
    for (unsigned i = 0; i < calls_count; i++) {
        __atomic_store_n(&calls[i].global, (uintptr_t)dlsym(RTLD_DEFAULT, calls[i].name), __ATOMIC_RELAXED);
        __atomic_store_n(&calls[i].next, (uintptr_t)dlsym(RTLD_NEXT, calls[i].name), __ATOMIC_RELAXED);
    }
    dl_iterate_phdr(module_hook, NULL);
#endif
}

bool calls_any(void)
{
    return calls_count;
}

/* The end of the hook at text: the comma outside of its parentheses, or the end of all. */
static char *hook_end(char *text)
{
    bool inside = false;
    for (; *text && (inside || *text != ','); text++)
        inside = *text == '(' || (inside && *text != ')');
    return text;
}

void calls_install(const char *spec)
{
    if (!spec || !*spec)
        return;
#ifndef RELOC_SLOT
    say(SAY_ERROR, "MEMSYNC_HOOKS is not built for this kind of machine: no function is hooked");
    return;
#endif
    if (strlen(spec) >= sizeof calls_text) {
        say(SAY_ERROR, "MEMSYNC_HOOKS is longer than 8191 bytes: no function is hooked");
        return;
    }
    strcpy(calls_text, spec);
    for (char *at = calls_text, *next; *at; at = next) {
        char *end = hook_end(at);
        next = end + (*end == ',');
        *end = 0;
        at += strspn(at, " \t\n");
        for (end = at + strlen(at); end > at && strchr(" \t\n", end[-1]); end--)
            end[-1] = 0;
        if (!*at)
            continue;
        if (calls_count == CALLS_MAX)
            left_out(at, "is one more than 64 hooks");
        else if (parse_call(&calls[calls_count], at) && !call_named(at))
            calls_count++;
    }
    calls_opened();
    for (unsigned i = 0; i < calls_count; i++)
        if (!calls[i].hooked)
            say(SAY_INFO, "MEMSYNC_HOOKS: no library calls '%s' so far; those opened later are looked at",
                calls[i].name);
}

/* Only now is it certain: what is hooked may come from a library opened late. Programs that track nothing are not
 * meant. */
__attribute__((destructor)) static void calls_unseen(void)
{
    for (unsigned i = 0; i < calls_count; i++)
        if (!calls[i].hooked && shim_mine() && client_used())
            say(SAY_WARN,
                "MEMSYNC_HOOKS: '%s' was never hooked: neither the program nor a library of it calls it through its "
                "offset table; is the "
                "name right (for C++, mangled), and in another library than its caller?",
                calls[i].name);
}

/* Looks for a bare file name in the directories that the caller's own library names (DT_RUNPATH and the like), as
 * dlopen would if it were called from there. */
static void *open_from(void *(*real)(const char *, int), const char *file, int mode, const void *caller)
{
    Dl_info info;
    struct link_map *map = NULL;
    Dl_serinfo bounds;
    if (!file || strchr(file, '/') || !dladdr1(caller, &info, (void **)&map, RTLD_DL_LINKMAP) || !map)
        return NULL;
    void *loaded = real(file, mode | RTLD_NOLOAD);
    if (loaded || dlinfo(map, RTLD_DI_SERINFOSIZE, &bounds) || bounds.dls_size > 8192)
        return loaded;
    union {
        Dl_serinfo info;
        char bytes[8192];
    } search;
    search.info.dls_size = bounds.dls_size;
    search.info.dls_cnt = bounds.dls_cnt;
    if (dlinfo(map, RTLD_DI_SERINFO, &search.info))
        return NULL;
    for (unsigned i = 0; i < search.info.dls_cnt; i++) {
        char path[CONTROL_PATH];
        size_t n = say_format(path, sizeof path, "%s/%s", search.info.dls_serpath[i].dls_name, file);
        void *handle = n + 1 < sizeof path && !raw_access(path, R_OK) ? real(path, mode) : NULL;
        if (handle)
            return handle;
    }
    return NULL;
}

void *calls_dlopen(void *(*real)(const char *, int), const char *file, int mode, const void *caller)
{
    int now = (mode & ~RTLD_LAZY) | RTLD_NOW;
    void *handle = open_from(real, file, now, caller);
    if (!handle)
        handle = real(file, now);
    if (!handle && (mode & RTLD_LAZY)) /* it may lack what it never calls */
        handle = real(file, mode);
    if (handle) {
        calls_opened();
        dlerror(); /* what was looked for and not found on the way is nothing to the program */
    }
    return handle;
}
