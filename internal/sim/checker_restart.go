package sim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// remains is what a process that ended left on its disk.
type remains struct {
	// incarnation is that of the data directory, 0 for a new one.
	incarnation uint64
	lostTail    string
	reserved    uint64
	hints       []hintLeft
	records     disk
	// lacking are the places of which records may have been lost to bit rot.
	lacking map[copyOf]bool
	// topology is the one that the process went by, nil for a new directory.
	topology *topologyv1.Topology
}

// hintLeft is a hint that a process left on its disk.
type hintLeft struct {
	target uint64
	at     copyOf
}

// whole reports whether nothing is known to be lost.
func (r *remains) whole() bool { return r.lostTail == "" && len(r.lacking) == 0 }

// readRemains reads a copy of a disk.
func readRemains(d *vfs.MemFS, t *topology.Topology) (*remains, error) {
	fs := d.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: rand.New(rand.NewPCG(1, 1))})
	s, err := storage.Open(storage.Config{FS: fs, Dir: "data", CacheBytes: 1 << 20, MemTableBytes: 1 << 20, Logger: slog.New(slog.DiscardHandler), Fatal: func(error) {}})
	if err != nil {
		return nil, err
	}
	r := &remains{lostTail: s.LostTail(), reserved: uint64(s.Reserved())}
	err = s.AllHints(func(h storage.Hint) bool {
		r.hints = append(r.hints, hintLeft{h.Target, copyOf{h.Namespace, h.Vnode}})
		return true
	})
	if err == nil {
		r.incarnation, err = incarnation(s)
	}
	if err == nil {
		r.records, r.lacking, err = records(s, t)
	}
	if err == nil {
		r.topology, err = topologyOn(s)
	}
	if cerr := s.Close(); err == nil {
		err = cerr
	}
	return r, err
}

// topologyOn reads the topology that a node keeps, nil if it has none yet.
func topologyOn(s *storage.Store) (*topologyv1.Topology, error) {
	b, err := s.Meta("topology")
	if errors.Is(err, storage.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	pb := &topologyv1.Topology{}
	return pb, proto.Unmarshal(b, pb)
}

// incarnation reads which incarnation a data directory has, 0 for none.
func incarnation(s *storage.Store) (uint64, error) {
	var identity struct {
		Incarnation uint64 `json:"incarnation"`
	}
	b, err := s.Meta("identity")
	if errors.Is(err, storage.ErrNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return identity.Incarnation, json.Unmarshal(b, &identity)
}

// Restarts checks what a node that ended has on disk before it starts again: all
// that it told others of, but for places that lack what bit rot took.
//
// It checks invariants 1 and 18 (what all replicas acknowledged and what was read in
// this one is there), 10 (the clock is reserved beyond every version it issued) and
// 15 (hints are not forgotten).
func (c *Checker) Restarts(name string, founding bool, r *remains, t *topology.Topology) {
	c.mu.Lock()
	defer c.mu.Unlock()
	incarnation := r.incarnation
	if list := c.mu.issued[incarnation]; len(list) > 0 && list[len(list)-1].version.Timestamp > r.reserved {
		c.h.violate(10, "%s issued version %s, but on its disk the clock is reserved up to %d ms only", name, list[len(list)-1].version, r.reserved>>16)
	}
	now := time.Now()
	for p, reg := range c.mu.registers {
		ns := t.Namespace(p.Namespace)
		if ns == nil {
			continue
		}
		v := t.VnodeOf([]byte(p.Key))
		if c.mu.moves[copyAt{incarnation, v}] || !t.Owns(incarnation, v, ns.N) || r.lacking[copyOf{ns.ID, v}] {
			continue
		}
		var have client.Version
		if raw := r.records[copyOf{ns.ID, v}][p.Key]; raw != nil {
			rec, err := record.Decode(raw)
			if err != nil {
				c.h.violate(18, "%s holds %s as %x: %v", name, p, raw, err)
				continue
			}
			have = client.Version{Timestamp: uint64(rec.Version.Time), Incarnation: rec.Version.Incarnation}
		}
		check := func(invariant int, f floor, why string) {
			if have.Compare(f.version) < 0 && !(have.IsZero() && c.vanished(p, f, now)) {
				c.h.violate(invariant, "%s ended with %s of %s on its disk, but it had version %s: %s %s", name, have, p, f.version, why, f.by)
			}
		}
		check(18, reg.copied[incarnation], "read by")
		if founding { // others may be on the way to what was acknowledged before them
			check(1, reg.full, "acknowledged to")
		}
	}
}

// hintsKept checks that a node that has just started remembers the hints on its disk
// for nodes that cannot have got them meanwhile.
func (r *run) hintsKept(name string, ended func(name string) bool) {
	r.mu.Lock()
	left := r.mu.left[name]
	r.mu.Unlock()
	if left == nil || len(left.hints) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	resp, err := adminv1.NewStatusServiceClient(r.conns[name]).GetNodeStatus(ctx, &adminv1.GetNodeStatusRequest{})
	if err != nil {
		return
	}
	if resp.GetStatus().GetIncarnation() != left.incarnation {
		return // it had left, and came back with another directory
	}
	have := map[uint64]uint64{}
	for _, b := range resp.GetStatus().GetHints() {
		have[b.GetTarget()] = b.GetCount()
	}
	// Those for a node that has handed the vnode over are dropped. What the node knows of
	// that the control plane knows too, when it is asked afterwards.
	s, err := clusterStatus(ctx, r.controls["orch1"])
	if err != nil || !s.GetControlPlaneAvailable() {
		return
	}
	r.topologies.see("orch1", s.GetTopology())
	t := r.topologies.latest()
	wanted := map[uint64]uint64{}
	for _, h := range left.hints {
		if ns := t.NamespaceByID(h.at.namespace); ns != nil && t.Owns(h.target, h.at.vnode, ns.N) && !r.checker.moved(h.target, h.at.vnode) {
			wanted[h.target]++
		}
	}
	for target, n := range wanted {
		node := t.Node(target)
		if node == nil || have[target] >= n {
			continue
		}
		if ended(node.Name) {
			r.history.violate(15, "%s had %d hints for %s on its disk and remembers %d after its start; %s is down", name, n, node.Name, have[target], node.Name)
		}
	}
}

func describeRemains(r *remains, err error) string {
	switch {
	case err != nil:
		return err.Error()
	case r.lostTail != "":
		return r.lostTail
	case r.incarnation == 0:
		return "a new directory"
	}
	return fmt.Sprintf("#%d, which bit rot keeps from reading %d places", r.incarnation, len(r.lacking))
}
