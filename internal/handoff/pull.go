package handoff

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/kvasirdb/kvasir/internal/hlc"
	"github.com/kvasirdb/kvasir/internal/record"
	"github.com/kvasirdb/kvasir/internal/replica"
	"github.com/kvasirdb/kvasir/internal/storage"
	"github.com/kvasirdb/kvasir/internal/topology"
	replicav1 "github.com/kvasirdb/kvasir/proto/kvasir/replica/v1"
)

const (
	// Limits of one page that is pulled.
	pageRecords = 10_000
	pageBytes   = 2 << 20
	// fileBytes is how large a sorted file gets.
	fileBytes = 16 << 20
)

// stream pulls all that one source holds of a vnode's records of a namespace, as sorted
// files: pages are written to a file as they come, the next one on its way meanwhile,
// and each file is taken in whole. How far it has come is noted with every file, so
// that after the end of either side no more than one is sent again.
type stream struct {
	*Filler
	topology  *topology.Topology
	job       job
	namespace *topology.Namespace
	source    uint64
	// small gathers the first records, until a file is worth while.
	small      []*replicav1.Entry
	smallBytes int64
	file       *storage.Ingest
	newest     hlc.Timestamp
	last       []byte // key of the last record that was added
}

func (s *stream) place() storage.Place {
	return storage.Place{Namespace: s.namespace.ID, Vnode: s.job.Vnode}
}

// run returns when all is here.
func (s *stream) run(ctx context.Context) (err error) {
	defer func() {
		if s.file != nil {
			s.file.Abort()
		}
	}()
	from, done := s.cfg.Assignments.pulled(s.job.assignment, s.namespace.ID, s.source)
	if done {
		return nil
	}
	page, err := s.ask(from)
	for {
		if err != nil {
			return err
		}
		res, err := s.receive(ctx, page)
		if err != nil {
			return err
		}
		entries := res.GetEntries()
		if res.GetTruncated() {
			if len(entries) == 0 {
				return errors.New("a page that ends early has no records")
			}
			page, err = s.ask(after(entries[len(entries)-1].GetKey()))
		}
		if aerr := s.add(ctx, entries); aerr != nil {
			return aerr
		}
		if !res.GetTruncated() {
			return s.finish(ctx, true)
		}
		if err == nil && s.file != nil && s.file.SizeBytes() >= fileBytes {
			err = s.finish(ctx, false)
		}
		if err != nil {
			return err
		}
	}
}

func after(key []byte) []byte { return append(bytes.Clone(key), 0) }

// ask sends for a page without waiting for it.
func (s *stream) ask(start []byte) (chan answer, error) {
	return s.send(s.source, &replicav1.Call{Epoch: s.topology.Epoch, Operation: &replicav1.Call_Scan{Scan: &replicav1.Scan{
		Namespace: s.namespace.ID, FullVnodes: []uint32{s.job.Vnode}, Start: start, Limit: pageRecords, LimitBytes: pageBytes, Checksum: true,
	}}})
}

func (s *stream) receive(ctx context.Context, page chan answer) (*replicav1.ScanResult, error) {
	reply, err := wait(ctx, page)
	if err != nil {
		return nil, err
	}
	res := reply.GetScan()
	if sum := replica.Checksum(res.GetEntries()); sum != res.GetChecksum() {
		return nil, fmt.Errorf("a page has checksum %08x and arrived with %08x", res.GetChecksum(), sum)
	}
	return res, nil
}

// add takes in the records of a page, at the pace that is allowed.
func (s *stream) add(ctx context.Context, entries []*replicav1.Entry) error {
	size := int64(0)
	for _, e := range entries {
		rec, err := record.Decode(e.GetRecord())
		if err != nil {
			return fmt.Errorf("record of key %q: %w", e.GetKey(), err)
		}
		if s.topology.VnodeOf(e.GetKey()) != s.job.Vnode || bytes.Compare(e.GetKey(), s.last) <= 0 && s.last != nil {
			return fmt.Errorf("key %q is out of place", e.GetKey())
		}
		s.last, s.newest = e.GetKey(), max(s.newest, rec.Version.Time)
		size += int64(len(e.GetKey()) + len(e.GetRecord()))
	}
	if err := s.pace(ctx, int(size)); err != nil {
		return localError{err}
	}
	s.count(s.job, len(entries), int(size))
	if s.file == nil {
		s.small, s.smallBytes = append(s.small, entries...), s.smallBytes+size
		if s.smallBytes < int64(s.cfg.LeastFileBytes) {
			return nil
		}
		var err error
		if s.file, err = s.cfg.Store.NewIngest(s.place()); err != nil {
			return localError{err}
		}
		entries, s.small, s.smallBytes = s.small, nil, 0
	}
	for _, e := range entries {
		if err := s.file.Add(e.GetKey(), e.GetRecord()); err != nil {
			return localError{err}
		}
	}
	return nil
}

// finish takes in what has come, and notes how far that is.
func (s *stream) finish(ctx context.Context, all bool) error {
	if len(s.small) > 0 {
		if err := s.apply(ctx, s.topology, s.job, s.namespace, s.small); err != nil {
			return err
		}
	}
	// A coordinator that restarts must not issue a version below one that it stores.
	if err := s.cfg.Join(s.newest); err != nil {
		return localError{err}
	}
	file := s.file
	s.file, s.small = nil, nil
	err := s.cfg.Assignments.take(s.job.assignment, s.namespace.ID, s.source, after(s.last), all, func() error {
		if file == nil {
			return nil
		}
		return file.Finish(ctx)
	}, func() {
		if file != nil {
			file.Abort()
		}
	})
	if err != nil {
		return localError{err}
	}
	return nil
}

// pace waits until so many bytes may be taken in: at the rate that is set, less as the
// node has more to do, and not at all while its disk is full.
func (f *Filler) pace(ctx context.Context, size int) error {
	for f.cfg.Store.RefusesRecords() != "" {
		pause(ctx, time.Second)
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return f.pacer.wait(ctx, int(float64(size)/max(0.1, 1-f.cfg.Load())))
}
