package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/kvasirdb/kvasir/internal/bench"
)

// system is a store of three replicas on this machine, for one round.
type system interface {
	// start launches the servers and returns when all replicas take part.
	start(context.Context) error
	// stores are what the threads use in turn. REQUIRES: start has succeeded.
	stores() []bench.Store
	// servers are the processes that run.
	servers() []server
	// check returns an error when a server has ended.
	check() error
	// stop ends every process, also after a start that failed.
	stop() error
}

// server is a process of a system.
type server struct {
	name string
	pid  int
	// replica: it holds data. What only controls others does not.
	replica bool
}

// guarantees say what the numbers were had for.
type guarantees struct {
	// Write is when a write is acknowledged, Read what a read sees.
	Write string `json:"write"`
	Read  string `json:"read"`
}

// place is where a system runs.
type place struct {
	// bin has Kvasir's programs, peers the others', dir the data.
	bin, peers, dir string
	// threads is how many operations there are at once.
	threads int
}

// kind is a system that can be measured.
type kind struct {
	name string
	guarantees
	// missing, unless nil, returns what hinders it on this machine.
	missing func() error
	// version returns what is measured.
	version func(place) (string, error)
	create  func(place) system
}

// kinds are in the order of tables.
var kinds = []kind{kvasirKind, etcdKind, natsKind, olricKind, redisKind}

func names() []string {
	out := make([]string, len(kinds))
	for i, k := range kinds {
		out[i] = k.name
	}
	return out
}

func find(name string) (kind, error) {
	for _, k := range kinds {
		if k.name == name {
			return k, nil
		}
	}
	return kind{}, fmt.Errorf("system %q: want some of %s", name, strings.Join(names(), ", "))
}

// replicas is how many each system has.
const replicas = 3

// each calls load for every record: for systems that cannot store many at once.
func each(keys, values [][]byte, load func(key, value []byte) error) error {
	for i := range keys {
		if err := load(keys[i], values[i]); err != nil {
			return err
		}
	}
	return nil
}

// noScan is a store without scans in the order of keys.
type noScan struct{}

func (noScan) Scan(context.Context, []byte, int) error {
	return fmt.Errorf("scan: %w", errors.ErrUnsupported)
}

func address(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }
