package consensus

import (
	"errors"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// Nobody reads a pipeline's answers any more, as after one that replication does not like:
// whoever goes on sending must not wait for ever.
func TestAPipelineThatNobodyReads(t *testing.T) {
	net := newNetwork()
	open := func(at string) *transport {
		tr := &transport{raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
			Logger: hclog.NewNullLogger(), Stream: net.listen(at), MaxPool: 1, Timeout: time.Second,
		}), 50 * time.Millisecond}
		t.Cleanup(func() {
			tr.CloseStreams()
			tr.Close()
		})
		return tr
	}
	leader, follower := open("a"), open("b")
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		for {
			select {
			case rpc := <-follower.Consumer():
				rpc.Respond(&raft.AppendEntriesResponse{}, nil)
			case <-stop:
				return
			}
		}
	}()
	p, err := leader.AppendEntriesPipeline("b", "b")
	if err != nil {
		t.Fatal(err)
	}
	sent := make(chan error, 1)
	go func() {
		var err error
		for err == nil {
			_, err = p.AppendEntries(&raft.AppendEntriesRequest{}, &raft.AppendEntriesResponse{})
		}
		sent <- err
	}()
	select {
	case err := <-sent:
		if !errors.Is(err, raft.ErrPipelineShutdown) {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("sending hangs")
	}
}
