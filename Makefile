# SPDX-License-Identifier: Apache-2.0
# Targets for people; `make help` lists them.

GO      ?= go
SUDO    ?= $(if $(filter 0,$(shell id -u)),,sudo)
VERSION ?= $(shell git describe --always --dirty 2>/dev/null || echo unknown)
LDFLAGS  = -s -w -X main.version=$(VERSION)

# Where `make install` puts things; DESTDIR is put in front of each.
PREFIX        ?= /usr/local
bindir        ?= $(PREFIX)/bin
unitdir       ?= $(PREFIX)/lib/systemd/system
docdir        ?= $(PREFIX)/share/doc/culvert
sysconfdir    ?= /etc
localstatedir ?= /var
INSTALL       ?= install

.PHONY: help build demo test test-unit test-e2e test-vm soak bench-quick bench bench-scale bench-apps fuzz generate lint clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

build: ## bin/ztunnel (needs Go only)
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "$(LDFLAGS)" -o bin/ztunnel ./cmd/ztunnel

.PHONY: install uninstall deb
install: ## bin/ztunnel, a systemd unit, examples where no file is yet (PREFIX, DESTDIR)
	@test -x bin/ztunnel || { echo "there is no bin/ztunnel: run make build first" >&2; exit 1; }
	$(INSTALL) -d $(DESTDIR)$(bindir) $(DESTDIR)$(unitdir) $(DESTDIR)$(docdir)/docs $(DESTDIR)$(sysconfdir)/culvert
	$(INSTALL) -d -m 700 $(DESTDIR)$(localstatedir)/lib/culvert
	$(INSTALL) bin/ztunnel $(DESTDIR)$(bindir)/ztunnel
	sed 's|/usr/local/bin/|$(bindir)/|; s|/etc/culvert/|$(sysconfdir)/culvert/|' deploy/systemd/culvert.service >$(DESTDIR)$(unitdir)/culvert.service
	chmod 644 $(DESTDIR)$(unitdir)/culvert.service
	$(INSTALL) -m 644 README.md SECURITY.md LICENSE $(DESTDIR)$(docdir)
	$(INSTALL) -m 644 docs/*.md $(DESTDIR)$(docdir)/docs
	@for f in deploy/etc/*.yaml; do \
		to=$(DESTDIR)$(sysconfdir)/culvert/$${f##*/}; \
		if test -e $$to; then echo "$$to is there already, and stays as it is"; \
		else echo "$(INSTALL) -m 644 $$f $$to"; $(INSTALL) -m 644 $$f $$to || exit 1; fi; \
	done

uninstall: ## what install has put there; configuration and certificates stay
	rm -f $(DESTDIR)$(bindir)/ztunnel $(DESTDIR)$(unitdir)/culvert.service
	rm -rf $(DESTDIR)$(docdir)

deb: build ## out/culvert_*.deb, for this machine's kind (needs dpkg-deb)
	rm -rf out/deb
	$(MAKE) --no-print-directory install DESTDIR=out/deb PREFIX=/usr
	mkdir out/deb/DEBIAN
	printf '%s\n' 'Package: culvert' 'Version: 0~$(VERSION)' "Architecture: $$(dpkg --print-architecture)" \
		'Maintainer: The Culvert authors <https://github.com/culvert-mesh/culvert>' 'Section: net' 'Priority: optional' \
		'Description: mutual TLS for the pods of a node, transparently' >out/deb/DEBIAN/control
	cd out/deb && find etc -type f -printf '/%p\n' >DEBIAN/conffiles
	dpkg-deb --build --root-owner-group out/deb out

demo: build ## two nodes with two pods each, real traffic, and the proof (needs root for the run)
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/demo ./test/demo
	$(SUDO) bin/demo -ztunnel bin/ztunnel $(DEMOFLAGS)

test: ## everything that .ci/run tests (needs root)
	$(SUDO) env "PATH=$$PATH" scripts/test

test-vm: ## the privileged tests on Debian's 6.1 and 6.12 kernels, in QEMU; up to an hour each
	scripts/test-vm $(KERNELS)

SOAKTIME ?= 60s
soak: ## 40 minutes: certificates of 20 s life under 500 requests a second, an authority that stops, and each hostile peer for SOAKTIME (needs root)
	$(SUDO) env "PATH=$$PATH" CULVERT_SOAK=$(SOAKTIME) $(GO) test -count=1 -v -timeout 15m -run '^(TestRenewalUnderLoad|TestStoppedAuthority)$$' ./test/e2e
	mkdir -p out
	$(SUDO) env "PATH=$$PATH" CULVERT_SOAK=$(SOAKTIME) CULVERT_HOSTILE_REPORT="$(CURDIR)/docs/hostile.md" sh -c '{ $(GO) test -count=1 -v -timeout 60m ./test/hostile; echo $$? >out/hostile-soak.status; } 2>&1 | tee out/hostile-soak.txt | grep --line-buffered -v "^=== "; exit $$(cat out/hostile-soak.status)'

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
