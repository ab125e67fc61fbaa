package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/kvasirdb/kvasir/internal/bench"
	"github.com/kvasirdb/kvasir/internal/sim/loopback"
)

var etcdKind = kind{
	name: "etcd",
	guarantees: guarantees{
		Write: "synced to the logs of 2 of 3 members (Raft)",
		Read:  "linearizable",
	},
	version: func(p place) (string, error) { return moduleVersion(filepath.Join(p.peers, "etcd")) },
	create:  func(p place) system { return &etcd{place: p} },
}

// etcd is three members with default settings, but for two things: the quota is higher, as a
// long run could fill the default with old revisions, and HTTP has a port of its own, which
// etcd asks for in production.
type etcd struct {
	place
	fleet
	client    *clientv3.Client
	endpoints []string
}

func (e *etcd) start(ctx context.Context) error {
	port := loopback.Base(nil, 3*replicas)
	var members []string
	url := func(i int) string { return "http://" + address(port+i) } // clients' first, then peers', then HTTP's
	for i := range replicas {
		members = append(members, fmt.Sprintf("etcd%d=%s", i+1, url(replicas+i)))
		e.endpoints = append(e.endpoints, address(port+i))
	}
	for i := range replicas {
		name := fmt.Sprintf("etcd%d", i+1)
		err := e.launch(e.dir, name, filepath.Join(e.peers, "etcd"),
			"--name", name, "--data-dir", filepath.Join(e.dir, name),
			"--listen-client-urls", url(i), "--advertise-client-urls", url(i), "--listen-client-http-urls", url(2*replicas+i),
			"--listen-peer-urls", url(replicas+i), "--initial-advertise-peer-urls", url(replicas+i),
			"--initial-cluster", strings.Join(members, ","), "--initial-cluster-token", filepath.Base(e.dir),
			"--quota-backend-bytes", fmt.Sprint(8<<30), "--log-level", "warn")
		if err != nil {
			return err
		}
	}
	var err error
	e.client, err = clientv3.New(clientv3.Config{Endpoints: e.endpoints, DialTimeout: 5 * time.Second, Logger: zap.NewNop()})
	if err != nil {
		return fmt.Errorf("client: %w", err)
	}
	return e.ready(ctx, func(ctx context.Context) error {
		for _, endpoint := range e.endpoints {
			if status, err := e.client.Status(ctx, endpoint); err != nil {
				return err
			} else if status.Leader == 0 {
				return fmt.Errorf("%s knows no leader", endpoint)
			}
		}
		_, err := e.client.Get(ctx, "user")
		return err
	})
}

func (e *etcd) stores() []bench.Store { return []bench.Store{etcdStore{e.client}} }

func (e *etcd) stop() error {
	if e.client != nil {
		e.client.Close()
	}
	return e.fleet.stop()
}

type etcdStore struct{ client *clientv3.Client }

func (s etcdStore) Read(ctx context.Context, key []byte) error {
	res, err := s.client.Get(ctx, string(key))
	if err == nil && len(res.Kvs) == 0 {
		return bench.ErrNotFound
	}
	return err
}

func (s etcdStore) Write(ctx context.Context, key, value []byte) error {
	_, err := s.client.Put(ctx, string(key), string(value))
	return err
}

func (s etcdStore) Scan(ctx context.Context, start []byte, limit int) error {
	_, err := s.client.Get(ctx, string(start), clientv3.WithFromKey(), clientv3.WithLimit(int64(limit)))
	return err
}

func (s etcdStore) Load(ctx context.Context, keys, values [][]byte) error {
	const most = 100 // a transaction has 128 at most
	for len(keys) > 0 {
		var ops []clientv3.Op
		n := min(most, len(keys))
		for i := range n {
			ops = append(ops, clientv3.OpPut(string(keys[i]), string(values[i])))
		}
		if _, err := s.client.Txn(ctx).Then(ops...).Commit(); err != nil {
			return err
		}
		keys, values = keys[n:], values[n:]
	}
	return nil
}
