package chaos

import (
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"sync"
)

// hub is the name, in cuts, of the network that the load comes from. Its address is
// that of the bridge all machines hang on.
const (
	hub   = "hub"
	hubIP = "10.66.0.1"
)

// command runs a program to its end.
func command(stdin string, args ...string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

func commands(lines ...string) error {
	for _, l := range lines {
		if err := command("", strings.Fields(l)...); err != nil {
			return err
		}
	}
	return nil
}

// makeHub makes the bridge in this process's own network, which nothing leads out of.
func makeHub() error {
	return commands(
		"ip link set lo up",
		"ip link add "+hub+" type bridge",
		"ip addr add "+hubIP+"/24 dev "+hub,
		"ip link set "+hub+" up",
	)
}

// makeNetwork makes a machine's network stack and ties it to the bridge.
func makeNetwork(name, ip string) error {
	return commands(
		"ip netns add "+name,
		"ip link add "+name+" type veth peer name eth0 netns "+name,
		"ip link set "+name+" master "+hub+" up",
		"ip -n "+name+" addr add "+ip+"/24 dev eth0",
		"ip -n "+name+" link set eth0 up",
		"ip -n "+name+" link set lo up",
	)
}

// end is one end of a cut: a machine's network or the hub.
type end struct{ name, ip string }

func (m *machine) end() end { return end{m.name, m.ip} }

var hubEnd = end{hub, hubIP}

// cuts are the directions in which nothing passes. What a receiver does not hear is
// dropped on its side, as a network would: the sender notices nothing.
type cuts struct {
	mu   sync.Mutex
	deaf map[end]map[end]bool // receiver → senders it does not hear
}

// cut drops all that goes from any of the senders to any of the receivers.
func (c *cuts) cut(from, to []end) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.deaf == nil {
		c.deaf = map[end]map[end]bool{}
	}
	for _, r := range to {
		if c.deaf[r] == nil {
			c.deaf[r] = map[end]bool{}
		}
		for _, s := range from {
			if s != r {
				c.deaf[r][s] = true
			}
		}
		if err := drop(r, slices.Collect(maps.Keys(c.deaf[r]))); err != nil {
			return err
		}
	}
	return nil
}

// heal lets everything pass again.
func (c *cuts) heal() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for r := range c.deaf {
		if err := drop(r, nil); err != nil {
			return err
		}
	}
	clear(c.deaf)
	return nil
}

// drop makes a receiver drop what comes from the senders and nothing else.
func drop(receiver end, senders []end) error {
	rules := "table inet chaos\ndelete table inet chaos\n"
	if len(senders) > 0 {
		ips := make([]string, len(senders))
		for i, s := range senders {
			ips[i] = s.ip
		}
		rules += "table inet chaos {\n chain heard {\n  type filter hook input priority 0;\n  ip saddr { " + strings.Join(ips, ", ") + " } drop\n }\n}\n"
	}
	args := []string{"nft", "-f", "-"}
	if receiver.name != hub {
		args = append([]string{"ip", "netns", "exec", receiver.name}, args...)
	}
	return command(rules, args...)
}
