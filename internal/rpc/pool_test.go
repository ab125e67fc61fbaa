package rpc_test

import (
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/kvasirdb/kvasir/internal/rpc"
)

// What a function of a pool starts and waits for runs, however many wait; and after Close
// nobody is left, which the bubble checks.
func TestPool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, p := range []*rpc.Pool{rpc.NewPool(), nil} {
			var ran atomic.Int64
			var nest func(depth int)
			nest = func(depth int) {
				ran.Add(1)
				if depth == 0 {
					return
				}
				var inner sync.WaitGroup
				for range 3 {
					p.GoFor(&inner, func() { nest(depth - 1) })
				}
				inner.Wait()
			}
			for range 3 {
				ran.Store(0)
				var all sync.WaitGroup
				for range 100 {
					p.GoFor(&all, func() { nest(3) })
				}
				all.Wait()
				if want := int64(100 * (1 + 3 + 9 + 27)); ran.Load() != want {
					t.Errorf("%d functions ran, want %d", ran.Load(), want)
				}
			}
			if p != nil {
				p.Close()
			}
		}
	})
}
