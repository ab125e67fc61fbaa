package consensus

import (
	"encoding/hex"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// The bytes on disk do not change by accident.
func TestFormatIsFrozen(t *testing.T) {
	log := raft.Log{Term: 300, Type: raft.LogConfiguration, Data: []byte("data"), Extensions: []byte("ext"), AppendedAt: time.Unix(1, 5)}
	meta := snapshotMeta{
		servers:      raft.Configuration{Servers: []raft.Server{{ID: "a", Address: "h:1"}, {Suffrage: raft.Nonvoter, ID: "b", Address: "h:2"}}},
		serversIndex: 1, size: 5, checksum: 0x01020304,
	}
	id := snapshotID{index: 258, term: 3}
	for _, tc := range []struct {
		name, want string
		got        []byte
	}{
		{"entry", "0105ac028aa8d6b90704" + "64617461" + "657874", encodeEntry(&log)},
		{"empty entry", "0101020000", encodeEntry(&raft.Log{Index: 9, Term: 2, Type: raft.LogNoop})},
		{"snapshot", "0105010203040102" + "00016103683a31" + "01016203683a32", encodeSnapshotMeta(meta)},
		{"log key", "6c0000000000000102", logKey(258)},
		{"stable key", "7361", stableKey([]byte("a"))},
		{"snapshot key", "6d00000000000001020000000000000003", id.key(prefixSnapshot)},
		{"content key", "630000000000000102000000000000000300000007", id.part(7)},
	} {
		if got := hex.EncodeToString(tc.got); got != tc.want {
			t.Errorf("%s is %s, want %s", tc.name, got, tc.want)
		}
	}
	if got, err := decodeEntry(encodeEntry(&log)); err != nil || !sameEntry(got, log) {
		t.Errorf("entry: %+v, %v", got, err)
	}
	if got, err := decodeSnapshotMeta(encodeSnapshotMeta(meta)); err != nil || !reflect.DeepEqual(got, meta) {
		t.Errorf("snapshot: %+v, %v", got, err)
	}
	if got, err := parseSnapshotKey(id.key(prefixSnapshot)); err != nil || got != id {
		t.Errorf("snapshot key: %v, %v", got, err)
	}
}

func TestDecodersRefuse(t *testing.T) {
	for _, b := range []string{"", "\x01", "\x01\x00", "\x01\x00\x01\x00\x05abc", "\x01\x00\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"} {
		if _, err := decodeEntry([]byte(b)); !errors.Is(err, errMalformed) {
			t.Errorf("entry %q: %v", b, err)
		}
	}
	if _, err := decodeEntry([]byte{2, 0, 0, 0, 0}); err == nil || !strings.Contains(err.Error(), "version 2") {
		t.Errorf("entry of a later version: %v", err)
	}
	for _, b := range []string{"", "\x01\x05\x01\x02", "\x01\x00\x00\x00\x00\x00\x00\xff\xff\xff\xff\x0f", "\x01\x00\x00\x00\x00\x00\x00\x00x"} {
		if _, err := decodeSnapshotMeta([]byte(b)); !errors.Is(err, errMalformed) {
			t.Errorf("snapshot %q: %v", b, err)
		}
	}
	if _, err := decodeSnapshotMeta([]byte{9}); err == nil || !strings.Contains(err.Error(), "version 9") {
		t.Errorf("snapshot of a later version: %v", err)
	}
	if _, err := parseSnapshotKey([]byte("m123")); !errors.Is(err, errMalformed) {
		t.Errorf("snapshot key: %v", err)
	}
}

func FuzzDecodeEntry(f *testing.F) {
	f.Add(encodeEntry(entry(1, 2, "data")))
	f.Add(encodeEntry(&raft.Log{}))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := decodeEntry(b)
		if err != nil {
			return
		}
		again, err := decodeEntry(encodeEntry(&got))
		if err != nil || !sameEntry(got, again) {
			t.Fatalf("%+v became %+v, %v", got, again, err)
		}
	})
}

func FuzzDecodeSnapshotMeta(f *testing.F) {
	f.Add(encodeSnapshotMeta(snapshotMeta{servers: raft.Configuration{Servers: []raft.Server{{ID: "a", Address: "h:1"}}}, serversIndex: 1, size: 5, checksum: 7}))
	f.Add(encodeSnapshotMeta(snapshotMeta{}))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := decodeSnapshotMeta(b)
		if err != nil {
			return
		}
		again, err := decodeSnapshotMeta(encodeSnapshotMeta(got))
		if err != nil || !reflect.DeepEqual(got, again) {
			t.Fatalf("%+v became %+v, %v", got, again, err)
		}
	})
}

func FuzzParseSnapshotKey(f *testing.F) {
	f.Add(snapshotID{1, 2}.key(prefixSnapshot))
	f.Fuzz(func(t *testing.T, b []byte) {
		id, err := parseSnapshotKey(b)
		if err == nil && string(id.key(b[0])) != string(b) {
			t.Fatalf("%x became %v", b, id)
		}
	})
}
