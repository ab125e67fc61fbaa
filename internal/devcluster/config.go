package devcluster

import (
	"cmp"
	"fmt"
	"path/filepath"
	"runtime"
	"time"

	"go.yaml.in/yaml/v3"
)

// The keys below are those of the processes' own configuration. They are repeated
// here, and compared with the real ones in a test, because kvctl must not be linked
// with storage and consensus.

type nodeConfig struct {
	Name          string   `yaml:"name"`
	Zone          string   `yaml:"zone"`
	Role          string   `yaml:"role,omitempty"`
	DataDir       string   `yaml:"data_dir"`
	Orchestrators []string `yaml:"orchestrators"`
	Listen        string   `yaml:"listen"`
	AdminListen   string   `yaml:"admin_listen"`
	GossipListen  string   `yaml:"gossip_listen"`
	CPULimit      float64  `yaml:"cpu_limit,omitempty"`
}

type orchestratorConfig struct {
	Name            string        `yaml:"name"`
	DataDir         string        `yaml:"data_dir"`
	Listen          string        `yaml:"listen"`
	AdminListen     string        `yaml:"admin_listen"`
	GossipListen    string        `yaml:"gossip_listen"`
	RaftListen      string        `yaml:"raft_listen"`
	Peers           []peer        `yaml:"peers"`
	Bootstrap       bootstrap     `yaml:"bootstrap"`
	ElectionTimeout time.Duration `yaml:"election_timeout"`
	Provisioner     *provisioner  `yaml:"provisioner,omitempty"`
}

type provisioner struct {
	Kind          string        `yaml:"kind"`
	LaunchTimeout time.Duration `yaml:"launch_timeout"`
	Process       processes     `yaml:"process"`
}

type processes struct {
	Dir    string `yaml:"dir"`
	BinDir string `yaml:"bin_dir"`
}

type peer struct {
	Name          string `yaml:"name"`
	Address       string `yaml:"address"`
	AdminAddress  string `yaml:"admin_address"`
	GossipAddress string `yaml:"gossip_address"`
	RaftAddress   string `yaml:"raft_address"`
}

type bootstrap struct {
	FoundingNodes    int               `yaml:"founding_nodes"`
	HealthChecks     healthChecks      `yaml:"health_checks"`
	ReplaceAfter     time.Duration     `yaml:"replace_after"`
	AutoScalingGroup *autoScalingGroup `yaml:"auto_scaling_group,omitempty"`
}

type autoScalingGroup struct {
	MinCapacity       int           `yaml:"min_capacity"`
	MaxCapacity       int           `yaml:"max_capacity"`
	TargetCPU         string        `yaml:"target_cpu_utilization"`
	ScaleUpCooldown   time.Duration `yaml:"scale_up_cooldown"`
	ScaleDownCooldown time.Duration `yaml:"scale_down_cooldown"`
}

type healthChecks struct {
	Interval           time.Duration `yaml:"interval"`
	Timeout            time.Duration `yaml:"timeout"`
	HealthyThreshold   int           `yaml:"healthy_threshold"`
	UnhealthyThreshold int           `yaml:"unhealthy_threshold"`
}

// On one machine a process answers at once or is gone, so both are noticed sooner
// than a real network would allow.
var devHealthChecks = healthChecks{Interval: time.Second, Timeout: 500 * time.Millisecond, HealthyThreshold: 2, UnhealthyThreshold: 3}

const (
	devElectionTimeout = 500 * time.Millisecond
	devReplaceAfter    = 20 * time.Second
	devLaunchTimeout   = 30 * time.Second
)

// autonomous returns the scaling rules of a cluster that runs itself: on one machine load
// comes and goes in seconds, and so do nodes.
func (s Settings) autonomous() *autoScalingGroup {
	return &autoScalingGroup{MinCapacity: s.Nodes, MaxCapacity: 4 * s.Nodes, TargetCPU: "70%", ScaleUpCooldown: 15 * time.Second, ScaleDownCooldown: 15 * time.Second}
}

// allowance returns how many cores each node is taken to have, 0 for all. Nodes that share
// a machine never all use what it has: without a limit of their own none would ever seem
// busy, so each is taken to have the part that is left to it when there are as many as may be.
func (s Settings) allowance(cores int) float64 {
	if s.CPULimit > 0 || !s.Autonomy {
		return s.CPULimit
	}
	return float64(cores) / float64(s.autonomous().MaxCapacity)
}

// configFor returns a process's configuration.
func (st *state) configFor(dir, binDir string, m member) any {
	var peers []peer
	var orchestrators []string
	for _, p := range st.Processes {
		if p.Role == RoleOrchestrator {
			orchestrators = append(orchestrators, p.clientAddr())
			peers = append(peers, peer{p.Name, p.clientAddr(), p.adminAddr(), p.gossipAddr(), p.raftAddr()})
		}
	}
	if m.Role == RoleOrchestrator {
		c := orchestratorConfig{
			Name: m.Name, DataDir: dataDir(dir, m.Name),
			Listen: m.clientAddr(), AdminListen: m.adminAddr(), GossipListen: m.gossipAddr(), RaftListen: m.raftAddr(),
			Peers:           peers,
			Bootstrap:       bootstrap{FoundingNodes: st.Settings.Nodes, HealthChecks: devHealthChecks, ReplaceAfter: cmp.Or(st.Settings.ReplaceAfter, devReplaceAfter)},
			ElectionTimeout: devElectionTimeout,
		}
		if st.Settings.Autonomy {
			c.Bootstrap.AutoScalingGroup = st.Settings.autonomous()
			c.Provisioner = &provisioner{Kind: "process", LaunchTimeout: devLaunchTimeout, Process: processes{dir, binDir}}
		}
		return c
	}
	role := m.Role
	if role == RoleData {
		role = "" // the default
	}
	return nodeConfig{
		Name: m.Name, Zone: m.Zone, Role: role, DataDir: dataDir(dir, m.Name), Orchestrators: orchestrators,
		Listen: m.clientAddr(), AdminListen: m.adminAddr(), GossipListen: m.gossipAddr(),
		CPULimit: st.Settings.allowance(runtime.NumCPU()),
	}
}

// writeConfig writes a process's configuration file.
func (st *state) writeConfig(dir, binDir string, m member) error {
	b, err := yaml.Marshal(st.configFor(dir, binDir, m))
	if err != nil {
		return fmt.Errorf("encode the configuration of %s: %w", m.Name, err)
	}
	header := fmt.Sprintf("# Configuration of %s. Written by kvctl dev at every start: changes are lost.\n", m.Name)
	return replaceFile(configPath(dir, m.Name), append([]byte(header), b...))
}

func configPath(dir, name string) string { return filepath.Join(dir, name+".yaml") }
func logPath(dir, name string) string    { return filepath.Join(dir, name+".log") }
func dataDir(dir, name string) string    { return filepath.Join(dir, name) }
