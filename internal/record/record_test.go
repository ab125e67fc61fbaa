package record_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
)

// golden encodings: on disks and on the wire. A change here is a new format.
var golden = []struct {
	name string
	rec  record.Record
	hex  string
}{
	{
		"value",
		record.Record{Version: record.Version{Time: hlc.At(1767225600000) + 7, Incarnation: 3}, Kind: record.Value, Payload: []byte("hello")},
		"0101" + "019b76daa8000007" + "03" + "68656c6c6f",
	},
	{
		"empty value",
		record.Record{Version: record.Version{Time: 1, Incarnation: 1}, Kind: record.Value, Payload: []byte{}},
		"0101" + "0000000000000001" + "01",
	},
	{
		"value with expiry and a large incarnation",
		record.Record{Version: record.Version{Time: hlc.At(1767225600000), Incarnation: 1<<48 | 300}, Kind: record.Value, ExpiresAt: 1767225660000, Payload: []byte{0}},
		"0111" + "019b76daa8000000" + "ac828080808040" + "e0a4eeb6b733" + "00",
	},
	{
		"tombstone",
		record.Record{Version: record.Version{Time: hlc.Max, Incarnation: 128}, Kind: record.Tombstone},
		"0102" + "ffffffffffffffff" + "8001",
	},
}

func TestGoldenEncodings(t *testing.T) {
	for _, tc := range golden {
		t.Run(tc.name, func(t *testing.T) {
			got := record.Encode(tc.rec)
			if hex.EncodeToString(got) != tc.hex {
				t.Fatalf("encoding = %x, want %s", got, tc.hex)
			}
			back, err := record.Decode(got)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.rec, back); diff != "" {
				t.Fatalf("decoded record differs (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDecodeRefuses(t *testing.T) {
	for _, tc := range []struct {
		name, hex string
		want      error
	}{
		{"nothing", "", record.ErrCorrupt},
		{"format 0", "0001" + "0000000000000001" + "01", record.ErrCorrupt},
		{"a newer format", "0201" + "0000000000000001" + "01", record.ErrNewerFormat},
		{"a short header", "01010000000000000001", record.ErrCorrupt},
		{"an unknown kind", "0103" + "0000000000000001" + "01", record.ErrCorrupt},
		{"kind 0", "0100" + "0000000000000001" + "01", record.ErrCorrupt},
		{"an unknown flag", "0121" + "0000000000000001" + "01", record.ErrCorrupt},
		{"a padded incarnation", "0101" + "0000000000000001" + "8100", record.ErrCorrupt},
		{"a cut incarnation", "0101" + "0000000000000001" + "81", record.ErrCorrupt},
		{"a zero expiry", "0111" + "0000000000000001" + "01" + "00", record.ErrCorrupt},
		{"a missing expiry", "0111" + "0000000000000001" + "01", record.ErrCorrupt},
		{"a tombstone with a payload", "0102" + "0000000000000001" + "01" + "61", record.ErrCorrupt},
		{"a tombstone with an expiry", "0112" + "0000000000000001" + "01" + "05", record.ErrCorrupt},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b, err := hex.DecodeString(tc.hex)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := record.Decode(b); !errors.Is(err, tc.want) {
				t.Fatalf("Decode(%s) = %v, want %v", tc.hex, err, tc.want)
			}
		})
	}
}

// drawRecord draws from small sets, so that ties at every level are common.
func drawRecord(t *rapid.T, label string) record.Record {
	r := record.Record{
		Version: record.Version{
			Time:        hlc.Timestamp(rapid.Uint64Range(1, 3).Draw(t, label+".time")),
			Incarnation: rapid.Uint64Range(1, 2).Draw(t, label+".incarnation"),
		},
		Kind: record.Tombstone,
	}
	if rapid.Bool().Draw(t, label+".isValue") {
		r.Kind = record.Value
		r.ExpiresAt = rapid.Int64Range(0, 2).Draw(t, label+".expires")
		r.Payload = rapid.SliceOfN(rapid.ByteRange(0, 2), 0, 2).Draw(t, label+".payload")
	}
	return r
}

// Invariant 6.
func TestJoinLaws(t *testing.T) {
	join := func(t *rapid.T, a, b []byte) []byte {
		j, err := record.Join(a, b)
		if err != nil {
			t.Fatal(err)
		}
		return j
	}
	rapid.Check(t, func(t *rapid.T) {
		a := record.Encode(drawRecord(t, "a"))
		b := record.Encode(drawRecord(t, "b"))
		c := record.Encode(drawRecord(t, "c"))
		if !bytes.Equal(join(t, a, b), join(t, b, a)) {
			t.Fatal("join is not commutative")
		}
		if !bytes.Equal(join(t, join(t, a, b), c), join(t, a, join(t, b, c))) {
			t.Fatal("join is not associative")
		}
		if !bytes.Equal(join(t, a, a), a) {
			t.Fatal("join is not idempotent")
		}
	})
}

func TestJoinOrder(t *testing.T) {
	at := func(time hlc.Timestamp, inc uint64) record.Version {
		return record.Version{Time: time, Incarnation: inc}
	}
	// Each record loses to the next.
	ascending := []record.Record{
		{Version: at(1, 9), Kind: record.Tombstone},
		{Version: at(2, 1), Kind: record.Value, ExpiresAt: 5, Payload: []byte("z")},
		{Version: at(2, 1), Kind: record.Value, ExpiresAt: 6, Payload: []byte("a")},
		{Version: at(2, 1), Kind: record.Value, Payload: []byte("a")},
		{Version: at(2, 1), Kind: record.Value, Payload: []byte("ab")},
		{Version: at(2, 1), Kind: record.Tombstone},
		{Version: at(2, 2), Kind: record.Value, ExpiresAt: 1},
	}
	for i := range ascending {
		for j := range ascending {
			want := 0
			if i < j {
				want = -1
			} else if i > j {
				want = 1
			}
			if got := record.Compare(ascending[i], ascending[j]); got != want {
				t.Errorf("Compare(%d, %d) = %d, want %d", i, j, got, want)
			}
		}
	}
}

func TestIsLive(t *testing.T) {
	r := record.Record{Kind: record.Value, ExpiresAt: 100}
	if !r.IsLive(99) || r.IsLive(100) {
		t.Error("a value is served up to, not including, its expiry")
	}
	r.ExpiresAt = 0
	if !r.IsLive(1 << 60) {
		t.Error("a value without expiry is served for ever")
	}
	if (record.Record{Kind: record.Tombstone}).IsLive(0) {
		t.Error("a tombstone is never served")
	}
}

// Whatever decodes has one encoding.
func FuzzDecode(f *testing.F) {
	for _, g := range golden {
		b, err := hex.DecodeString(g.hex)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := record.Decode(b)
		if err != nil {
			return
		}
		if again := record.Encode(r); !bytes.Equal(again, b) {
			t.Fatalf("%x decodes and encodes to %x", b, again)
		}
	})
}
