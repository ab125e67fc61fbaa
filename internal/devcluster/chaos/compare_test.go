package chaos

import (
	"bytes"
	"fmt"
	"log/slog"
	"maps"
	"slices"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// copies are what nodes hold of a vnode in one namespace.
type copies map[uint64]held

type held struct {
	records map[string]record.Record
	// certificate is up to where the node may have removed tombstones.
	certificate hlc.Timestamp
}

// openStore opens a data directory whose node has been stopped.
func openStore(fs vfs.FS, dir string) (*storage.Store, error) {
	s, err := storage.Open(storage.Config{
		FS: fs, Dir: dir, MemTableBytes: memTableBytes, Logger: slog.New(slog.DiscardHandler), Fatal: func(err error) { panic(err) },
	})
	if err != nil {
		return nil, err
	}
	if lost := s.LostTail(); lost != "" {
		return nil, fmt.Errorf("%s after a clean stop: the log has lost its tail: %s", dir, lost)
	}
	return s, nil
}

// readCopies reads what the endpoints of a vnode hold.
func readCopies(stores map[uint64]*storage.Store, namespace, vnode uint32, endpoints []uint64) (copies, error) {
	out := copies{}
	for _, node := range endpoints {
		if stores[node] == nil {
			return nil, fmt.Errorf("vnode %d has a replica at #%d, which is no node of this run", vnode, node)
		}
		records := map[string]record.Record{}
		var bad error
		err := stores[node].Scan(namespace, []uint32{vnode}, nil, nil, func(_ uint32, key, b []byte) bool {
			r, err := record.Decode(bytes.Clone(b))
			if err != nil {
				bad = fmt.Errorf("#%d: %q: %w", node, key, err)
				return false
			}
			records[string(key)] = r
			return true
		})
		if err == nil {
			err = bad
		}
		if err != nil {
			return nil, err
		}
		out[node] = held{records, stores[node].Collection(namespace, vnode).Certificate}
	}
	return out, nil
}

// difference is a key of which replicas hold different records.
type difference struct {
	key  string
	text string
}

// compare returns the keys of which replicas hold different records. collected counts
// tombstones that some have removed and others not yet, which is no difference where
// a certificate allows it.
func (c copies) compare() (differ []difference, collected int) {
	keys := map[string]bool{}
	for _, h := range c {
		for k := range h.records {
			keys[k] = true
		}
	}
	nodes := slices.Sorted(maps.Keys(c))
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		var first *record.Record
		var missing []uint64
		equal := true
		text := ""
		for _, n := range nodes {
			r, ok := c[n].records[key]
			if !ok {
				missing = append(missing, n)
				text += fmt.Sprintf(" #%d nothing;", n)
				continue
			}
			text += fmt.Sprintf(" #%d %s %s %.12q;", n, r.Kind, r.Version, r.Payload)
			if first == nil {
				first = &r
			} else if record.Compare(*first, r) != 0 {
				equal = false
			}
		}
		switch {
		case equal && len(missing) == 0:
		case equal && first.Kind == record.Tombstone && c.mayLack(missing, first.Version.Time):
			collected++
		default:
			differ = append(differ, difference{key, text})
		}
	}
	return differ, collected
}

// mayLack reports whether nodes may have removed a tombstone.
func (c copies) mayLack(nodes []uint64, at hlc.Timestamp) bool {
	return !slices.ContainsFunc(nodes, func(n uint64) bool { return c[n].certificate < at })
}

// compareAll compares all replicas, and judges each copy by the ledger.
func (r *run) compareAll(t *topology.Topology) error {
	stores := map[uint64]*storage.Store{}
	defer func() {
		for _, s := range stores {
			if err := s.Close(); err != nil {
				r.log.wrong("close a store: %v", err)
			}
		}
	}()
	for _, m := range append(slices.Clone(r.world.nodes), r.world.reporting) {
		n := t.Resolve(m.name)
		if n == nil {
			return fmt.Errorf("%s is not in the topology", m.name)
		}
		s, err := openStore(vfs.Default, m.dataDir())
		if err != nil {
			return err
		}
		stores[n.Incarnation] = s
	}
	records, differ, collected := 0, 0, 0
	for i := range t.Namespaces {
		ns := &t.Namespaces[i]
		for v := range t.Ring {
			var endpoints []uint64
			for _, s := range t.Ring[v].Slots[:ns.N] {
				endpoints = append(endpoints, s.Node)
			}
			for _, c := range t.Copies(uint32(v), ns.ID) {
				endpoints = append(endpoints, c.Node)
			}
			c, err := readCopies(stores, ns.ID, uint32(v), endpoints)
			if err != nil {
				return err
			}
			differences, gone := c.compare()
			collected += gone
			differ += len(differences)
			for _, d := range differences {
				r.log.wrong("replicas differ: vnode %d, %s:%s", v, d.key, d.text)
			}
			for node, h := range c {
				records += len(h.records)
				r.judgeCopy(t, node, uint32(v), h.records)
			}
		}
	}
	r.log.say("replicas: %d records on %d nodes in %d vnodes compared, %d keys differ, %d tombstones are removed on some replicas only",
		records, len(stores), len(t.Ring), differ, collected)
	return nil
}

// judgeCopy judges a replica's own copy of the load's keys.
func (r *run) judgeCopy(t *topology.Topology, node uint64, vnode uint32, held map[string]record.Record) {
	for key := range keyCount {
		name := keyName(key)
		if t.VnodeOf(name) != vnode {
			continue
		}
		rec, ok := held[string(name)]
		s := seen{found: ok && rec.Kind == record.Value, value: rec.Payload, version: client.Version{Timestamp: uint64(rec.Version.Time), Incarnation: rec.Version.Incarnation}}
		if wrong := r.ledger.judge(key, r.ledger.floor(key), s); wrong != "" {
			r.log.wrong("%s's own copy of %s: %s", t.NodeName(node), name, wrong)
		}
	}
}
