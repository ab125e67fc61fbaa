package rpc_test

import (
	"net"
	"sync"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/internal/rpc"
	kvv1 "github.com/kvasirdb/kvasir/proto/kvasir/kv/v1"
)

// BenchmarkLink measures calls over one batching stream on loopback, beside unary
// calls of the same service.
func BenchmarkLink(b *testing.B) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	e := &echo{}
	srv := rpc.Transport{}.NewServer()
	kvv1.RegisterKVServiceServer(srv, e)
	go srv.Serve(lis)
	defer srv.Stop()
	tr := rpc.Transport{Dial: rpc.NetDialer}
	l := rpc.NewLink(rpc.LinkConfig{
		Transport: tr, Address: lis.Addr().String(), Peer: "echo",
		WallClock: func() int64 { return time.Now().UnixMilli() },
	}, rpc.KV)
	defer l.Close()
	cc, err := tr.NewConn(lis.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer cc.Close()
	unary := kvv1.NewKVServiceClient(cc)
	key := make([]byte, 100)

	each := func(b *testing.B, callers int, f func() error) {
		b.ReportAllocs()
		var wg sync.WaitGroup
		for range callers {
			wg.Go(func() {
				for range b.N / callers {
					if err := f(); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
	}
	b.Run("link/64", func(b *testing.B) {
		each(b, 64, func() error { _, err := l.Do(b.Context(), get(string(key))); return err })
	})
	b.Run("unary/64", func(b *testing.B) {
		each(b, 64, func() error { _, err := unary.Get(b.Context(), &kvv1.GetRequest{Key: key}); return err })
	})
}
