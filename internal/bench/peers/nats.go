package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/kvasirdb/kvasir/internal/bench"
	"github.com/kvasirdb/kvasir/internal/sim/loopback"
)

var natsKind = kind{
	name: "nats",
	guarantees: guarantees{
		Write: "synced to the logs of 2 of 3 servers (Raft; sync_interval: always)",
		Read:  "any replica answers (direct get, the default of buckets): may be stale",
	},
	version: func(p place) (string, error) { return moduleVersion(filepath.Join(p.peers, "nats-server")) },
	create:  func(p place) system { return &natsKV{place: p} },
}

// natsKV is a bucket of JetStream's key-value store with three replicas. A connection leads
// to one server, so there is one to each, and threads use them in turn.
type natsKV struct {
	place
	fleet
	conns   []*nats.Conn
	buckets []bench.Store
}

const natsBucket = "bench"

// natsConfig is a server's configuration: its name, client port, directory, cluster port,
// and the routes. Without sync_interval, data would be synced every two minutes.
const natsConfig = `server_name: %s
listen: "%s"
jetstream { store_dir: %q, sync_interval: always }
cluster { name: peers, listen: "%s", routes: [%s] }
`

func (n *natsKV) start(ctx context.Context) error {
	port := loopback.Base(nil, 2*replicas)
	var routes []string
	for i := range replicas {
		routes = append(routes, fmt.Sprintf("%q", "nats://"+address(port+replicas+i)))
	}
	for i := range replicas {
		name := fmt.Sprintf("nats%d", i+1)
		path := filepath.Join(n.dir, name+".conf")
		text := fmt.Sprintf(natsConfig, name, address(port+i), filepath.Join(n.dir, name), address(port+replicas+i), strings.Join(routes, ", "))
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return err
		}
		if err := n.launch(n.dir, name, filepath.Join(n.peers, "nats-server"), "--config", path); err != nil {
			return err
		}
	}
	for i := range replicas {
		err := n.ready(ctx, func(context.Context) error {
			c, err := nats.Connect("nats://" + address(port+i))
			if err == nil {
				n.conns = append(n.conns, c)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return n.ready(ctx, n.open)
}

// open makes the bucket, and a handle of it for each connection, and checks that all
// replicas are there.
func (n *natsKV) open(ctx context.Context) error {
	var stores []bench.Store
	for i, c := range n.conns {
		js, err := jetstream.New(c)
		if err != nil {
			return err
		}
		var kv jetstream.KeyValue
		if i == 0 {
			kv, err = js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: natsBucket, Replicas: replicas, Storage: jetstream.FileStorage})
		} else {
			kv, err = js.KeyValue(ctx, natsBucket)
		}
		if err != nil {
			return err
		}
		stream, err := js.Stream(ctx, "KV_"+natsBucket)
		if err != nil {
			return err
		}
		current := 0
		if cluster := stream.CachedInfo().Cluster; cluster != nil && cluster.Leader != "" {
			current = 1
			for _, r := range cluster.Replicas {
				if r.Current && !r.Offline {
					current++
				}
			}
		}
		if current != replicas {
			return fmt.Errorf("%d of %d replicas of the bucket are current", current, replicas)
		}
		stores = append(stores, natsStore{kv: kv})
	}
	n.buckets = stores
	return nil
}

func (n *natsKV) stores() []bench.Store { return n.buckets }

func (n *natsKV) stop() error {
	for _, c := range n.conns {
		c.Close()
	}
	return n.fleet.stop()
}

type natsStore struct {
	noScan
	kv jetstream.KeyValue
}

func (s natsStore) Read(ctx context.Context, key []byte) error {
	_, err := s.kv.Get(ctx, string(key))
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return bench.ErrNotFound
	}
	return err
}

func (s natsStore) Write(ctx context.Context, key, value []byte) error {
	_, err := s.kv.Put(ctx, string(key), value)
	return err
}

func (s natsStore) Load(ctx context.Context, keys, values [][]byte) error {
	return each(keys, values, func(key, value []byte) error { return s.Write(ctx, key, value) })
}
