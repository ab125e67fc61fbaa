package consensus

import (
	"fmt"
	"io"

	"github.com/hashicorp/raft"
)

// machine adapts a StateMachine to the library.
type machine struct{ to StateMachine }

// Apply implements raft.FSM.
func (m machine) Apply(l *raft.Log) any { return m.to.Apply(l.Index, l.Data) }

// Snapshot implements raft.FSM.
func (m machine) Snapshot() (raft.FSMSnapshot, error) {
	data, err := m.to.Snapshot()
	return image(data), err
}

// Restore implements raft.FSM.
func (m machine) Restore(from io.ReadCloser) error {
	data, err := io.ReadAll(from)
	if err != nil {
		return fmt.Errorf("consensus: reading a snapshot: %w", err)
	}
	return m.to.Restore(data)
}

// image is the content of a snapshot on its way to the store.
type image []byte

// Persist implements raft.FSMSnapshot. Closing the sink is left to the library.
func (i image) Persist(sink raft.SnapshotSink) error {
	_, err := sink.Write(i)
	return err
}

// Release implements raft.FSMSnapshot.
func (image) Release() {}
