package gossip

import (
	"encoding/hex"
	"errors"
	"math"
	"strings"
	"testing"
)

func TestMeta(t *testing.T) {
	for _, tc := range []struct {
		meta Meta
		want string
	}{
		{Meta{}, "01000000"},
		{Meta{Incarnation: 17, Epoch: 300, State: 2}, "010211ac02"},
		{Meta{math.MaxUint64, math.MaxUint64, 255}, "01ffffffffffffffffffff01ffffffffffffffffff01"},
	} {
		b := tc.meta.encode()
		if got := hex.EncodeToString(b); got != tc.want || len(b) > 64 {
			t.Errorf("%+v is %s, want %s", tc.meta, got, tc.want)
		}
		if got, err := decodeMeta(append(b, "more"...)); err != nil || got != tc.meta {
			t.Errorf("%s is %+v, %v, want %+v", tc.want, got, err, tc.meta)
		}
	}
	for _, bad := range []string{"", "\x01", "\x01\x02", "\x01\x02\x11", "\x01\x02\x11\x80", "\x01\x02\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"} {
		if _, err := decodeMeta([]byte(bad)); !errors.Is(err, errBadMeta) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if _, err := decodeMeta([]byte{2, 0, 0, 0}); err == nil || !strings.Contains(err.Error(), "version 2") {
		t.Errorf("a later version: %v", err)
	}
}

func FuzzDecodeMeta(f *testing.F) {
	f.Add(Meta{Incarnation: 17, Epoch: 300, State: 2}.encode())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := decodeMeta(b)
		if err != nil {
			return
		}
		if again, err := decodeMeta(got.encode()); err != nil || again != got {
			t.Fatalf("%+v became %+v, %v", got, again, err)
		}
	})
}
