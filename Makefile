# SPDX-License-Identifier: Apache-2.0
# Targets for people; `make help` lists them.

GO      ?= go
SUDO    ?= $(if $(filter 0,$(shell id -u)),,sudo)
VERSION ?= $(shell git describe --always --dirty 2>/dev/null || echo unknown)
LDFLAGS  = -s -w -X main.version=$(VERSION)

.PHONY: help build demo test test-unit test-e2e test-vm soak bench-quick bench bench-scale bench-apps fuzz generate lint clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

build: ## bin/ztunnel (needs Go only)
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "$(LDFLAGS)" -o bin/ztunnel ./cmd/ztunnel

demo: build ## two nodes with two pods each, real traffic, and the proof (needs root for the run)
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/demo ./test/demo
	$(SUDO) bin/demo -ztunnel bin/ztunnel $(DEMOFLAGS)

test: ## everything that .ci/run tests (needs root)
	$(SUDO) env "PATH=$$PATH" scripts/test

test-vm: ## the privileged tests on Debian's 6.1 and 6.12 kernels, in QEMU; up to an hour each
	scripts/test-vm $(KERNELS)

soak: ## certificates of 20 s life under 500 requests a second, five minutes, an authority that stops, and each hostile peer for a minute (needs root)
	$(SUDO) env "PATH=$$PATH" CULVERT_SOAK=1 $(GO) test -count=1 -v -timeout 15m -run '^(TestRenewalUnderLoad|TestStoppedAuthority)$$' ./test/e2e
	mkdir -p out
	$(SUDO) env "PATH=$$PATH" CULVERT_SOAK=1 sh -c '$(GO) test -count=1 -v -timeout 120m ./test/hostile >out/hostile-soak.txt 2>&1; s=$$?; grep -v "^=== " out/hostile-soak.txt; exit $$s'

bin/bench: build
	CGO_ENABLED=0 $(GO) build -trimpath -o $@ ./test/bench

bench-quick: bin/bench ## direct TCP, Culvert and Envoy's sidecars, with ratios; 3 minutes (needs root, iptables)
	[ -n "$$PEER_ENVOY" ] || scripts/peers
	$(SUDO) env "PATH=$$PATH" "PEER_ENVOY=$$PEER_ENVOY" bin/bench quick $(BENCHFLAGS)

bench: bin/bench ## every path by every work, 8 rounds, charts, into out/bench; up to 75 minutes (needs root, iptables, haproxy)
	scripts/bench-peers
	$(SUDO) env "PATH=$$PATH" "PEER_ENVOY=$$PEER_ENVOY" "PEER_ZTUNNEL=$$PEER_ZTUNNEL" bin/bench full $(BENCHFLAGS)

bench-scale: bin/bench ## what 2 to 200 pods on a node cost, and 100,000 workloads; 30 minutes (needs root, iptables, memory for 200 Envoys)
	scripts/bench-peers
	$(SUDO) env "PATH=$$PATH" "PEER_ENVOY=$$PEER_ENVOY" "PEER_ZTUNNEL=$$PEER_ZTUNNEL" bin/bench scale $(BENCHFLAGS)

bench-apps: bin/bench ## nginx under wrk, redis under redis-benchmark, over the same paths; 10 minutes (needs root, and these programs)
	scripts/bench-peers
	$(SUDO) env "PATH=$$PATH" "PEER_ENVOY=$$PEER_ENVOY" "PEER_ZTUNNEL=$$PEER_ZTUNNEL" bin/bench apps $(BENCHFLAGS)

FUZZTIME ?= 30s
fuzz: ## every fuzz target for FUZZTIME each
	scripts/fuzz $(FUZZTIME)

generate: ## the BPF objects (needs clang-14)
	$(GO) generate ./bpf

lint: ## gofmt, vet, staticcheck
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); echo "run gofmt -w on these files"; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...

clean: ## what was built
	rm -rf bin out
