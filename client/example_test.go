package client_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/node"
	"github.com/kvasirdb/kvasir/internal/orchestrator"
	"github.com/kvasirdb/kvasir/internal/sim/loopback"
)

// endpoints stands for the addresses of your cluster.
var endpoints []string

func ExampleNew() {
	defer cluster()()
	c, err := client.New(context.Background(), endpoints)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	receipt, err := c.Put(ctx, []byte("greeting"), []byte("hello"))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("acknowledged by", receipt.Needed, "of", receipt.N, "replicas:", receipt.Strength)

	value, err := c.Get(ctx, []byte("greeting"))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", value.Value)
	// Output:
	// acknowledged by 1 of 1 replicas: strong
	// hello
}

func ExampleClient_Get_errors() {
	defer cluster()()
	c, err := client.New(context.Background(), endpoints)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	_, err = c.Get(context.Background(), []byte("no such key"))
	switch {
	case errors.Is(err, client.ErrNotFound):
		fmt.Println("there is no such key")
	case errors.Is(err, client.ErrUnavailable):
		fmt.Println("too few replicas answer; try again later")
	case err != nil:
		log.Fatal(err)
	}
	// Output: there is no such key
}

func ExampleClient_Scan() {
	defer cluster()()
	c, err := client.New(context.Background(), endpoints)
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	ctx := context.Background()

	results, err := c.Batch(ctx, []client.Operation{
		{Key: []byte("user/2"), Value: []byte("Sigyn")},
		{Key: []byte("user/1"), Value: []byte("Bragi")},
		{Key: []byte("other"), Value: []byte("-")},
	})
	if err != nil {
		log.Fatal(err)
	}
	for _, r := range results {
		if r.Err != nil {
			log.Fatal(r.Err)
		}
	}
	for rec, err := range c.Scan(ctx, client.Range{Prefix: []byte("user/")}) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s = %s\n", rec.Key, rec.Value)
	}
	// Output:
	// user/1 = Bragi
	// user/2 = Sigyn
}

var starting sync.Mutex

// cluster runs the smallest cluster there is, on loopback, and returns what stops it.
func cluster() (stop func()) {
	starting.Lock()
	dir, err := os.MkdirTemp("", "kvasir-example")
	if err != nil {
		log.Fatal(err)
	}
	logger := slog.New(slog.DiscardHandler)
	fatal := func(err error) { log.Fatal(err) }
	a := loopback.Addresses(nil, 7)

	oc := orchestrator.Defaults()
	oc.Name, oc.DataDir = "orch1", dir+"/orch1"
	oc.Listen, oc.AdminListen, oc.GossipListen, oc.RaftListen = a[0], a[1], a[2], a[3]
	oc.Peers = []orchestrator.Peer{{Name: "orch1", Address: a[0], AdminAddress: a[1], GossipAddress: a[2], RaftAddress: a[3]}}
	oc.Bootstrap.FoundingNodes, oc.Bootstrap.Vnodes = 1, 16
	oc.ElectionTimeout = 100 * time.Millisecond
	oc.Logger, oc.Fatal = logger, fatal
	o, err := orchestrator.Start(oc)
	if err != nil {
		log.Fatal(err)
	}

	nc := node.Defaults()
	nc.Name, nc.DataDir, nc.Orchestrators = "node1", dir+"/node1", []string{a[0]}
	nc.Listen, nc.AdminListen, nc.GossipListen = a[4], a[5], a[6]
	nc.Logger, nc.Fatal = logger, fatal
	n, err := node.Start(context.Background(), nc)
	if err != nil {
		log.Fatal(err)
	}
	endpoints = []string{a[4]}
	for c, err := client.New(context.Background(), endpoints); ; time.Sleep(20 * time.Millisecond) {
		if err != nil {
			log.Fatal(err)
		}
		if _, err := c.Get(context.Background(), []byte("x")); errors.Is(err, client.ErrNotFound) {
			c.Close()
			break
		}
	}
	return func() {
		n.Stop()
		o.Stop()
		os.RemoveAll(dir)
		starting.Unlock()
	}
}
