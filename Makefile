# Bulkhead: `make run` runs a container in a microVM, `make test` runs everything that CI runs, `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

# What is expensive to make (kernel, Debian roots, lab image, crates) is cached here, keyed by its inputs.
export BULKHEAD_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/bulkhead
export CARGO_TARGET_DIR ?= $(BULKHEAD_CACHE)/target
export CARGO_TERM_COLOR ?= auto

PREFIX ?= /usr/local
PROFILE ?= release
TRIPLE := x86_64-unknown-linux-gnu
BIN := $(CARGO_TARGET_DIR)/$(TRIPLE)/$(PROFILE)
STAGE := $(CURDIR)/stage
IMAGE := $(CARGO_TARGET_DIR)/image

# Debian packages that building needs; the lab installs its own (tests/lab/lab deps).
PACKAGES := gcc libc6-dev libseccomp-dev python3 python3-pip git

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: stage ## build everything and run a sample container in a microVM, here or in the lab
	@tests/sample/run-anywhere

.PHONY: test
test: deps ## everything that CI runs, at smoke size, each suite with its time budget
	@tests/run

.PHONY: soak
soak: PACKAGES += g++
soak: deps ## the long versions of the suites
	@tests/run --soak

# Unit tests, so built that more is noticed. Each has a target directory of its own.
UNIT_TESTS := -p bulkhead-vmm -p bulkhead-vmm-config -p bulkhead-linux -p bulkhead-agent -p bulkhead-shim -p bulkhead-rootfs-builder -p bulkhead-images --lib --bins

.PHONY: test-overflow
test-overflow: deps ## unit tests with overflow checks and debug assertions, std's included, in every crate
	CARGO_TARGET_DIR=$(BULKHEAD_CACHE)/target-overflow CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS=true CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true \
	  cargo test --release $(UNIT_TESTS)

# In place of the flags of .cargo/config.toml: a sanitizer's program cannot be static. Pages that live as long as the process are no leak.
.PHONY: test-asan
test-asan: deps ## unit tests with AddressSanitizer, and all of test-overflow; needs a nightly toolchain
	CARGO_TARGET_DIR=$(BULKHEAD_CACHE)/target-asan CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS=true CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true \
	  RUSTFLAGS=-Zsanitizer=address ASAN_OPTIONS=detect_leaks=0 cargo +nightly test --release $(UNIT_TESTS)

TARGET ?= all
SECONDS ?= 60

.PHONY: fuzz
fuzz: PACKAGES += g++
fuzz: deps ## libFuzzer on TARGET=NAME (all of them without it) for SECONDS=60 each; needs a nightly toolchain
	@tests/fuzz/fuzz --seconds $(SECONDS) $(TARGET)

.PHONY: bench
bench: stage ## the figures, beside their peers', from one lab run
	@tests/bench/run

.PHONY: test-containerd2
test-containerd2: deps stage ## the suite containerd against containerd 2.3, built here (needs Go 1.26)
	@tests/containerd2

.PHONY: oracle
oracle: PACKAGES += runc
oracle: deps ## what a share does otherwise than the bare file system, in seconds and without a machine
	@cargo test --release -q -p bulkhead-vmm --test fs_oracle -- --ignored --nocapture

.PHONY: lab
lab: stage ## a shell in the lab, with this build installed
	@tests/lab/lab shell --install $(STAGE)

.PHONY: deps
deps:
	@command -v cargo >/dev/null || { echo 'make: cargo is missing: install a Rust toolchain (1.88 or newer), then run this again' >&2; exit 1; }
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f='$${Status}\n' $$p 2>/dev/null | grep -q '^install ok' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	  echo "==> installing" $$missing; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	fi

.PHONY: check
check: PACKAGES += busybox-static
check: deps ## fmt, clippy with warnings denied, docs, sizes, cargo-deny, unit tests
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings -A rustdoc::private_intra_doc_links' cargo doc --release --workspace --no-deps --document-private-items --quiet
	tests/measure
	tests/notice --check
	tests/cargo-deny check --hide-inclusion-graph licenses bans sources
	tests/advisories
	cargo test --release --workspace --exclude bulkhead-tests

.PHONY: notice
notice: ## write NOTICE: what is linked into the programs, by licence
	tests/notice

.PHONY: advisories
advisories: ## the newest published advisories about the crates of Cargo.lock; needs the network
	tests/advisories --fetch

.PHONY: build
build: deps ## the programs
	@echo '==> building the programs'
	@cargo build --profile $(PROFILE) -p bulkhead-shim -p bulkhead-vmm -p bulkhead-agent -p bulkhead-rootfs-builder

.PHONY: kernel
kernel: ## the guest kernel (built inside the lab's Debian 13 root, cached)
	@tests/lab/lab deps
	@mkdir -p $(IMAGE)
	@guest-kernel-config/build > $(IMAGE)/vmlinux.path
	@guest-kernel-config/check "$$(dirname "$$(cat $(IMAGE)/vmlinux.path)")/.config"

.PHONY: initramfs
initramfs: build ## the guest image
	@mkdir -p $(IMAGE)
	@$(BIN)/bulkhead-rootfs-builder --manifest rootfs-builder/manifest.toml --agent $(BIN)/bulkhead-agent --output $(IMAGE)/initramfs

.PHONY: install
install: build kernel initramfs ## install under PREFIX (default /usr/local), with notices and a bill of materials; PROFILE=dist for the smallest binaries
	install -D -m 0755 $(BIN)/bulkhead $(DESTDIR)$(PREFIX)/bin/bulkhead
	install -D -m 0755 $(BIN)/containerd-shim-bulkhead-v1 $(DESTDIR)$(PREFIX)/bin/containerd-shim-bulkhead-v1
	install -D -m 0755 $(BIN)/bulkhead-vmm $(DESTDIR)$(PREFIX)/libexec/bulkhead/bulkhead-vmm
	install -D -m 0644 $$(cat $(IMAGE)/vmlinux.path) $(DESTDIR)$(PREFIX)/libexec/bulkhead/vmlinux
	install -D -m 0644 $(IMAGE)/initramfs $(DESTDIR)$(PREFIX)/libexec/bulkhead/initramfs
	install -D -m 0644 LICENSE $(DESTDIR)$(PREFIX)/share/doc/bulkhead/LICENSE
	tests/notice --ship $(DESTDIR)$(PREFIX)/share/doc/bulkhead "$$(dirname "$$(cat $(IMAGE)/vmlinux.path)")/build-info"

# What the lab sees as /usr/local: an installation, and the test programs.
.PHONY: stage
stage:
	@rm -rf $(STAGE)
	@$(MAKE) -s install DESTDIR= PREFIX=$(STAGE)
	@tests/binaries $(STAGE)/bin/* $(STAGE)/libexec/bulkhead/bulkhead-vmm $(BIN)/bulkhead-agent
	@tests/stage-tests $(STAGE)/libexec/bulkhead-tests

.PHONY: clean
clean: ## remove what building left in the checkout (caches stay; see docs/testing.md)
	rm -rf $(STAGE) target
