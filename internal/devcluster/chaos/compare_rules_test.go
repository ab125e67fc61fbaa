package chaos

import (
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/storage"
)

// Copies that nodes left on their disks are compared record by record.
func TestCompareFindsEveryDifference(t *testing.T) {
	value := func(at hlc.Timestamp, payload string) record.Record {
		return record.Record{Version: record.Version{Time: at, Incarnation: 1}, Kind: record.Value, Payload: []byte(payload)}
	}
	tombstone := func(at hlc.Timestamp) record.Record {
		return record.Record{Version: record.Version{Time: at, Incarnation: 1}, Kind: record.Tombstone}
	}
	for _, c := range []struct {
		name              string
		held              [2][]record.Record // of one key, in the order they came
		certificate       hlc.Timestamp      // of the second
		differ, collected int
	}{
		{"equal", [2][]record.Record{{value(1, "a")}, {value(1, "a")}}, 0, 0, 0},
		{"equal in the end", [2][]record.Record{{value(1, "a"), value(2, "b")}, {value(2, "b"), value(1, "a")}}, 0, 0, 0},
		{"equal tombstones", [2][]record.Record{{tombstone(3)}, {value(1, "a"), tombstone(3)}}, 0, 0, 0},
		{"one lacks it", [2][]record.Record{{value(1, "a")}, nil}, 0, 1, 0},
		{"one is behind", [2][]record.Record{{value(1, "a")}, {value(2, "a")}}, 0, 1, 0},
		{"other bytes", [2][]record.Record{{value(1, "a")}, {value(1, "b")}}, 0, 1, 0},
		{"deleted on one", [2][]record.Record{{value(1, "a")}, {tombstone(2)}}, 0, 1, 0},
		{"other tombstones", [2][]record.Record{{tombstone(1)}, {tombstone(2)}}, 0, 1, 0},
		{"one lacks a tombstone", [2][]record.Record{{tombstone(2)}, nil}, 1, 1, 0},
		{"one has removed a tombstone", [2][]record.Record{{tombstone(2)}, nil}, 2, 0, 1},
		{"one lacks a value below its certificate", [2][]record.Record{{value(1, "a")}, nil}, 2, 1, 0},
	} {
		stores := map[uint64]*storage.Store{}
		for i, records := range c.held {
			fs := vfs.NewMem()
			s, err := openStore(fs, "data")
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			stores[uint64(i+1)] = s
			for _, r := range records {
				commit, err := s.Apply([]storage.Write{{Namespace: 1, Vnode: 2, Key: []byte("k"), Record: record.Encode(r)}}, nil)
				if err != nil {
					t.Fatal(err)
				}
				if err := commit.Wait(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if c.certificate > 0 {
			if err := stores[2].Certify(1, 2, c.certificate, []uint64{1, 2}); err != nil {
				t.Fatal(err)
			}
		}
		held, err := readCopies(stores, 1, 2, []uint64{1, 2})
		if err != nil {
			t.Fatal(err)
		}
		differ, collected := held.compare()
		if len(differ) != c.differ || collected != c.collected {
			t.Errorf("%s: %d differ, %d collected: %v", c.name, len(differ), collected, differ)
		}
	}
}
