package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvasirdb/kvasir/internal/antientropy"
	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// silentPeers take every call and never answer.
type silentPeers struct{ asked chan struct{} }

func (p silentPeers) Go(uint64, *replicav1.Call, time.Time, func(*replicav1.Reply, error)) error {
	signal(p.asked)
	return nil
}

func (silentPeers) Alive(uint64) bool { return true }

// A store that is damaged beyond its records is given up, however long peers take to fill
// in what bit rot took before.
func TestADamagedStoreIsGivenUpWhilePeersAreSilent(t *testing.T) {
	slots := []*topologyv1.Slot{}
	pb := &topologyv1.Topology{ClusterId: "c", Epoch: 5, Vnodes: 1, Settings: topology.DefaultSettings().Proto()}
	for id := uint64(1); id <= 3; id++ {
		slots = append(slots, &topologyv1.Slot{Node: id, Phase: topologyv1.Phase_PHASE_STABLE})
		pb.Nodes = append(pb.Nodes, &topologyv1.Node{Incarnation: id, Name: fmt.Sprint("n", id), Role: topologyv1.Role_ROLE_DATA})
	}
	pb.Ring = []*topologyv1.Vnode{{Slots: slots}}
	ns := topology.FoundingNamespace(3)
	ns.ID = 1
	pb.Namespaces = append(pb.Namespaces, ns.Proto())
	top, err := topology.FromProto(pb)
	if err != nil {
		t.Fatal(err)
	}

	disk, logger := vfs.NewMem(), slog.New(slog.DiscardHandler)
	fatal := make(chan error, 1)
	open := func() *storage.Store {
		s, err := storage.Open(storage.Config{FS: disk, Dir: "data", MemTableBytes: 128 << 10, CacheBytes: 1 << 20, Logger: logger, Fatal: func(err error) { panic(err) }})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	var writes []storage.Write
	for i := range 2000 {
		rec := record.Record{Version: record.Version{Time: 1}, Kind: record.Value, Payload: []byte(strings.Repeat("v", 50))}
		writes = append(writes, storage.Write{Namespace: 1, Key: fmt.Appendf(nil, "key%04d", i), Record: record.Encode(rec)})
	}
	c, err := s.Apply(writes, nil)
	if err == nil {
		err = c.Wait()
	}
	if err == nil {
		err = s.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	s = open()
	defer s.Close()

	n := &Node{store: s, fence: replica.NewFence(top), cfg: Config{DataDir: "data", Logger: logger, Fatal: func(err error) { fatal <- err }}}
	peers := silentPeers{make(chan struct{}, 1)}
	n.repairer = antientropy.New(antientropy.Config{
		Self: 1, Fence: n.fence, Store: s, Peers: peers, Logger: logger, Metrics: prometheus.NewRegistry(), Clock: func() hlc.Timestamp { return hlc.At(1) },
	})
	n.scrubber = newScrubber(n)
	ctx, cancel := context.WithCancel(t.Context())
	mended := make(chan struct{})
	go func() {
		defer close(mended)
		n.scrubber.mend(ctx)
	}()
	defer func() {
		cancel()
		<-mended
	}()

	scrub := func() {
		if _, err := s.Scrub(ctx, func(context.Context, int) error { return nil }, n.scrubber.check); err != nil {
			t.Error(err)
		}
	}
	for deadline := time.Now().Add(20 * time.Second); s.QuarantineCount() == 0; { // tables come and go
		if time.Now().After(deadline) {
			t.Fatalf("no flip is found in the tables %v", tablesOf(t, disk))
		}
		if name, size := largest(t, disk); size > 10<<10 {
			flipByte(t, disk, name, size/2)
		}
		scrub()
	}
	<-peers.asked                            // the vnode is being filled, which goes on for ever
	for _, name := range tablesOf(t, disk) { // those with what the node keeps about itself, too
		if info, err := disk.Stat(name); err == nil {
			flipByte(t, disk, name, info.Size()-3)
		}
	}
	scrub()
	select {
	case err := <-fatal:
		if !strings.Contains(err.Error(), "damaged beyond its records") {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Error("the node goes on")
	}
}

func tablesOf(t *testing.T, disk vfs.FS) (out []string) {
	t.Helper()
	names, err := disk.List("data")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if strings.HasSuffix(n, ".sst") {
			out = append(out, "data/"+n)
		}
	}
	return out
}

func largest(t *testing.T, disk vfs.FS) (name string, size int64) {
	t.Helper()
	for _, n := range tablesOf(t, disk) {
		if info, err := disk.Stat(n); err == nil && info.Size() > size {
			name, size = n, info.Size()
		}
	}
	return name, size
}

func flipByte(t *testing.T, disk vfs.FS, name string, at int64) {
	t.Helper()
	f, err := disk.OpenReadWrite(name, vfs.WriteCategoryUnspecified)
	if errors.Is(err, fs.ErrNotExist) {
		return // a compaction has just replaced it
	}
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}
