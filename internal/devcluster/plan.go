package devcluster

import (
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"strconv"
	"time"

	"github.com/kvasirdb/kvasir/internal/topology"
)

// Host is the address that every process listens on. Nothing of a development
// cluster is reachable from other machines.
const Host = "127.0.0.1"

// portStride is the distance between the first ports of neighbours.
const portStride = 10

// MaxNodes bounds the data nodes of a development cluster.
const MaxNodes = 100

// MaxReporting bounds the reporting nodes of a development cluster.
const MaxReporting = 9

// Roles of processes.
const (
	RoleData         = "data"
	RoleReporting    = "reporting"
	RoleOrchestrator = "orchestrator"
)

// Settings are what a cluster is created with. They never change afterwards.
type Settings struct {
	// Nodes is how many data nodes found the cluster, 1 to MaxNodes.
	Nodes int `json:"nodes"`
	// Orchestrators is 1, 3 or 5.
	Orchestrators int `json:"orchestrators"`
	// Reporting is how many reporting nodes there are, 0 to MaxReporting.
	Reporting int `json:"reporting,omitempty"`
	// Zones is over how many zones the nodes are spread, 1 to Nodes.
	Zones int `json:"zones"`
	// Port is the first port of node 1; the others follow from it.
	Port int `json:"port"`
	// Autonomy: the orchestrators launch and end nodes by themselves, and give them slots.
	Autonomy bool `json:"autonomy,omitempty"`
	// ReplaceAfter is how long a node is dead before others take its place. Default 20 s.
	ReplaceAfter time.Duration `json:"replace_after,omitempty"`
	// CPULimit is how many cores each node is taken to have; 0: see allowance.
	CPULimit float64 `json:"cpu_limit,omitempty"`
}

// DefaultZones returns the number of zones for a number of nodes.
func DefaultZones(nodes int) int { return min(nodes, 3) }

// Validate returns an error that names every flag with an impossible value.
func (s Settings) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if s.Nodes < 1 || s.Nodes > MaxNodes {
		bad("--nodes %d: want 1 to %d", s.Nodes, MaxNodes)
	}
	if s.Orchestrators != 1 && s.Orchestrators != 3 && s.Orchestrators != 5 {
		bad("--orchestrators %d: want 1, 3 or 5", s.Orchestrators)
	}
	if s.Reporting < 0 || s.Reporting > MaxReporting {
		bad("--reporting %d: want 0 to %d", s.Reporting, MaxReporting)
	}
	if s.Zones < 1 || s.Zones > max(s.Nodes, 1) {
		bad("--zones %d: want 1 to the number of nodes, %d", s.Zones, s.Nodes)
	}
	if !(s.CPULimit >= 0) || math.IsInf(s.CPULimit, 1) { // NaN is not at least 0
		bad("--cpu-limit %v: want a number of cores, such as 0.5", s.CPULimit)
	}
	lowest, highest := s.Port-portStride*(s.Orchestrators+s.Reporting), s.Port+portStride*(s.Nodes-1)+portsPerNode-1
	if len(errs) == 0 && (lowest < 1 || highest > 65535) {
		bad("--port %d: the cluster needs the ports %d to %d, and ports go from 1 to 65535", s.Port, lowest, highest)
	}
	return errors.Join(errs...)
}

// members returns the processes that a new cluster consists of, orchestrators first.
func (s Settings) members() []member {
	var out []member
	for j := 1; j <= s.Orchestrators; j++ {
		out = append(out, member{Name: fmt.Sprintf("orch%d", j), Role: RoleOrchestrator, Port: s.Port - portStride*j})
	}
	for i := 1; i <= s.Nodes; i++ {
		out = append(out, s.node(i, s.zone(i)))
	}
	for i := 1; i <= s.Reporting; i++ { // below the orchestrators: nodes that are added are above
		out = append(out, member{Name: fmt.Sprintf("report%d", i), Role: RoleReporting, Zone: s.zone(i), Port: s.Port - portStride*(s.Orchestrators+i)})
	}
	return out
}

// node returns the member that is data node i, counted from 1.
func (s Settings) node(i int, zone string) member {
	return member{Name: fmt.Sprintf("node%d", i), Role: RoleData, Zone: zone, Port: s.Port + portStride*(i-1)}
}

// zone returns the zone of node i: round robin.
func (s Settings) zone(i int) string { return fmt.Sprintf("z%d", (i-1)%s.Zones+1) }

// nextNode returns the data node with the lowest free number. An empty zone is
// chosen round robin.
func (s Settings) nextNode(members []member, zone string) (member, error) {
	i := 1
	for slices.ContainsFunc(members, func(m member) bool { return m.Name == s.node(i, "").Name }) {
		i++
	}
	if zone == "" {
		zone = s.zone(i)
	}
	if err := topology.CheckName("zone", zone); err != nil {
		return member{}, fmt.Errorf("--zone: %w", err)
	}
	m := s.node(i, zone)
	if i > MaxNodes || m.Port+portsPerNode-1 > 65535 {
		return member{}, fmt.Errorf("%s would be beyond the last possible node of this cluster: at most %d nodes, and ports up to 65535", m.Name, MaxNodes)
	}
	return m, nil
}

// A member is a process as planned: what it is called and where it listens.
type member struct {
	Name string `json:"name"`
	Role string `json:"role"`
	// Zone is empty for orchestrators.
	Zone string `json:"zone,omitempty"`
	// Port is the first of its ports.
	Port int `json:"port"`
}

// portsPerNode is how many ports in a row a data node uses.
const portsPerNode = 3

func (m member) clientAddr() string { return address(m.Port) }
func (m member) adminAddr() string  { return address(m.Port + 1) }
func (m member) gossipAddr() string { return address(m.Port + 2) }

// raftAddr is meaningful for orchestrators only.
func (m member) raftAddr() string { return address(m.Port + 3) }

// listeners returns every port the process listens on.
func (m member) listeners() []listener {
	out := []listener{
		{m.Name, "gRPC", "tcp", m.Port},
		{m.Name, "admin HTTP", "tcp", m.Port + 1},
		{m.Name, "gossip", "tcp", m.Port + 2},
		{m.Name, "gossip", "udp", m.Port + 2},
	}
	if m.Role == RoleOrchestrator {
		out = append(out, listener{m.Name, "Raft", "tcp", m.Port + 3})
	}
	return out
}

// binary returns the name of the executable.
func (m member) binary() string {
	if m.Role == RoleOrchestrator {
		return "kvorch"
	}
	return "kvnode"
}

// startOrder sorts orchestrators before data nodes before reporting nodes, and each by
// number.
func startOrder(a, b member) int {
	order := []string{RoleOrchestrator, RoleData, RoleReporting}
	switch i, j := slices.Index(order, a.Role), slices.Index(order, b.Role); {
	case i != j:
		return i - j
	case a.Role == RoleData:
		return a.Port - b.Port
	}
	return b.Port - a.Port
}

// showOrder sorts nodes before orchestrators, and each as they are started.
func showOrder(a, b member) int {
	if (a.Role == RoleOrchestrator) != (b.Role == RoleOrchestrator) {
		return -startOrder(a, b)
	}
	return startOrder(a, b)
}

func address(port int) string { return net.JoinHostPort(Host, strconv.Itoa(port)) }
