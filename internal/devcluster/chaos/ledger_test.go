package chaos

import (
	"fmt"
	"strconv"
	"strings"
	"sync"

	"github.com/kvasirdb/kvasir/client"
)

// outcome is what is known of a write.
type outcome uint8

const (
	pending outcome = iota // under way
	maybe                  // failed, and may have been written or not
	refused                // failed for certain: nothing was written
	acked
)

// write is one put or delete.
type write struct {
	key     int
	del     bool
	outcome outcome
}

// ledger holds what was written and read, to judge what is read later.
//
// A client's put may be tried again and then be written twice, with two versions, of
// which the receipt names the last. So a value may turn up with a version that no
// receipt has, but only one that was put under that key, by a put that was not
// refused.
type ledger struct {
	writers []writer
	keys    []keyState
}

type writer struct {
	mu     sync.Mutex
	writes []write
}

type keyState struct {
	mu sync.Mutex
	// acked is the greatest version acknowledged, of write ackedBy; see mark.
	acked   client.Version
	ackedBy mark
	// floor is the greatest version acknowledged or read.
	floor client.Version
	// openDeletes are deletes that may have happened at any version.
	openDeletes int
}

// mark names a write: the one numbered seq of a writer. It is the value that is
// written.
type mark struct{ writer, seq int }

func (m mark) String() string { return fmt.Sprintf("%d.%d", m.writer, m.seq) }

// value returns what a put writes: the mark, padded to a length.
func (m mark) value(length int) []byte {
	s := m.String() + " "
	return []byte(s + strings.Repeat("x", max(0, length-len(s))))
}

func parseMark(value []byte) (mark, bool) {
	s, _, _ := strings.Cut(string(value), " ")
	w, n, ok := strings.Cut(s, ".")
	writer, err1 := strconv.Atoi(w)
	seq, err2 := strconv.Atoi(n)
	return mark{writer, seq}, ok && err1 == nil && err2 == nil
}

func newLedger(writers, keys int) *ledger {
	return &ledger{writers: make([]writer, writers), keys: make([]keyState, keys)}
}

const keyPrefix = "key-"

func keyName(i int) []byte { return fmt.Appendf(nil, keyPrefix+"%05d", i) }

// begin notes a write that is about to be made.
func (l *ledger) begin(by, key int, del bool) mark {
	if del {
		k := &l.keys[key]
		k.mu.Lock()
		k.openDeletes++
		k.mu.Unlock()
	}
	w := &l.writers[by]
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writes = append(w.writes, write{key: key, del: del})
	return mark{by, len(w.writes) - 1}
}

// end notes what became of a write. version is that of an acknowledged one.
func (l *ledger) end(m mark, o outcome, version client.Version) {
	w := &l.writers[m.writer]
	w.mu.Lock()
	w.writes[m.seq].outcome = o
	wr := w.writes[m.seq]
	w.mu.Unlock()
	k := &l.keys[wr.key]
	k.mu.Lock()
	defer k.mu.Unlock()
	if wr.del && o == refused {
		k.openDeletes--
	}
	if o != acked {
		return
	}
	// An acknowledged delete may have been made a second time, later: it stays open.
	if version.Compare(k.acked) > 0 {
		k.acked, k.ackedBy = version, m
	}
	if version.Compare(k.floor) > 0 {
		k.floor = version
	}
}

// floor returns the version that a read of a key which begins now must reach.
func (l *ledger) floor(key int) client.Version {
	k := &l.keys[key]
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.floor
}

// acknowledged returns the greatest version of a key that was acknowledged.
func (l *ledger) acknowledged(key int) client.Version {
	k := &l.keys[key]
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.acked
}

// seen is what a read of a key returned.
type seen struct {
	found   bool
	value   []byte
	version client.Version // zero where there is not even a tombstone
}

// read judges what a quorum read returned that began when the floor was as given,
// and raises the floor. It returns what is wrong, or "".
func (l *ledger) read(key int, floor client.Version, s seen) string {
	wrong := l.judge(key, floor, s)
	k := &l.keys[key]
	k.mu.Lock()
	defer k.mu.Unlock()
	if wrong == "" && s.version.Compare(k.floor) > 0 {
		k.floor = s.version
	}
	return wrong
}

// judge tells what is wrong with what was found of a key, where at least the floor
// had to be.
func (l *ledger) judge(key int, floor client.Version, s seen) string {
	k := &l.keys[key]
	k.mu.Lock()
	acked, ackedBy, openDeletes := k.acked, k.ackedBy, k.openDeletes
	k.mu.Unlock()
	if !s.found && s.version.IsZero() {
		// A tombstone that all replicas hold may be gone. Then one was there.
		if floor.IsZero() || openDeletes > 0 {
			return ""
		}
		return fmt.Sprintf("nothing was found, at least %s was written and never deleted", floor)
	}
	if s.version.Compare(floor) < 0 {
		return fmt.Sprintf("found %s, at least %s was acknowledged or read before", s.version, floor)
	}
	if !s.found {
		if openDeletes == 0 {
			return fmt.Sprintf("found a tombstone %s, and nobody deleted the key", s.version)
		}
		if s.version == acked && !l.at(ackedBy).del {
			return fmt.Sprintf("found a tombstone %s, which is the version of put %s", s.version, ackedBy)
		}
		return ""
	}
	m, ok := parseMark(s.value)
	if !ok || m.writer < 0 || m.writer >= len(l.writers) || !l.has(m) {
		return fmt.Sprintf("found a value %.20q that nobody wrote", s.value)
	}
	wr := l.at(m)
	switch {
	case wr.key != key || wr.del:
		return fmt.Sprintf("found the value of write %s, which is no put of this key", m)
	case wr.outcome == refused:
		return fmt.Sprintf("found the value of put %s, which was refused", m)
	case s.version == acked && m != ackedBy:
		return fmt.Sprintf("found the value of put %s under %s, which is the version of write %s", m, s.version, ackedBy)
	}
	return ""
}

func (l *ledger) has(m mark) bool {
	w := &l.writers[m.writer]
	w.mu.Lock()
	defer w.mu.Unlock()
	return m.seq >= 0 && m.seq < len(w.writes)
}

func (l *ledger) at(m mark) write {
	w := &l.writers[m.writer]
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.writes[m.seq]
}

// totals counts the writes by what became of them.
func (l *ledger) totals() (out [acked + 1]int) {
	for i := range l.writers {
		w := &l.writers[i]
		w.mu.Lock()
		for _, wr := range w.writes {
			out[wr.outcome]++
		}
		w.mu.Unlock()
	}
	return out
}
