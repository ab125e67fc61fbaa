package cli

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/cli/rows"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// Bounds of an import. What is read and not yet stored is at most importBytes; a
// row that is larger on its own is counted as that much.
const (
	importLanes = 8
	importBytes = 64 << 20
	batchRows   = 500
	batchBytes  = 1 << 20
	// rowOverhead is what a row costs in memory beyond its bytes, about.
	rowOverhead = 128
)

// importer stores rows. One goroutine reads them; each key belongs to one of several
// lanes, which stores its rows in the order of the file, one batch after the other.
// So rows with the same key are stored in order while several batches are in flight.
type importer struct {
	client   *client.Client
	options  []client.CallOption
	timeout  time.Duration
	layout   rows.Layout
	maxValue int
	maxBatch int
	progress *progress
	// refusal formats the report of a refused row.
	refusal func(line int, why error) string

	room                        *semaphore.Weighted
	seed                        maphash.Seed
	stored, duplicates, refused atomic.Int64
}

// item is a row on its way.
type item struct {
	key, value []byte
	hash       uint64
	line       int
	cost       int64
}

// run stores all rows, until the first failure that is not one row's.
func (im *importer) run(ctx context.Context, reader *rows.Reader) error {
	im.room = semaphore.NewWeighted(importBytes)
	im.seed = maphash.MakeSeed()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	lanes := make([]chan item, importLanes)
	var storing sync.WaitGroup
	for i := range lanes {
		lanes[i] = make(chan item, batchRows)
		l := &lane{im: im, in: lanes[i], keys: map[uint64]struct{}{}}
		storing.Go(func() {
			if err := l.run(ctx); err != nil {
				fail(err)
			}
		})
	}
	// A read of a terminal or a pipe cannot be interrupted: when ctx ends, the reading
	// goroutine is left behind and ends with the process.
	read := make(chan error, 1)
	go func() {
		err := im.read(ctx, reader, lanes)
		for _, l := range lanes {
			close(l)
		}
		read <- err
	}()
	var err error
	select {
	case err = <-read:
	case <-ctx.Done():
	}
	if err != nil {
		fail(err)
	}
	storing.Wait()
	return context.Cause(ctx)
}

// read hands rows to their lanes until the end of the input.
func (im *importer) read(ctx context.Context, reader *rows.Reader, lanes []chan item) error {
	for {
		row, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		im.progress.rows.Add(1)
		im.progress.bytes.Store(reader.BytesRead())
		it, err := im.itemOf(row)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			im.refuse(row.Line, err)
			continue
		}
		if im.room.Acquire(ctx, it.cost) != nil {
			return nil // whoever ended ctx knows why
		}
		select {
		case lanes[it.hash%importLanes] <- it:
		case <-ctx.Done():
			return nil
		}
	}
}

// itemOf splits a row, or says why it is refused.
func (im *importer) itemOf(row rows.Row) (item, error) {
	if row.Err != nil {
		return item{}, row.Err
	}
	key, value, err := im.layout.Split(row.Bytes)
	switch {
	case err != nil:
		return item{}, err
	case len(key) > topology.MaxKeyBytes:
		return item{}, fmt.Errorf("the key has %d bytes: the limit is %d", len(key), topology.MaxKeyBytes)
	case len(value) > im.maxValue:
		return item{}, fmt.Errorf("the value has %d bytes: the limit is %d", len(value), im.maxValue)
	}
	return item{
		key: key, value: value, line: row.Line, hash: maphash.Bytes(im.seed, key),
		cost: min(int64(len(key)+len(value)+rowOverhead), importBytes),
	}, nil
}

func (im *importer) refuse(line int, why error) {
	im.refused.Add(1)
	im.progress.say(im.refusal(line, why))
}

// lane stores the rows of some of the keys, in order.
type lane struct {
	im *importer
	in chan item
	// keys are the hashes of the keys that were stored, to count duplicates.
	keys map[uint64]struct{}
	// next is a row that did not fit the last batch.
	next *item
}

// run stores what comes until that ends.
func (l *lane) run(ctx context.Context) error {
	for {
		batch, cost := l.collect(ctx)
		if len(batch) == 0 {
			return nil
		}
		err := l.store(ctx, batch)
		l.im.room.Release(cost)
		if err != nil {
			return err
		}
	}
}

// collect waits for a row and takes what else is there and fits a batch. Of rows with
// the same key only the last is kept.
func (l *lane) collect(ctx context.Context) (batch []item, cost int64) {
	places := map[string]int{}
	size := 0
	for len(batch) < batchRows {
		it, ok := l.take(ctx, len(batch) == 0)
		if !ok {
			break
		}
		bytes := len(it.key) + len(it.value)
		if len(batch) > 0 && size+bytes > l.im.maxBatch {
			l.next = &it
			break
		}
		size += bytes
		cost += it.cost
		if i, twice := places[string(it.key)]; twice {
			size -= len(batch[i].key) + len(batch[i].value)
			batch[i] = it
			l.im.duplicates.Add(1)
			continue
		}
		places[string(it.key)] = len(batch)
		batch = append(batch, it)
	}
	return batch, cost
}

// take returns the next row; without wait, only if it is there already.
func (l *lane) take(ctx context.Context, wait bool) (it item, ok bool) {
	if l.next != nil {
		it, l.next = *l.next, nil
		return it, true
	}
	if wait {
		select {
		case it, ok = <-l.in:
			return it, ok && ctx.Err() == nil
		case <-ctx.Done():
			return item{}, false
		}
	}
	select {
	case it, ok = <-l.in:
		return it, ok
	default:
		return item{}, false
	}
}

// store writes a batch. Rows that can never be stored are refused one by one.
func (l *lane) store(ctx context.Context, batch []item) error {
	for len(batch) > 0 {
		ops := make([]client.Operation, len(batch))
		for i, it := range batch {
			ops[i] = client.Operation{Key: it.key, Value: it.value}
		}
		sending, cancel := context.WithTimeout(ctx, l.im.timeout)
		results, err := l.im.client.Batch(sending, ops, l.im.options...)
		cancel()
		if err == nil {
			return l.note(batch, results)
		}
		culprit, ok := culpritOf(err, len(batch))
		if !ok {
			return err
		}
		l.im.refuse(batch[culprit].line, err)
		batch = append(batch[:culprit], batch[culprit+1:]...)
	}
	return nil
}

// culpritOf returns which operation made a batch be refused, if one did.
func culpritOf(err error, operations int) (int, bool) {
	var e *client.Error
	if !errors.As(err, &e) || !errors.Is(err, client.ErrInvalidArgument) {
		return 0, false
	}
	if i, perr := strconv.Atoi(e.Details["operation"]); perr == nil && i >= 0 && i < operations {
		return i, true
	}
	return 0, operations == 1 && e.Details["field"] == "operations"
}

// note counts what became of a batch.
func (l *lane) note(batch []item, results []client.Result) error {
	for i, r := range results {
		switch {
		case errors.Is(r.Err, client.ErrInvalidArgument):
			l.im.refuse(batch[i].line, r.Err)
			continue
		case r.Err != nil:
			return fmt.Errorf("line %d: %w", batch[i].line, r.Err)
		}
		if _, twice := l.keys[batch[i].hash]; twice {
			l.im.duplicates.Add(1)
			continue
		}
		l.keys[batch[i].hash] = struct{}{}
		l.im.stored.Add(1)
	}
	return nil
}

// importSummary is what an import has done.
type importSummary struct {
	Rows          int64   `json:"rows"`
	Stored        int64   `json:"stored"`
	Duplicates    int64   `json:"duplicates"`
	Refused       int64   `json:"refused"`
	ElapsedMs     float64 `json:"elapsed_ms"`
	RowsPerSecond float64 `json:"rows_per_second"`
}

func (im *importer) summary(elapsed time.Duration) importSummary {
	n := im.progress.rows.Load()
	return importSummary{
		Rows: n, Stored: im.stored.Load(), Duplicates: im.duplicates.Load(), Refused: im.refused.Load(),
		ElapsedMs: msDoc(elapsed), RowsPerSecond: perSecond(n, elapsed),
	}
}
