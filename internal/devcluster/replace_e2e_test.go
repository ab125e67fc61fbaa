package devcluster_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/devcluster"
)

// The data directory of a node is deleted under load and the node started again: no
// operation fails, and its own copy gets all that was acknowledged.
func TestE2EDeletedDataDirectoryIsRefilled(t *testing.T) {
	r := start(t, 3, 1)
	c := r.client()
	const callers, keys = 4, 100
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				if _, err := c.Put(ctx, fmt.Appendf(nil, "%d/%d", i, n%keys), []byte(strconv.Itoa(n))); err != nil {
					t.Errorf("put: %v", err)
				}
				cancel()
			}
		})
	}
	time.Sleep(time.Second)
	name := r.named(devcluster.RoleData)[r.rng.IntN(3)]
	r.kill(name)
	dir := filepath.Join(r.cluster.Dir(), name)
	if _, err := os.Stat(filepath.Join(dir, "FORMAT")); err != nil {
		t.Fatal(err) // the test would delete nothing
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	r.up(name)
	time.Sleep(time.Second)
	close(stop)
	wg.Wait()
	for i := range callers {
		for k := range keys {
			key := fmt.Appendf(nil, "%d/%d", i, k)
			want, err := c.Get(context.Background(), key)
			if errors.Is(err, client.ErrNotFound) {
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			r.eventually(60*time.Second, func() string {
				own, err := c.Get(context.Background(), key, client.FromReplica(name))
				if err != nil || string(own.Value) != string(want.Value) {
					return fmt.Sprintf("%s's own copy of %s is %q, %v; want %q", name, key, own.Value, err, want.Value)
				}
				return ""
			})
		}
	}
}
