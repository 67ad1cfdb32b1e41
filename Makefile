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
TARGET := x86_64-unknown-linux-gnu
BIN := $(CARGO_TARGET_DIR)/$(TARGET)/$(PROFILE)
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
soak: deps ## the long versions of the suites
	@tests/run --soak

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
check: deps ## fmt, clippy with warnings denied, docs, sizes, cargo-deny, unit tests
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings -A rustdoc::private_intra_doc_links' cargo doc --release --workspace --no-deps --document-private-items --quiet
	tests/measure
	tests/notice --check
	tests/cargo-deny check --hide-inclusion-graph licenses bans sources
	cargo test --release --workspace --exclude bulkhead-tests

.PHONY: notice
notice: ## write NOTICE: what is linked into the programs, by licence
	tests/notice

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
install: build kernel initramfs ## install under PREFIX (default /usr/local); PROFILE=dist for the smallest binaries
	install -D -m 0755 $(BIN)/bulkhead $(DESTDIR)$(PREFIX)/bin/bulkhead
	install -D -m 0755 $(BIN)/containerd-shim-bulkhead-v1 $(DESTDIR)$(PREFIX)/bin/containerd-shim-bulkhead-v1
	install -D -m 0755 $(BIN)/bulkhead-vmm $(DESTDIR)$(PREFIX)/libexec/bulkhead/bulkhead-vmm
	install -D -m 0644 $$(cat $(IMAGE)/vmlinux.path) $(DESTDIR)$(PREFIX)/libexec/bulkhead/vmlinux
	install -D -m 0644 $(IMAGE)/initramfs $(DESTDIR)$(PREFIX)/libexec/bulkhead/initramfs

# What the lab sees as /usr/local: an installation, and the test programs.
.PHONY: stage
stage:
	@rm -rf $(STAGE)
	@$(MAKE) -s install DESTDIR= PREFIX=$(STAGE)
	@tests/stage-tests $(STAGE)/libexec/bulkhead-tests

.PHONY: clean
clean: ## remove what building left in the checkout (caches stay; see docs/testing.md)
	rm -rf $(STAGE) target
