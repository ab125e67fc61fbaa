package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/kvasirdb/kvasir/internal/bench"
	"github.com/kvasirdb/kvasir/internal/sim/loopback"
)

const redisServer = "redis-server"

var redisKind = kind{
	name: "redis",
	guarantees: guarantees{
		Write: "in the memory of the primary and 1 of 2 replicas (WAIT 1); on disk about a second later (appendfsync everysec)",
		Read:  "the primary answers: the newest, unless a failover has lost it",
	},
	missing: func() error {
		if _, err := exec.LookPath(redisServer); err != nil {
			return errors.New("redis-server is not installed: apt-get install redis-server")
		}
		return nil
	},
	version: func(place) (string, error) {
		out, err := exec.Command(redisServer, "--version").Output()
		if err != nil {
			return "", fmt.Errorf("redis-server --version: %w", err)
		}
		for _, field := range strings.Fields(string(out)) {
			if v, ok := strings.CutPrefix(field, "v="); ok {
				return "v" + v, nil
			}
		}
		return "unknown", nil
	},
	create: func(p place) system { return &redisPrimary{place: p} },
}

// redisPrimary is a primary with two replicas, each with a log of its own. Snapshots are
// off, as the log has everything.
type redisPrimary struct {
	place
	fleet
	client *redis.Client
}

func (r *redisPrimary) start(ctx context.Context) error {
	port := loopback.Base(nil, replicas)
	for i := range replicas {
		name := fmt.Sprintf("redis%d", i+1)
		dir := filepath.Join(r.dir, name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
		args := []string{
			"--bind", "127.0.0.1", "--port", strconv.Itoa(port + i), "--dir", dir, "--daemonize", "no",
			"--save", "", "--appendonly", "yes", "--appendfsync", "everysec", "--repl-diskless-sync-delay", "0",
		}
		if i > 0 {
			args = append(args, "--replicaof", "127.0.0.1", strconv.Itoa(port))
		}
		if err := r.launch(r.dir, name, redisServer, args...); err != nil {
			return err
		}
	}
	r.client = redis.NewClient(&redis.Options{
		Addr: address(port), PoolSize: r.threads, ContextTimeoutEnabled: true,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}, // of a service of Redis' vendor
	})
	return r.ready(ctx, func(ctx context.Context) error {
		info, err := r.client.Info(ctx, "replication").Result()
		if err != nil {
			return err
		}
		if n := strings.Count(info, "state=online"); n != replicas-1 {
			return fmt.Errorf("%d replicas of the primary are online, want %d", n, replicas-1)
		}
		return redisStore{client: r.client}.Write(ctx, []byte("probe"), []byte("probe"))
	})
}

func (r *redisPrimary) stores() []bench.Store { return []bench.Store{redisStore{client: r.client}} }

func (r *redisPrimary) stop() error {
	if r.client != nil {
		r.client.Close()
	}
	return r.fleet.stop()
}

type redisStore struct {
	noScan
	client *redis.Client
}

func (s redisStore) Read(ctx context.Context, key []byte) error {
	_, err := s.client.Get(ctx, string(key)).Bytes()
	if errors.Is(err, redis.Nil) {
		return bench.ErrNotFound
	}
	return err
}

func (s redisStore) Write(ctx context.Context, key, value []byte) error {
	return s.Load(ctx, [][]byte{key}, [][]byte{value})
}

// Load sends the writes and the WAIT for one replica together: WAIT is about what the same
// connection has written.
func (s redisStore) Load(ctx context.Context, keys, values [][]byte) error {
	pipe := s.client.Pipeline()
	for i := range keys {
		pipe.Set(ctx, string(keys[i]), values[i], 0)
	}
	wait := pipe.Do(ctx, "wait", 1, (2 * time.Second).Milliseconds())
	if _, err := pipe.Exec(ctx); err != nil {
		return err
	}
	if n, err := wait.Int64(); err != nil || n < 1 {
		return errors.Join(err, errors.New("no replica has acknowledged within 2s"))
	}
	return nil
}
