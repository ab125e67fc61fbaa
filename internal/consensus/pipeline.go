package consensus

import (
	"time"

	"github.com/hashicorp/raft"
)

// transport is the library's, with pipelines that cannot hang.
type transport struct {
	*raft.NetworkTransport
	// patience is how long a pipeline may take to take in a request: longer than it takes
	// to time out.
	patience time.Duration
}

// AppendEntriesPipeline implements raft.Transport.
func (t *transport) AppendEntriesPipeline(id raft.ServerID, target raft.ServerAddress) (raft.AppendPipeline, error) {
	p, err := t.NetworkTransport.AppendEntriesPipeline(id, target)
	if err != nil {
		return nil, err
	}
	return &pipeline{p, t.patience}, nil
}

// pipeline is the library's, which waits for ever in AppendEntries when whoever read its
// answers has ended: that one ends at the first answer that it does not like, and who sends
// learns of it only between two requests. Replication to the server would stop, and a
// shutdown never end. So a pipeline that takes nothing in any more is closed, upon which
// the library goes on without it, and opens another.
type pipeline struct {
	raft.AppendPipeline
	patience time.Duration
}

// AppendEntries implements raft.AppendPipeline.
func (p *pipeline) AppendEntries(req *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	hung := time.AfterFunc(p.patience, func() { _ = p.Close() }) // it returns no error
	defer hung.Stop()
	return p.AppendPipeline.AppendEntries(req, resp)
}
