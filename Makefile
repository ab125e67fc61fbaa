# Kvasir. `make help` lists the targets.

GO       ?= go
# Pure Go zstd halves the build; everything works without a C compiler.
TAGS     := pebblegozstd
BIN      := bin
PEERS    := internal/bench/peers
BUF      := $(GO) tool -modfile=proto/buf.mod buf
FUZZTIME ?= 20s
FIRST    ?= 1
SEEDS    ?= 32
MINUTES  ?= 4
IMAGE    ?= kvasir:dev
AUTONOMY ?=

.DEFAULT_GOAL := help
.PHONY: help build run test lint race sim sim-long sim-mutants day e2e chaos fuzz proto check-proto image compose-up compose-down test-compose test-prometheus bench-peers bench-floors bench-size bench-scale bench-quorum clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## Build kvnode, kvorch and kvctl into bin/
	@echo "building into $(BIN)/ (the first time this takes a few minutes) ..."
	@$(GO) build -tags $(TAGS) -o $(BIN)/ ./cmd/kvnode ./cmd/kvorch ./cmd/kvctl

run: build ## Run a cluster of three nodes on this machine until Ctrl-C (ARGS="--nodes 5" and so on)
	@exec $(BIN)/kvctl dev $(ARGS)

test: lint ## Run everything a change must pass
	$(GO) test -vet=off -tags $(TAGS) -timeout 15m ./...

lint: ## Check formatting, vet and staticcheck
	@unformatted="$$(gofmt -l cmd client deploy internal)"; if [ -n "$$unformatted" ]; then echo "gofmt: $$unformatted"; exit 1; fi
	$(GO) vet -tags $(TAGS) ./...
	$(GO) tool staticcheck -tags $(TAGS) ./...

race: ## Run the tests under the race detector, the simulation with four seeds
	KVASIR_SIM_SEEDS=4 $(GO) test -race -tags $(TAGS) -timeout 30m ./...

sim: ## Simulate whole clusters under faults: SEEDS seeds from FIRST on, MINUTES of load each (FAULTS=a,b for some)
	KVASIR_SIM_SEEDS=$(SEEDS) KVASIR_SIM_FIRST=$(FIRST) KVASIR_SIM_MINUTES=$(MINUTES) KVASIR_SIM_FAULTS=$(FAULTS) \
		$(GO) test -tags $(TAGS) -count=1 -timeout 4h -v -run '^TestSim$$' ./internal/sim

sim-long: ## Simulate 12 cluster hours under faults
	@$(MAKE) --no-print-directory sim SEEDS=180

day: ## Simulate a day of the policy and the planner with NODES=1000 nodes, from SEED=1
	KVASIR_DAY_NODES=$(or $(NODES),1000) KVASIR_DAY_SEED=$(or $(SEED),1) $(GO) test -tags $(TAGS) -count=1 -timeout 4h -v -run '^TestADay$$' ./internal/orchestrator

sim-mutants: ## Check the simulation's checker: it finds every planted bug (MUTANTS=a,b for some)
	KVASIR_SIM_MINUTES=$(MINUTES) KVASIR_MUTANTS=$(MUTANTS) \
		$(GO) test -tags $(TAGS),mutants -count=1 -timeout 4h -v -run '^TestMutants$$' ./internal/sim

e2e: build ## Kill, pause and restart real processes under load, in full length
	KVASIR_E2E=full $(GO) test -tags $(TAGS) -count=1 -timeout 30m -v -run 'TestE2E' ./internal/devcluster

chaos: MINUTES = 10
chaos: ## Break real processes, networks and disks for MINUTES, each fault at least 5 times (needs root)
	KVASIR_CHAOS=$(MINUTES)m $(GO) test -tags $(TAGS) -count=1 -timeout 0 -v -run '^TestChaos$$' ./internal/devcluster/chaos

fuzz: ## Run every fuzz target for FUZZTIME
	@set -e; for pkg in $$($(GO) list ./...); do \
		for target in $$($(GO) test -tags $(TAGS) -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
			echo "== $$pkg $$target"; $(GO) test -tags $(TAGS) -run xxx -fuzz "^$$target$$" -fuzztime $(FUZZTIME) $$pkg; \
		done; \
	done

proto: ## Generate code from proto/ (builds buf the first time: minutes)
	$(BUF) lint proto
	$(BUF) generate --template proto/buf.gen.yaml
	$(BUF) generate --template proto/buf.gen.hot.yaml

check-proto: ## Check that the generated code is up to date
	@before="$$(git status --porcelain proto; find proto -name '*.go' -exec sha256sum {} +)"; \
	$(MAKE) --no-print-directory proto && \
	after="$$(git status --porcelain proto; find proto -name '*.go' -exec sha256sum {} +)"; \
	if [ "$$before" != "$$after" ]; then echo "generated code is out of date: commit what make proto wrote"; exit 1; fi; echo "generated code is up to date"

image: ## Build the container image from static binaries
	@deploy/docker/build.sh $(IMAGE)

compose-up: image ## Run the compose cluster: 3 orchestrators, 5 nodes in 3 zones, a reporting node (AUTONOMY=1: it launches and ends nodes)
	@KVASIR_IMAGE=$(IMAGE) deploy/compose/compose.sh $(if $(AUTONOMY),autonomy,up)

compose-down: ## Stop the compose cluster, with what it launched, and delete its volumes
	@deploy/compose/compose.sh down

test-compose: ## Test the compose cluster; skipped where no Docker engine answers
	@deploy/compose/test.sh

test-prometheus: ## Test the alerts, and scrape a real cluster with Prometheus (from Debian's package where there is none)
	@GO="$(GO)" TAGS="$(TAGS)" deploy/prometheus/test.sh

bench-peers: build ## Measure Kvasir against etcd, NATS, Olric and Redis (SYSTEMS=a,b WORKLOADS=a,c ROUNDS=3 RECORDS= THREADS= DURATION=20s JSON=file DIR=on-a-disk)
	@echo "building the peers into $(BIN)/peers/ (the first time this takes a few minutes) ..."
	@cd $(PEERS) && $(GO) vet ./... && $(GO) build -o $(CURDIR)/$(BIN)/peers/bench-peers . && \
		$(GO) build -o $(CURDIR)/$(BIN)/peers/etcd go.etcd.io/etcd/server/v3 && \
		$(GO) build -o $(CURDIR)/$(BIN)/peers/nats-server github.com/nats-io/nats-server/v2 && \
		$(GO) build -o $(CURDIR)/$(BIN)/peers/olricd github.com/buraksezer/olric/cmd/olricd
	@exec $(BIN)/peers/bench-peers $(foreach o,SYSTEMS WORKLOADS ROUNDS RECORDS THREADS DURATION JSON DIR,$(if $($o),-$(shell echo $o | tr A-Z a-z) "$($o)"))

bench-floors: build ## Measure what operations are made of, alone, and how far above that Kvasir is (DURATION=2s for each, three times)
	KVASIR_FLOORS=$(or $(DURATION),2s) KVASIR_BIN=$(CURDIR)/$(BIN) $(GO) test -tags $(TAGS) -count=1 -timeout 30m -v -run '^TestFloors$$' ./internal/bench
	KVASIR_MOVE_MIB=128 $(GO) test -tags $(TAGS) -count=1 -timeout 30m -v -run '^TestMoveRate$$' ./internal/handoff

bench-size: build ## Measure idle nodes, three nodes against nine, and many keys against few (DURATION=10s for each)
	KVASIR_SIZE=$(or $(DURATION),10s) KVASIR_BIN=$(CURDIR)/$(BIN) $(GO) test -tags $(TAGS) -count=1 -timeout 60m -v -run '^TestSize$$' ./internal/bench

bench-scale: build ## Measure what grows with nodes: plans, topologies, links, the control plane with hundreds of simulated nodes
	KVASIR_SCALE=1 KVASIR_BIN=$(CURDIR)/$(BIN) $(GO) test -tags $(TAGS) -count=1 -timeout 30m -v -run '^(TestScale|TestControlPlane)$$' ./internal/bench

bench-quorum: build ## Measure what callers wait for by quorum, two of five replicas far, and by read repair; draw it (DURATION=4s of each load, ROUNDS=3 DELAY=20ms JSON=file)
	KVASIR_QUORUM=$(or $(DURATION),4s) KVASIR_QUORUM_ROUNDS=$(ROUNDS) KVASIR_QUORUM_DELAY=$(DELAY) KVASIR_BIN=$(CURDIR)/$(BIN) \
		KVASIR_QUORUM_PICTURES=$(CURDIR)/docs/pictures KVASIR_QUORUM_JSON=$(abspath $(JSON)) \
		$(GO) test -tags $(TAGS) -count=1 -timeout 4h -v -run '^TestQuorum$$' ./internal/bench/quorum

clean: ## Delete what was built
	rm -rf $(BIN)
