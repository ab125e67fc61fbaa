package sim

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// copyOf is where a record lies: which vnode of which namespace.
type copyOf struct{ namespace, vnode uint32 }

// disk is all records of one node, in storage encoding, by key.
type disk map[copyOf]map[string][]byte

// readDisk reads the records of a node that has stopped.
func readDisk(fs vfs.FS, t *topology.Topology) (disk, error) {
	s, err := storage.Open(storage.Config{FS: fs, Dir: "data", CacheBytes: 1 << 20, MemTableBytes: 1 << 20, Logger: slog.New(slog.DiscardHandler), Fatal: func(error) {}})
	if err != nil {
		return nil, err
	}
	d, lacking, err := records(s, t)
	if err == nil && len(lacking) > 0 {
		err = fmt.Errorf("bit rot in %d vnodes", len(lacking))
	}
	if cerr := s.Close(); err == nil {
		err = cerr
	}
	return d, err
}

// records reads all records of the namespaces of a topology, and tells the places that
// bit rot keeps from being read in full.
func records(s *storage.Store, t *topology.Topology) (disk, map[copyOf]bool, error) {
	d, lacking := disk{}, map[copyOf]bool{}
	for v := range t.Ring {
		for _, ns := range t.Namespaces {
			at := copyOf{ns.ID, uint32(v)}
			d[at] = map[string][]byte{}
			err := s.Scan(ns.ID, []uint32{at.vnode}, nil, nil, func(_ uint32, key, rec []byte) bool {
				d[at][string(key)] = bytes.Clone(rec)
				return true
			})
			switch {
			case errors.Is(err, storage.ErrCorrupt), err == nil && s.Quarantined(storage.Place{Namespace: at.namespace, Vnode: at.vnode}):
				lacking[at] = true
			case err != nil:
				return nil, nil, err
			}
		}
	}
	return d, lacking, nil
}

// replicasEqual checks invariant 4 on the disks of all nodes, by incarnation, after
// everything has settled; that nothing lies there that nobody wrote (17), or on a node
// that is no replica (7).
func (c *Checker) replicasEqual(t *topology.Topology, disks map[uint64]disk, now time.Time) {
	for v := range t.Ring {
		for _, ns := range t.Namespaces {
			at := copyOf{ns.ID, uint32(v)}
			var nodes []uint64
			for _, s := range t.Slots(at.vnode, ns.N) {
				for _, n := range s.Write {
					if n != 0 && disks[n] != nil {
						nodes = append(nodes, n)
					}
				}
			}
			for _, c := range t.Copies(at.vnode, ns.ID) {
				if disks[c.Node] != nil {
					nodes = append(nodes, c.Node)
				}
			}
			for n, d := range disks {
				if len(d[at]) > 0 && !slices.Contains(nodes, n) {
					c.h.violate(7, "%s still holds %d records of vnode %d of namespace %s, which it has handed over", t.NodeName(n), len(d[at]), v, ns.Name)
				}
			}
			keys := map[string]bool{}
			for _, n := range nodes {
				for k := range disks[n][at] {
					keys[k] = true
				}
			}
			for _, key := range slices.Sorted(maps.Keys(keys)) {
				c.copiesEqual(t, Place{ns.Name, key}, at, nodes, disks, now)
			}
		}
	}
}

func (c *Checker) copiesEqual(t *topology.Topology, p Place, at copyOf, nodes []uint64, disks map[uint64]disk, now time.Time) {
	var first []byte
	var firstAt uint64
	for _, n := range nodes {
		if raw := disks[n][at][p.Key]; raw != nil && (first == nil || bytes.Compare(raw, first) > 0) {
			first, firstAt = raw, n
		}
	}
	rec, err := record.Decode(first)
	if err != nil {
		c.h.violate(18, "%s holds %s as %x: %v", t.NodeName(firstAt), p, first, err)
		return
	}
	c.onDisk(t.NodeName(firstAt), p, rec)
	f := floor{version: client.Version{Timestamp: uint64(rec.Version.Time), Incarnation: rec.Version.Incarnation}, tombstone: rec.Kind == record.Tombstone, expires: rec.ExpiresAt}
	for _, n := range nodes {
		raw := disks[n][at][p.Key]
		if bytes.Equal(raw, first) || raw == nil && c.collectable(f, now) {
			continue
		}
		c.h.violate(4, "%s has %s of %s, %s has %s", t.NodeName(firstAt), describeRecord(first), p, t.NodeName(n), describeRecord(raw))
	}
}

// onDisk judges a record that was found on disk.
func (c *Checker) onDisk(node string, p Place, rec record.Record) {
	if rec.Kind != record.Value {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	w := c.mu.byValue[string(rec.Payload)]
	switch {
	case w == nil || w.Place != p:
		c.h.violate(17, "%s holds %s of %s: nobody wrote that there", node, short(string(rec.Payload)), p)
	case w.Outcome == Failed:
		c.h.violate(14, "%s holds what was refused: %s", node, w)
	}
}

func describeRecord(raw []byte) string {
	if raw == nil {
		return "nothing"
	}
	rec, err := record.Decode(raw)
	if err != nil {
		return fmt.Sprintf("%x (%v)", raw, err)
	}
	return fmt.Sprintf("%s %s %q expiring at %d", rec.Kind, rec.Version, short(string(rec.Payload)), rec.ExpiresAt)
}

// describeMoves names the slots that are in transition.
func describeMoves(t *topology.Topology) string {
	out := ""
	for v := range t.Ring {
		for i, s := range t.Ring[v].Slots {
			if s.Phase != topology.Stable {
				out += fmt.Sprintf(" vnode %d slot %d: %s to %s, %s;", v, i, t.NodeName(s.Node), t.NodeName(s.Incoming), s.Phase)
			}
		}
	}
	if out == "" {
		return fmt.Sprintf("%d nodes, no moves", len(t.Nodes))
	}
	return out
}
