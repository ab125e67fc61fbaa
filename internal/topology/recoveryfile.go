package topology

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/cespare/xxhash/v2"
	"google.golang.org/protobuf/proto"

	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// recoveryFormat is the format of a recovery file that is written, and the greatest that is
// read.
const recoveryFormat = 1

// recoveryFile is what new orchestrators are started with. All but State is for people.
type recoveryFile struct {
	Format     int    `json:"format"`
	Cluster    string `json:"cluster"`
	Recovery   string `json:"recovery"`
	Generation uint64 `json:"generation"`
	Epoch      string `json:"epoch"`
	What       string `json:"what"`
	// State is a topologyv1.ControlState, Sum its xxhash64.
	State []byte `json:"state"`
	Sum   string `json:"sum"`
}

// EncodeRecovery writes the file that orchestrators of a new generation are started with.
func EncodeRecovery(s *State) ([]byte, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(s.Proto())
	if err != nil {
		return nil, fmt.Errorf("recovery file: %w", err)
	}
	t := s.Topology
	f := recoveryFile{
		Format: recoveryFormat, Cluster: t.ClusterID, Recovery: t.Recovery, Generation: Generation(t.Epoch), Epoch: EpochString(t.Epoch),
		State: b, Sum: fmt.Sprintf("%016x", xxhash.Sum64(b)),
	}
	if len(s.History) > 0 {
		f.What = s.History[0].What
	}
	out, err := json.MarshalIndent(f, "", "  ")
	return append(out, '\n'), err
}

// DecodeRecovery reads a recovery file. The error says what is wrong with it.
func DecodeRecovery(b []byte) (*State, error) {
	var f recoveryFile
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, fmt.Errorf("this is no recovery file, which kvctl recover writes: %w", err)
	}
	if f.Format < 1 || f.Format > recoveryFormat {
		return nil, fmt.Errorf("the recovery file has format %d, this release reads up to %d", f.Format, recoveryFormat)
	}
	if f.Sum != fmt.Sprintf("%016x", xxhash.Sum64(f.State)) {
		return nil, errors.New("the recovery file is damaged: write it again with kvctl recover")
	}
	var pb topologyv1.ControlState
	if err := proto.Unmarshal(f.State, &pb); err != nil {
		return nil, fmt.Errorf("the recovery file does not decode: %w", err)
	}
	s, err := StateFromProto(&pb)
	if err != nil {
		return nil, fmt.Errorf("recovery file: %w", err)
	}
	if s.Topology.Recovery == "" || Generation(s.Topology.Epoch) == 0 {
		return nil, errors.New("the recovery file begins no generation")
	}
	return s, nil
}
