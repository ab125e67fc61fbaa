package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"strings"

	"github.com/buraksezer/olric"
	"github.com/buraksezer/olric/config"

	"github.com/kvasirdb/kvasir/internal/bench"
	"github.com/kvasirdb/kvasir/internal/sim/loopback"
)

var olricKind = kind{
	name: "olric",
	guarantees: guarantees{
		Write: "in the memory of all 3 members (replicated synchronously; write quorum 2); never on disk",
		Read:  "compares the members' versions, 2 at least (read quorum 2); the newest clock wins",
	},
	version: func(p place) (string, error) { return moduleVersion(filepath.Join(p.peers, "olricd")) },
	create:  func(p place) system { return &olricMap{place: p} },
}

// olricMap is a distributed map of Olric on three members.
type olricMap struct {
	place
	fleet
	client *olric.ClusterClient
	dmap   olric.DMap
}

// olricConfig is a member's configuration: its port, that of its gossip, and its peers.
// What is not a port, a quorum or a count is that of olricd-local.yaml, as released.
const olricConfig = `olricd:
  bindAddr: 127.0.0.1
  bindPort: %d
  keepAlivePeriod: 300s
  bootstrapTimeout: 60s
  partitionCount: 271
  replicaCount: 3
  writeQuorum: 2
  readQuorum: 2
  readRepair: false
  replicationMode: 0 # synchronous
  memberCountQuorum: 3
  routingTablePushInterval: 1m
client:
  dialTimeout: 5s
  readTimeout: 3s
  writeTimeout: 3s
logging:
  verbosity: 3
  level: WARN
  output: stderr
memberlist:
  environment: local
  bindAddr: 127.0.0.1
  bindPort: %d
  enableCompression: false
  joinRetryInterval: 500ms
  maxJoinAttempts: 60
  peers: [%s]
`

func (o *olricMap) start(ctx context.Context) error {
	port := loopback.Base(nil, 2*replicas)
	var endpoints []string
	for i := range replicas {
		var others []string
		for j := range i { // the first waits for nobody, the others for those before them
			others = append(others, fmt.Sprintf("%q", address(port+replicas+j)))
		}
		name := fmt.Sprintf("olric%d", i+1)
		path := filepath.Join(o.dir, name+".yaml")
		text := fmt.Sprintf(olricConfig, port+i, port+replicas+i, strings.Join(others, ", "))
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return err
		}
		if err := o.launch(o.dir, name, filepath.Join(o.peers, "olricd"), "--config", path); err != nil {
			return err
		}
		endpoints = append(endpoints, address(port+i))
	}
	return o.ready(ctx, func(ctx context.Context) error { return o.open(ctx, endpoints) })
}

// open makes the client, and checks that three members hold each partition.
func (o *olricMap) open(ctx context.Context, endpoints []string) error {
	if o.client != nil {
		o.client.Close(ctx)
		o.client = nil
	}
	pool := config.NewClient()
	pool.PoolSize = o.threads // one for each that may wait, as Redis' client has
	client, err := olric.NewClusterClient(endpoints, olric.WithConfig(pool), olric.WithLogger(log.New(io.Discard, "", 0)))
	if err != nil {
		return err
	}
	o.client = client
	table, err := client.RoutingTable(ctx)
	if err != nil {
		return err
	}
	for id, route := range table {
		if n := len(route.PrimaryOwners) + len(route.ReplicaOwners); n != replicas {
			return fmt.Errorf("partition %d has %d members, want %d", id, n, replicas)
		}
	}
	o.dmap, err = client.NewDMap("bench")
	if err != nil {
		return err
	}
	return o.dmap.Put(ctx, "probe", []byte("probe"))
}

func (o *olricMap) stores() []bench.Store { return []bench.Store{olricStore{dmap: o.dmap}} }

func (o *olricMap) stop() error {
	if o.client != nil {
		o.client.Close(context.Background())
	}
	return o.fleet.stop()
}

type olricStore struct {
	noScan
	dmap olric.DMap
}

func (s olricStore) Read(ctx context.Context, key []byte) error {
	res, err := s.dmap.Get(ctx, string(key))
	if errors.Is(err, olric.ErrKeyNotFound) {
		return bench.ErrNotFound
	}
	if err == nil {
		_, err = res.Byte()
	}
	return err
}

func (s olricStore) Write(ctx context.Context, key, value []byte) error {
	return s.dmap.Put(ctx, string(key), value)
}

func (s olricStore) Load(ctx context.Context, keys, values [][]byte) error {
	return each(keys, values, func(key, value []byte) error { return s.Write(ctx, key, value) })
}
