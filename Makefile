# make            the shim, the agent and the tool, in build/
# make deps       Debian packages that building, the demo and the tests need (only what is missing; needs root or sudo)
# make demo       a small LMDB database replicated, before your eyes
# make check      every test that fits in a few minutes; sets up what it needs
# make fuzz SECONDS=60    parsers and sessions against what nobody would send
# make check-long | check-sanitize | bench
# make check-vm     the tests that need other kernels, in emulated guests with Debian's 6.1 and 6.12 (VM=6.1: in one of them)
# make bench-hashes   hash algorithms and PAGEMAP_SCAN: a table and plots in build/bench/results
# make install PREFIX=/usr/local DESTDIR=
PREFIX ?= /usr/local
BUILD ?= build
CC ?= cc
SANITIZE ?=
V ?= 0
Q := $(if $(filter 0,$(V)),@)
say = $(if $(filter 0,$(V)),@printf '  %-5s %s\n' $(1) $(2))

OPT ?= -O2 -g
WARN := -Wall -Wextra -Wshadow -Wconversion -Werror
FLAGS := -std=gnu17 -D_GNU_SOURCE -I. $(OPT) $(WARN) -pthread -MMD -MP -DMEMSYNC_PREFIX='"$(PREFIX)"'
AGENT_FLAGS = $(FLAGS) $(SANITIZE) $(shell pkg-config --cflags libuv libxxhash liblz4 libssl libcrypto)
AGENT_LIBS = $(SANITIZE) $(shell pkg-config --libs libuv libxxhash liblz4 libssl libcrypto) -pthread
# The shim lives in other people's processes: no fortify (it would call what we wrap), nothing visible that is not meant to be.
SHIM_FLAGS = $(FLAGS) -fPIC -fvisibility=hidden -U_FORTIFY_SOURCE -ftls-model=initial-exec -fno-stack-protector $(shell pkg-config --cflags libffi)
SHIM_LIBS = $(shell pkg-config --libs libffi) -ldl -pthread

WIRE := $(wildcard wire/*.c)
SHIM := $(wildcard shim/*.c) wire/control.c wire/name.c
AGENT := $(wildcard agent/nbd/*.c agent/base/*.c agent/track/*.c agent/sync/*.c agent/store/*.c agent/hub/*.c agent/net/*.c agent/page/*.c) $(WIRE)
CLI := $(wildcard agent/cli/*.c)
UNIT := $(wildcard tests/unit/*.c)
FUZZ := frame step server reconcile nbd nbd_client
PROGRAMS := $(filter-out bench/hashes.c bench/reads.c bench/packing.c bench/beside.c,$(wildcard tests/programs/*.c tests/faults/*.c bench/*.c))

shim_objects := $(SHIM:%.c=$(BUILD)/shim.o/%.o)
agent_objects := $(AGENT:%.c=$(BUILD)/o/%.o)
cli_objects := $(CLI:%.c=$(BUILD)/o/%.o)
units := $(UNIT:tests/unit/%.c=$(BUILD)/tests/unit/%)
programs := $(PROGRAMS:%.c=$(BUILD)/%)
fuzzers := $(FUZZ:%=$(BUILD)/tests/fuzz/%)

all: $(BUILD)/libmemsync_preload.so $(BUILD)/memsync-agent $(BUILD)/memsync

$(BUILD)/libmemsync_preload.so: $(shim_objects) shim/exports.map
	$(call say,LINK,$@)
	$(Q)$(CC) -shared -Wl,--version-script=shim/exports.map -Wl,-z,now -Wl,-z,nodelete -o $@ $(shim_objects) $(SHIM_LIBS)

$(BUILD)/memsync-agent: $(BUILD)/o/agent/main.o $(BUILD)/o/agent/options.o $(agent_objects)
	$(call say,LINK,$@)
	$(Q)$(CC) -o $@ $^ $(AGENT_LIBS)

$(BUILD)/memsync: $(cli_objects) $(agent_objects) $(BUILD)/shim.o/shim/rules.o
	$(call say,LINK,$@)
	$(Q)$(CC) -o $@ $^ $(AGENT_LIBS) $(shell pkg-config --libs jansson)
$(cli_objects): AGENT_FLAGS += $(shell pkg-config --cflags jansson)

$(BUILD)/shim.o/%.o: %.c
	$(call say,CC,$<)
	@mkdir -p $(@D)
	$(Q)$(CC) $(SHIM_FLAGS) -c -o $@ $<

$(BUILD)/o/%.o: %.c
	$(call say,CC,$<)
	@mkdir -p $(@D)
	$(Q)$(CC) $(AGENT_FLAGS) -c -o $@ $<

$(BUILD)/tests/unit/%: $(BUILD)/o/tests/unit/%.o $(agent_objects) $(BUILD)/shim.o/shim/rules.o $(BUILD)/shim.o/shim/ranges.o
	$(call say,LINK,$@)
	@mkdir -p $(@D)
	$(Q)$(CC) -o $@ $^ $(AGENT_LIBS) -lcmocka

# Fuzz targets bring their own parts; see `make fuzz` for the compiler and flags that all of it wants.
$(BUILD)/tests/fuzz/server: $(BUILD)/o/tests/fuzz/world.o $(BUILD)/o/tests/fuzz/model.o
$(BUILD)/tests/fuzz/reconcile: $(BUILD)/o/tests/fuzz/world.o
$(BUILD)/tests/fuzz/%: $(BUILD)/o/tests/fuzz/%.o $(agent_objects) $(BUILD)/shim.o/shim/rules.o
	$(call say,LINK,$@)
	@mkdir -p $(@D)
	$(Q)$(CC) -fsanitize=fuzzer -o $@ $^ $(AGENT_LIBS)

# The prefix is compiled in where one part looks for another: a changed one makes these anew.
$(shell mkdir -p $(BUILD); echo '$(PREFIX)' | cmp -s - $(BUILD)/prefix || echo '$(PREFIX)' >$(BUILD)/prefix)
$(BUILD)/shim.o/shim/start.o $(cli_objects): $(BUILD)/prefix

# Programs under test are plain programs: they link nothing of ours.
$(programs): $(BUILD)/%: %.c
	$(call say,CC,$<)
	@mkdir -p $(@D)
	$(Q)$(CC) $(FLAGS) -o $@ $< -pthread -ldl

# The one that measures libraries links them.
$(BUILD)/bench/hashes: bench/hashes.c
	$(call say,CC,$<)
	@mkdir -p $(@D)
	$(Q)$(CC) $(FLAGS) $(shell pkg-config --cflags libxxhash libcrypto) -o $@ $< $(shell pkg-config --libs libxxhash libcrypto)

# Those that speak the protocol, or measure a part of the agent, link it.
$(BUILD)/bench/reads $(BUILD)/bench/packing $(BUILD)/bench/beside: $(BUILD)/bench/%: $(BUILD)/o/bench/%.o $(agent_objects)
	$(call say,LINK,$@)
	@mkdir -p $(@D)
	$(Q)$(CC) -o $@ $^ $(AGENT_LIBS)

-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)

tests: all $(units) $(programs) $(BUILD)/bench/beside

deps:
	@tests/deps.sh

# These install what they need first, so the rest is another make's work.
demo:
	@tests/deps.sh build demo
	@$(MAKE) --no-print-directory all
	@BUILD=$(BUILD) agent/cli/demo.sh

check:
	@tests/deps.sh build check
	@$(MAKE) --no-print-directory tests
	@$(MAKE) --no-print-directory fuzzers
	@BUILD=$(BUILD) tests/run.sh

# 200 rounds of kills and cuts, where `check` has 20.
check-long:
	@tests/deps.sh build check
	@$(MAKE) --no-print-directory tests
	@BUILD=$(BUILD) tests/run.sh long

# Guests: kernels come by apt into the user's cache, nothing is installed on this machine but the emulator (tests/vm/lib).
VM ?=
check-vm:
	@tests/deps.sh build check vm
	@$(MAKE) --no-print-directory tests
	@BUILD=$(BUILD) VM='$(VM)' tests/run.sh vm

# The agent and the unit tests under AddressSanitizer and UndefinedBehaviorSanitizer; the programs and the shim in them stay as they are.
check-sanitize:
	@tests/deps.sh build check
	@$(MAKE) --no-print-directory BUILD=build-sanitize OPT='-O1 -g' SANITIZE='-fsanitize=address,undefined -fno-sanitize-recover=undefined' tests
	@BUILD=build-sanitize ASAN_OPTIONS=quarantine_size_mb=16 tests/run.sh unit faults

# Parsers and sessions against bytes that nobody would send: all targets, SECONDS together (tests/fuzz/run.sh).
SECONDS ?= 60
fuzz:
	@tests/deps.sh build check
	@$(MAKE) --no-print-directory fuzzers
	@BUILD=build-fuzz tests/fuzz/run.sh all $(SECONDS)

fuzzers:
	@$(MAKE) --no-print-directory BUILD=build-fuzz CC=clang OPT='-O1 -g -fno-omit-frame-pointer' \
		SANITIZE='-fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined' fuzz-targets
fuzz-targets: $(fuzzers)

bench:
	@tests/deps.sh build check bench
	@$(MAKE) --no-print-directory tests $(BUILD)/bench/reads $(BUILD)/bench/packing
	@BUILD=$(BUILD) bench/run.sh

bench-hashes:
	@tests/deps.sh build bench
	@$(MAKE) --no-print-directory $(BUILD)/bench/hashes
	@BUILD=$(BUILD) bench/hashes.sh

to := $(DESTDIR)$(PREFIX)
install: all
	install -d $(to)/bin $(to)/lib $(to)/share/man/man1 $(to)/share/man/man7 $(to)/share/man/man8
	install -m 755 $(BUILD)/memsync $(BUILD)/memsync-agent $(to)/bin
	install -m 644 $(BUILD)/libmemsync_preload.so $(to)/lib
	install -m 644 agent/cli/memsync.1 $(to)/share/man/man1
	install -m 644 shim/memsync_preload.7 $(to)/share/man/man7
	install -m 644 agent/memsync-agent.8 $(to)/share/man/man8

uninstall:
	rm -f $(to)/bin/memsync $(to)/bin/memsync-agent $(to)/lib/libmemsync_preload.so
	rm -f $(to)/share/man/man1/memsync.1 $(to)/share/man/man7/memsync_preload.7 $(to)/share/man/man8/memsync-agent.8

clean:
	rm -rf $(BUILD)

.PHONY: all tests fuzz fuzzers fuzz-targets deps demo check install uninstall clean check-long check-sanitize bench bench-hashes
.SECONDARY:
