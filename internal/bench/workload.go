package bench

import (
	"fmt"
	"math/rand"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/pingcap/go-ycsb/pkg/generator"
)

// Kind is a kind of operation.
type Kind int

// The kinds of operations, as YCSB calls them.
const (
	Read Kind = iota
	Update
	Insert
	Scan
	// ReadModifyWrite reads a record and writes it: two operations, measured as one.
	ReadModifyWrite
	kinds
)

// String names a kind.
func (k Kind) String() string {
	return [...]string{"read", "update", "insert", "scan", "read-modify-write"}[k]
}

// Distribution is how the records of operations are chosen.
type Distribution string

// The distributions. The popular records of Zipfian lie scattered among the others; its
// constant is 0.99.
const (
	Uniform Distribution = "uniform"
	Zipfian Distribution = "zipfian"
	// Latest prefers the records that were inserted last.
	Latest Distribution = "latest"
)

// Distributions are all there are.
var Distributions = []Distribution{Uniform, Zipfian, Latest}

// Workload is what is done, and to which records.
type Workload struct {
	// Shares are those of the kinds of operations; they add up to 1.
	Shares       [kinds]float64
	Distribution Distribution
}

// maxScan is the number of records of the longest scan: lengths are uniform from 1.
const maxScan = 100

// Core returns a core workload of YCSB by its letter, a to f, as published in B. F. Cooper
// et al., "Benchmarking cloud serving systems with YCSB", SoCC 2010.
func Core(letter string) (Workload, error) {
	switch strings.ToLower(letter) {
	case "a":
		return Mix(0.5, Zipfian), nil
	case "b":
		return Mix(0.95, Zipfian), nil
	case "c":
		return Mix(1, Zipfian), nil
	case "d":
		return Workload{Shares: [kinds]float64{Read: 0.95, Insert: 0.05}, Distribution: Latest}, nil
	case "e":
		return Workload{Shares: [kinds]float64{Scan: 0.95, Insert: 0.05}, Distribution: Zipfian}, nil
	case "f":
		return Workload{Shares: [kinds]float64{Read: 0.5, ReadModifyWrite: 0.5}, Distribution: Zipfian}, nil
	}
	return Workload{}, fmt.Errorf("%q: want a letter from a to f", letter)
}

// Mix returns a workload of reads and updates.
func Mix(reads float64, d Distribution) Workload {
	return Workload{Shares: [kinds]float64{Read: reads, Update: 1 - reads}, Distribution: d}
}

// chooser draws the operations of one caller.
type chooser struct {
	w      Workload
	rng    *rand.Rand
	next   func(*rand.Rand) int64
	common *common
}

// common is what the callers of a run share.
type common struct {
	records int64
	// inserts is how many records have begun to be inserted, inserted how many at least
	// were: a reader may meet the last few before they are there, and finds nothing.
	inserts, inserted atomic.Int64
	// latest chooses among the newest; making one takes time in proportion to records.
	mu     sync.Mutex
	latest *generator.SkewedLatest
}

func newCommon(w Workload, records int64) *common {
	c := &common{records: records}
	if w.Distribution == Latest {
		c.latest = generator.NewSkewedLatest(c)
	}
	return c
}

// Next and Last make it the basis of a generator.
func (c *common) Next(*rand.Rand) int64 { return c.Last() }

// Last returns the number of the newest record.
func (c *common) Last() int64 { return c.records + c.inserted.Load() - 1 }

func newChooser(w Workload, c *common, seed int64) *chooser {
	ch := &chooser{w: w, rng: rand.New(rand.NewSource(seed)), common: c}
	// No generator is safe for concurrent use.
	switch w.Distribution {
	case Zipfian:
		ch.next = generator.NewScrambledZipfian(0, c.records-1, generator.ZipfianConstant).Next
	case Latest:
		ch.next = func(rng *rand.Rand) int64 {
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.latest.Next(rng)
		}
	default:
		ch.next = func(rng *rand.Rand) int64 { return rng.Int63n(c.records) }
	}
	return ch
}

// draw returns what to do next, with which record, and how many records a scan takes.
func (c *chooser) draw() (k Kind, record int64, limit int) {
	f := c.rng.Float64()
	for i, share := range c.w.Shares {
		if share == 0 {
			continue
		}
		if k = Kind(i); f < share {
			break
		}
		f -= share
	}
	if k == Insert {
		return k, c.common.records + c.common.inserts.Add(1) - 1, 0
	}
	record = max(0, c.next(c.rng))
	if k == Scan {
		limit = 1 + c.rng.Intn(maxScan)
	}
	return k, record, limit
}
