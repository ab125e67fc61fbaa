package topology

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/kvasirdb/kvasir/internal/mutant"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// ProvisionKind is what a provisioner is asked for.
type ProvisionKind uint8

// The kinds of provisions. Their numbers are those of the wire format.
const (
	// Launch: a node is to be launched and to register.
	Launch ProvisionKind = iota + 1
	// End: a node's process is to end, and its disk to be given back.
	End
)

// String names a kind.
func (k ProvisionKind) String() string {
	switch k {
	case Launch:
		return "launch"
	case End:
		return "end"
	}
	return fmt.Sprintf("provision(%d)", uint8(k))
}

// ProvisionState is how far a provision has come.
type ProvisionState uint8

// The states of a provision. Their numbers are those of the wire format.
const (
	// Wanted: the provisioner is asked, again and again.
	Wanted ProvisionState = iota + 1
	// Launched: the provisioner says so; the node has not registered yet.
	Launched
	// Provided: the node has registered, or has ended.
	Provided
	// Failed: the node did not register in time.
	Failed
)

// String names a state.
func (s ProvisionState) String() string {
	switch s {
	case Wanted:
		return "wanted"
	case Launched:
		return "launched"
	case Provided:
		return "done"
	case Failed:
		return "failed"
	}
	return fmt.Sprintf("provision-state(%d)", uint8(s))
}

// Ended reports whether nothing will change any more.
func (s ProvisionState) Ended() bool { return s == Provided || s == Failed }

// Provision is a node that is to be launched or ended by a provisioner. It is agreed on
// before the provisioner is asked, so that the next leader goes on with it, under the
// same name.
type Provision struct {
	ID    uint64
	Kind  ProvisionKind
	State ProvisionState
	// Node is the node's name: that of a launched one is never given again.
	Node, Zone string
	// Incarnation is that which registered, or that is to end; 0: none.
	Incarnation uint64
	// Replaces is the incarnation whose place a launched node is to take; 0: nobody's.
	Replaces uint64
	// Why is what it is for, in words.
	Why string
	// AtMillis and ChangedMillis are milliseconds since 1970: when it was asked for, and
	// when its state changed last.
	AtMillis, ChangedMillis int64
	// Failures is how often the provisioner failed, Problem what it said last.
	Failures int
	Problem  string
}

// maxProvided is how many provisions are kept that have ended, maxProblemBytes how much of
// what a provisioner says.
const (
	maxProvided     = 200
	maxProblemBytes = 500
)

// Provision returns the provision of an identifier, or nil.
func (s *State) Provision(id uint64) *Provision {
	i := slices.IndexFunc(s.Provisions, func(p Provision) bool { return p.ID == id })
	if i < 0 {
		return nil
	}
	return &s.Provisions[i]
}

// askProvision adds a provision. A launched node is named here, so that no name is given
// twice.
func (d *draft) askProvision(pb *topologyv1.AskProvision, atMillis int64) error {
	p := provisionFromProto(pb.GetProvision())
	switch p.Kind {
	case Launch:
		if err := CheckName("zone", p.Zone); err != nil {
			return refuse(Invalid, "BAD_NAME", err.Error(), "name", p.Zone)
		}
		d.lastNodeNumber = max(d.lastNodeNumber, d.greatestNodeNumber()) + 1
		p.Node, p.Incarnation = nodePrefix+strconv.FormatUint(d.lastNodeNumber, 10), 0
	case End:
		if slices.ContainsFunc(d.Provisions, func(o Provision) bool { return o.Kind == End && o.Node == p.Node && o.Incarnation == p.Incarnation }) {
			return nil
		}
		if p.Incarnation != 0 && d.Topology.Names(p.Incarnation) && !mutant.On("end-before-whole") {
			return refuse(Precondition, "NODE_HAS_SLOTS", fmt.Sprintf("node %s, #%d, has slots: they must go elsewhere first", p.Node, p.Incarnation), "incarnation", p.Incarnation)
		}
	default:
		return refuse(Invalid, "BAD_PROVISION", fmt.Sprintf("a provision is a launch or an end, not %s", p.Kind))
	}
	d.nextProvision++
	p.ID, p.State, p.AtMillis, p.ChangedMillis, p.Failures, p.Problem = d.nextProvision, Wanted, atMillis, atMillis, 0, ""
	d.Provisions = append(d.Provisions, p)
	d.result.Provision = &d.Provisions[len(d.Provisions)-1]
	d.noted = true
	d.forgetProvided()
	return nil
}

// nodePrefix begins the names of launched nodes.
const nodePrefix = "node"

// greatestNodeNumber returns the greatest number of a node that is named with one.
func (d *draft) greatestNodeNumber() (most uint64) {
	for _, n := range d.Topology.Nodes {
		if digits, ok := strings.CutPrefix(n.Name, nodePrefix); ok {
			if k, err := strconv.ParseUint(digits, 10, 32); err == nil {
				most = max(most, k)
			}
		}
	}
	return most
}

// steerProvision notes what has come of a provision. What has ended stays as it is.
func (d *draft) steerProvision(pb *topologyv1.SteerProvision, atMillis int64) error {
	p := d.Provision(pb.GetId())
	if p == nil {
		return refuse(NotFound, "PROVISION_NOT_FOUND", fmt.Sprintf("there is no provision %d", pb.GetId()), "provision", pb.GetId())
	}
	d.result.Provision = p
	next := ProvisionState(pb.GetState())
	if p.State.Ended() || next < p.State || next == Launched && p.Kind != Launch || next > Failed {
		return refuse(Conflict, "PROVISION_STATE", fmt.Sprintf("provision %d is %s and cannot become %s", p.ID, p.State, next), "provision", p.ID)
	}
	if p.State != next {
		p.State, p.ChangedMillis = next, atMillis
	}
	if p.Kind == Launch {
		p.Incarnation = pb.GetIncarnation()
	}
	p.Failures, p.Problem = int(pb.GetFailures()), pb.GetProblem()[:min(len(pb.GetProblem()), maxProblemBytes)]
	d.noted = true
	d.forgetProvided()
	return nil
}

// forgetProvided forgets the oldest provisions that have ended where there are too many.
func (d *draft) forgetProvided() {
	ended := 0
	for _, p := range d.Provisions {
		if p.State.Ended() {
			ended++
		}
	}
	keep := d.result.Provision.ID
	d.Provisions = slices.DeleteFunc(d.Provisions, func(p Provision) bool {
		if ended <= maxProvided || !p.State.Ended() || p.ID == keep {
			return false
		}
		ended--
		return true
	})
	d.result.Provision = d.Provision(keep)
}

// noteScaling notes that more nodes were decided on, or fewer.
func (d *draft) noteScaling(up bool, atMillis int64) {
	if up {
		d.ScaledUpMillis = atMillis
	} else {
		d.ScaledDownMillis = atMillis
	}
	d.noted = true
}

// Proto converts a provision to its wire form.
func (p Provision) Proto() *topologyv1.Provision {
	return &topologyv1.Provision{
		Id: p.ID, Kind: topologyv1.Provision_Kind(p.Kind), State: topologyv1.Provision_State(p.State), Node: p.Node, Zone: p.Zone,
		Incarnation: p.Incarnation, Replaces: p.Replaces, Why: p.Why, AtMs: uint64(p.AtMillis), ChangedMs: uint64(p.ChangedMillis),
		Failures: uint32(p.Failures), Problem: p.Problem,
	}
}

func provisionFromProto(pb *topologyv1.Provision) Provision {
	return Provision{
		ID: pb.GetId(), Kind: ProvisionKind(pb.GetKind()), State: ProvisionState(pb.GetState()), Node: pb.GetNode(), Zone: pb.GetZone(),
		Incarnation: pb.GetIncarnation(), Replaces: pb.GetReplaces(), Why: pb.GetWhy(), AtMillis: int64(pb.GetAtMs()), ChangedMillis: int64(pb.GetChangedMs()),
		Failures: int(pb.GetFailures()), Problem: pb.GetProblem(),
	}
}
