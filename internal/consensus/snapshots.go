package consensus

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"slices"

	"github.com/cockroachdb/pebble/v2"
	"github.com/hashicorp/raft"
)

// keptSnapshots is how many snapshots are kept: the newest, and the one before it
// for a store whose newest is damaged while the log still reaches back.
const keptSnapshots = 2

// maxSnapshotBytes bounds what is buffered of a snapshot that is being written.
const maxSnapshotBytes = 1 << 30

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)

	errSnapshotTooLarge = fmt.Errorf("consensus: a snapshot holds at most %d bytes", maxSnapshotBytes)
)

// sink collects a snapshot in memory and stores it when it is closed.
type sink struct {
	store *store
	id    snapshotID
	meta  snapshotMeta
	data  bytes.Buffer
	done  bool
}

// Create implements raft.SnapshotStore.
func (s *store) Create(_ raft.SnapshotVersion, index, term uint64, servers raft.Configuration, serversIndex uint64, _ raft.Transport) (raft.SnapshotSink, error) {
	return &sink{
		store: s,
		id:    snapshotID{index, term},
		meta:  snapshotMeta{servers: servers.Clone(), serversIndex: serversIndex},
	}, nil
}

// ID implements raft.SnapshotSink.
func (k *sink) ID() string { return k.id.String() }

// Write implements raft.SnapshotSink.
func (k *sink) Write(p []byte) (int, error) {
	if k.data.Len()+len(p) > maxSnapshotBytes {
		return 0, errSnapshotTooLarge
	}
	return k.data.Write(p)
}

// Cancel implements raft.SnapshotSink.
func (k *sink) Cancel() error {
	k.done = true
	k.data = bytes.Buffer{}
	return nil
}

// Close implements raft.SnapshotSink: it stores the snapshot.
func (k *sink) Close() error {
	if k.done {
		return nil
	}
	k.done = true
	<-k.store.saving
	defer func() { k.store.saving <- struct{}{} }()
	if err := k.store.save(k.id, k.meta, k.data.Bytes()); err != nil {
		return fmt.Errorf("consensus: storing snapshot %s: %w", k.id, err)
	}
	return nil
}

// save stores a snapshot, forgets the oldest ones, and replaces log entries that
// contradict it, all in one step.
//
// REQUIRES: the caller holds the token of saving.
func (s *store) save(id snapshotID, meta snapshotMeta, data []byte) error {
	ids, err := s.snapshotIDs()
	if err != nil {
		return err
	}
	if len(ids) > 0 && id.compare(ids[0]) < 0 {
		// One from the leader was installed while this one was being taken. Raft must
		// not go back to it.
		return fmt.Errorf("snapshot %s is newer", ids[0])
	}
	meta.size = uint64(len(data))
	meta.checksum = crc32.Checksum(data, castagnoli)
	b := s.db.NewBatch()
	defer b.Close()
	if err := b.Set(id.key(prefixSnapshot), encodeSnapshotMeta(meta), nil); err != nil {
		return err
	}
	stale := id.content()
	if err := b.DeleteRange(stale.lower, stale.upper, nil); err != nil {
		return err
	}
	n := uint32(0)
	for part := range slices.Chunk(data, partBytes) {
		if err := b.Set(id.part(n), part, nil); err != nil {
			return err
		}
		n++
	}
	if len(ids) == 0 || ids[0] != id {
		ids = slices.Insert(ids, 0, id)
	}
	if len(ids) > keptSnapshots {
		for _, old := range ids[keptSnapshots:] {
			if err := dropSnapshot(b, old); err != nil {
				return err
			}
		}
	}
	replaced, err := s.replaceLog(b, id)
	if err != nil {
		return err
	}
	if err := s.commit(b); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.base = id.index
	if replaced {
		s.mu.first, s.mu.last = id.index, max(s.mu.last, id.index)
	}
	return nil
}

// replaceLog discards the log up to a snapshot's last entry unless it holds that
// very entry (Ongaro and Ousterhout, "In Search of an Understandable Consensus
// Algorithm", 2014, figure 13, InstallSnapshot rules 6 and 7). The library leaves
// this to nobody: entries that were never committed would stay below the snapshot,
// to be sent to others by this server as a leader, and the one at the snapshot's
// index would make it refuse what follows for ever.
//
// A placeholder takes the last entry's place, so that what follows finds its
// predecessor's term and a suffix that contradicts it, which the library still has
// in memory, is truncated by it in the usual way. It is never applied and never
// sent: it is at the snapshot's index, and no entry is before it.
func (s *store) replaceLog(b *pebble.Batch, id snapshotID) (bool, error) {
	var entry raft.Log
	err := s.GetLog(id.index, &entry)
	if err == nil && entry.Term == id.term {
		return false, nil
	}
	if err != nil && !errors.Is(err, raft.ErrLogNotFound) {
		return false, err
	}
	gone := logSpan(0, id.index)
	if err := b.DeleteRange(gone.lower, gone.upper, nil); err != nil {
		return false, err
	}
	placeholder := raft.Log{Index: id.index, Term: id.term, Type: raft.LogNoop}
	return true, b.Set(logKey(id.index), encodeEntry(&placeholder), nil)
}

func dropSnapshot(b *pebble.Batch, id snapshotID) error {
	if err := b.Delete(id.key(prefixSnapshot), nil); err != nil {
		return err
	}
	content := id.content()
	return b.DeleteRange(content.lower, content.upper, nil)
}

// snapshotIDs lists the snapshots, the newest first.
func (s *store) snapshotIDs() ([]snapshotID, error) {
	if err := s.use(); err != nil {
		return nil, err
	}
	defer s.users.Done()
	it, err := s.iterate(prefixSpan(prefixSnapshot))
	if err != nil {
		return nil, err
	}
	var ids []snapshotID
	for ok := it.Last(); ok; ok = it.Prev() {
		id, err := parseSnapshotKey(it.Key())
		if err != nil {
			return nil, errors.Join(err, it.Close())
		}
		ids = append(ids, id)
	}
	return ids, it.Close()
}

// List implements raft.SnapshotStore.
func (s *store) List() ([]*raft.SnapshotMeta, error) {
	ids, err := s.snapshotIDs()
	if err != nil {
		return nil, fmt.Errorf("consensus: listing snapshots: %w", err)
	}
	var out []*raft.SnapshotMeta
	for _, id := range ids {
		meta, err := s.snapshotMeta(s.db, id)
		if errors.Is(err, pebble.ErrNotFound) {
			continue // It was dropped in between.
		}
		if err != nil {
			return nil, fmt.Errorf("consensus: listing snapshots: %w", err)
		}
		out = append(out, meta.raft(id))
	}
	return out, nil
}

// Open implements raft.SnapshotStore. It reads and checks the whole snapshot, so
// that a later one cannot remove it under its reader.
func (s *store) Open(name string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	ids, err := s.snapshotIDs()
	if err != nil {
		return nil, nil, fmt.Errorf("consensus: opening snapshot %s: %w", name, err)
	}
	i := slices.IndexFunc(ids, func(id snapshotID) bool { return id.String() == name })
	if i < 0 {
		return nil, nil, fmt.Errorf("consensus: there is no snapshot %s any more", name)
	}
	meta, data, err := s.readSnapshot(ids[i])
	if err != nil {
		return nil, nil, fmt.Errorf("consensus: opening snapshot %s: %w", name, err)
	}
	return meta.raft(ids[i]), io.NopCloser(bytes.NewReader(data)), nil
}

// raft returns the metadata as the library wants it.
func (m snapshotMeta) raft(id snapshotID) *raft.SnapshotMeta {
	return &raft.SnapshotMeta{
		Version:            raft.SnapshotVersionMax,
		ID:                 id.String(),
		Index:              id.index,
		Term:               id.term,
		Configuration:      m.servers,
		ConfigurationIndex: m.serversIndex,
		Size:               int64(m.size),
	}
}

// snapshotMeta reads from the database or from a view of it.
func (s *store) snapshotMeta(from pebble.Reader, id snapshotID) (snapshotMeta, error) {
	if err := s.use(); err != nil {
		return snapshotMeta{}, err
	}
	defer s.users.Done()
	value, closer, err := from.Get(id.key(prefixSnapshot))
	if err != nil {
		return snapshotMeta{}, err
	}
	meta, err := decodeSnapshotMeta(value)
	return meta, errors.Join(err, closer.Close())
}

// readSnapshot reads a snapshot as of one moment, and checks its content.
func (s *store) readSnapshot(id snapshotID) (snapshotMeta, []byte, error) {
	if err := s.use(); err != nil {
		return snapshotMeta{}, nil, err
	}
	defer s.users.Done()
	view := s.db.NewSnapshot()
	defer view.Close()
	meta, err := s.snapshotMeta(view, id)
	if err != nil {
		return snapshotMeta{}, nil, err
	}
	content := id.content()
	it, err := view.NewIter(&pebble.IterOptions{LowerBound: content.lower, UpperBound: content.upper})
	if err != nil {
		return snapshotMeta{}, nil, err
	}
	var data []byte
	for ok := it.First(); ok; ok = it.Next() {
		part, err := it.ValueAndErr()
		if err != nil {
			return snapshotMeta{}, nil, errors.Join(err, it.Close())
		}
		data = append(data, part...)
	}
	if err := it.Close(); err != nil {
		return snapshotMeta{}, nil, err
	}
	if uint64(len(data)) != meta.size || crc32.Checksum(data, castagnoli) != meta.checksum {
		return snapshotMeta{}, nil, fmt.Errorf("the content of snapshot %s is damaged", id)
	}
	return meta, data, nil
}

// recovered is what a store holds when it is opened.
type recovered struct {
	// empty is set when there is neither a snapshot nor a log entry.
	empty bool
	// snapshot is the content of the newest snapshot, restore tells that there is one.
	snapshot []byte
	restore  bool
	// servers are those that the store was made for.
	servers raft.Configuration
}

// recover reads the newest snapshot and checks that the log continues it. A
// damaged one is dropped where the log still holds all that it summed up, and is an
// error elsewhere: an older state would quietly undo what this server has agreed to.
func (s *store) recover(logger *slog.Logger) (recovered, error) {
	var r recovered
	ids, err := s.snapshotIDs()
	if err != nil {
		return r, err
	}
	first, last, err := s.logEnds()
	if err != nil {
		return r, err
	}
	var base uint64
	var damaged []snapshotID
	var damage error
	for _, id := range ids {
		meta, data, err := s.readSnapshot(id)
		if err == nil {
			base, r = id.index, recovered{snapshot: data, restore: true, servers: meta.servers}
			break
		}
		damaged = append(damaged, id)
		damage = errors.Join(damage, err)
	}
	if len(damaged) > 0 {
		if first > max(base, 1) || last < damaged[0].index {
			return r, fmt.Errorf("the newest snapshot cannot be read, and the log does not reach back to what came before: %w", damage)
		}
		logger.Warn("a damaged snapshot is dropped, the log holds what it summed up", "dir", s.dir, "error", damage)
		if err := s.dropSnapshots(damaged, base); err != nil {
			return r, err
		}
	}
	if first > max(base, 1) || last < base {
		return r, fmt.Errorf("log entries are missing: the newest snapshot ends at %d, the log has %d to %d (invariant 1)", base, first, last)
	}
	for index := base + 1; index <= last; index++ {
		var entry raft.Log
		if err := s.GetLog(index, &entry); err != nil {
			return r, err
		}
		if entry.Type == raft.LogConfiguration {
			r.servers = raft.DecodeConfiguration(entry.Data)
		}
	}
	r.empty = base == 0 && last == 0
	return r, nil
}

// dropSnapshots drops the newest snapshots; base is the index of the newest of the
// others.
func (s *store) dropSnapshots(ids []snapshotID, base uint64) error {
	b := s.db.NewBatch()
	defer b.Close()
	for _, id := range ids {
		if err := dropSnapshot(b, id); err != nil {
			return err
		}
	}
	if err := s.commit(b); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.base = base
	return nil
}
