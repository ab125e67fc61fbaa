package orchestrator

import (
	"fmt"
	"sync"
	"sync/atomic"

	"google.golang.org/protobuf/proto"

	"github.com/kvasirdb/kvasir/internal/topology"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// machine is the state machine that Raft applies commands to. What it holds is
// immutable, so readers take a pointer and go.
type machine struct {
	state  atomic.Pointer[topology.State] // nil until the cluster is founded
	recent topology.Recent
	mu     struct {
		sync.Mutex
		changed chan struct{} // closed and replaced by every new topology
	}
}

func newMachine() *machine {
	m := &machine{}
	m.mu.changed = make(chan struct{})
	return m
}

// applied is what Apply returns to the proposer.
type applied struct {
	state  *topology.State
	result topology.Result
	err    error
}

// Apply implements consensus.StateMachine.
func (m *machine) Apply(_ uint64, command []byte) any {
	var cmd topologyv1.Command
	if err := proto.Unmarshal(command, &cmd); err != nil {
		return applied{err: fmt.Errorf("command in the log does not decode: %w", err)}
	}
	next, result, err := m.state.Load().Apply(&cmd)
	if err == nil {
		m.set(next)
	}
	return applied{next, result, err}
}

// Snapshot implements consensus.StateMachine.
func (m *machine) Snapshot() ([]byte, error) {
	s := m.state.Load()
	if s == nil {
		return nil, nil
	}
	return proto.Marshal(s.Proto())
}

// Restore implements consensus.StateMachine.
func (m *machine) Restore(snapshot []byte) error {
	if len(snapshot) == 0 {
		m.set(nil)
		return nil
	}
	var pb topologyv1.ControlState
	if err := proto.Unmarshal(snapshot, &pb); err != nil {
		return fmt.Errorf("snapshot does not decode: %w", err)
	}
	s, err := topology.StateFromProto(&pb)
	if err != nil {
		return err
	}
	m.set(s)
	return nil
}

func (m *machine) set(s *topology.State) {
	m.state.Store(s)
	if s != nil {
		m.recent.Add(s.Topology)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	close(m.mu.changed)
	m.mu.changed = make(chan struct{})
}

func (m *machine) changed() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.changed
}

// topology returns the agreed topology, or nil before the cluster is founded.
func (m *machine) topology() *topology.Topology {
	if s := m.state.Load(); s != nil {
		return s.Topology
	}
	return nil
}
