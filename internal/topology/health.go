package topology

import (
	"fmt"
	"slices"

	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// FoundHealth is what the leader found of a node's health. It is agreed on, so that it
// outlives the leader; what requests go by is each orchestrator's own view.
type FoundHealth struct {
	Incarnation uint64
	Healthy     bool
	Reason      string
	// SinceMillis is milliseconds since 1970.
	SinceMillis int64
}

// Found returns what was last found of a node's health, if anything was.
func (s *State) Found(incarnation uint64) (FoundHealth, bool) {
	i := slices.IndexFunc(s.Health, func(h FoundHealth) bool { return h.Incarnation == incarnation })
	if i < 0 {
		return FoundHealth{}, false
	}
	return s.Health[i], true
}

// findHealth notes what the leader found.
func (d *draft) findHealth(pb *topologyv1.FindHealth, atMillis int64) error {
	for _, h := range pb.GetNodes() {
		found := foundHealthFromProto(h)
		if d.Topology.Node(found.Incarnation) == nil {
			return refuse(NotFound, "NODE_NOT_FOUND", fmt.Sprintf("there is no node #%d", found.Incarnation), "incarnation", found.Incarnation)
		}
		i := slices.IndexFunc(d.Health, func(o FoundHealth) bool { return o.Incarnation == found.Incarnation })
		if i < 0 {
			i = len(d.Health)
			d.Health = append(d.Health, FoundHealth{Incarnation: found.Incarnation, Healthy: !found.Healthy})
		}
		was := &d.Health[i]
		if was.Healthy != found.Healthy {
			was.Healthy, was.SinceMillis = found.Healthy, atMillis
		} else if was.Reason == found.Reason {
			continue
		}
		was.Reason = found.Reason
		d.noted = true
	}
	return nil
}

// Proto converts a finding to its wire form.
func (h FoundHealth) Proto() *topologyv1.FoundHealth {
	pb := &topologyv1.FoundHealth{Incarnation: h.Incarnation, State: topologyv1.NodeHealth_STATE_UNHEALTHY, Reason: h.Reason, SinceMs: uint64(h.SinceMillis)}
	if h.Healthy {
		pb.State = topologyv1.NodeHealth_STATE_HEALTHY
	}
	return pb
}

func foundHealthFromProto(pb *topologyv1.FoundHealth) FoundHealth {
	return FoundHealth{
		Incarnation: pb.GetIncarnation(), Healthy: pb.GetState() == topologyv1.NodeHealth_STATE_HEALTHY,
		Reason: pb.GetReason(), SinceMillis: int64(pb.GetSinceMs()),
	}
}
