package chaos

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/kvasirdb/kvasir/client"
)

// The load of a run.
const (
	callers     = 16
	keyCount    = 2000
	opDeadline  = 2 * time.Second
	deletable   = 1500                 // of the keys; the others are never deleted
	pauseOfOps  = 5 * time.Millisecond // bounds the load: the machine is shared by all
	maxValueLen = 1000
)

// load calls the cluster until its context ends.
type load struct {
	client *client.Client
	ledger *ledger
	log    *journal
}

func (l *load) run(ctx context.Context, seed uint64) {
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(1000+i)))
			for ctx.Err() == nil {
				l.one(i, rng)
				time.Sleep(time.Duration(rng.Int64N(int64(2 * pauseOfOps))))
			}
		})
	}
	wg.Wait()
}

// one makes one operation and notes it.
func (l *load) one(caller int, rng *rand.Rand) {
	key, dice := rng.IntN(keyCount), rng.IntN(100)
	ctx, cancel := context.WithTimeout(context.Background(), opDeadline)
	defer cancel()
	w := l.log.window()
	began := time.Now()
	if dice < 45 {
		floor := l.ledger.floor(key)
		s, err := get(ctx, l.client, key)
		w.note(time.Since(began), err)
		if err == nil {
			if wrong := l.ledger.read(key, floor, s); wrong != "" {
				l.log.wrong("get %s: %s", keyName(key), wrong)
			}
		}
		return
	}
	del := dice >= 90 && key < deletable
	m := l.ledger.begin(caller, key, del)
	var receipt client.Receipt
	var err error
	if del {
		receipt, err = l.client.Delete(ctx, keyName(key))
	} else {
		receipt, err = l.client.Put(ctx, keyName(key), m.value(rng.IntN(maxValueLen)))
	}
	w.note(time.Since(began), err)
	switch {
	case err == nil:
		l.ledger.end(m, acked, receipt.Version)
	case errors.Is(err, client.ErrOutcomeUnknown):
		l.ledger.end(m, maybe, client.Version{})
	default:
		l.ledger.end(m, refused, client.Version{})
	}
}

// get reads a key. That there is nothing is no error.
func get(ctx context.Context, c *client.Client, key int, opts ...client.CallOption) (seen, error) {
	v, err := c.Get(ctx, keyName(key), opts...)
	if err != nil && !errors.Is(err, client.ErrNotFound) {
		return seen{}, err
	}
	return seen{err == nil, v.Value, v.Receipt.Version}, nil
}
