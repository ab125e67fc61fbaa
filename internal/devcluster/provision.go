package devcluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Provisioner launches and ends the data nodes of a development cluster for its
// orchestrators. It keeps the laws of package provision; what it launches is in the
// cluster's directory like every other process.
type Provisioner struct{ cluster *Cluster }

// NewProvisioner returns a provisioner for the cluster in a directory.
func NewProvisioner(dir string, opts Options) (*Provisioner, error) {
	c, err := Open(dir, opts)
	if err != nil {
		return nil, err
	}
	return &Provisioner{c}, nil
}

// Launch plans and starts a node, unless it runs. It does not wait until it is ready.
func (p *Provisioner) Launch(ctx context.Context, name, zone string) error {
	if err := p.cluster.planNode(ctx, name, zone); err != nil {
		return err
	}
	_, err := p.cluster.Start(ctx, name)
	return err
}

// planNode adds a data node of a name, unless there is one.
func (c *Cluster) planNode(ctx context.Context, name, zone string) error {
	unlock, err := lock(ctx, c.dir)
	if err != nil {
		return err
	}
	defer unlock()
	st, err := loadState(c.dir)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(st.Processes, func(p process) bool { return p.Name == name }) {
		return nil
	}
	m, err := st.Settings.namedNode(name, zone)
	if err != nil {
		return err
	}
	if err := errors.Join(checkBinaries(c.opts.BinDir, []member{m}), checkPorts([]member{m})); err != nil {
		return err
	}
	st.Processes = append(st.Processes, process{member: m})
	return st.save(c.dir)
}

// namedNode returns the data node of a name that ends in its number.
func (s Settings) namedNode(name, zone string) (member, error) {
	i, err := strconv.Atoi(strings.TrimPrefix(name, "node"))
	if err != nil || i < 1 || s.node(i, zone).Name != name {
		return member{}, fmt.Errorf("a node of a development cluster is named node1, node2 and so on, not %s", name)
	}
	m := s.node(i, zone)
	if m.Port+portsPerNode-1 > 65535 {
		return member{}, fmt.Errorf("%s would have ports above 65535: begin anew with a lower --port", name)
	}
	return m, nil
}

// End kills a node, if it runs, and removes its data and all that is remembered of it.
func (p *Provisioner) End(ctx context.Context, name string) error {
	c := p.cluster
	unlock, err := lock(ctx, c.dir)
	if err != nil {
		return err
	}
	defer unlock()
	st, err := loadState(c.dir)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(st.Processes, func(p process) bool { return p.Name == name })
	if i < 0 {
		return nil
	}
	if st.Processes[i].Role != RoleData {
		return fmt.Errorf("%s is no data node", name)
	}
	st.Processes[i].Stopping = true // its end is no news
	if err := st.save(c.dir); err != nil {
		return err
	}
	if err := c.kill(&st.Processes[i]); err != nil && !errors.Is(err, errNotRunning) {
		return fmt.Errorf("%s %w", name, err)
	}
	// The log stays: it tells what happened.
	if err := errors.Join(os.RemoveAll(dataDir(c.dir, name)), removeIfThere(configPath(c.dir, name))); err != nil {
		return fmt.Errorf("remove the data of %s: %w", name, err)
	}
	st.Processes = slices.Delete(st.Processes, i, i+1)
	return st.save(c.dir)
}

// List returns the data nodes that there are.
func (p *Provisioner) List() ([]Status, error) {
	all, err := p.cluster.Status()
	return slices.DeleteFunc(all, func(s Status) bool { return s.Role != RoleData }), err
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// Wipe stops data nodes and removes what they have stored, so that they start as new ones.
func (c *Cluster) Wipe(ctx context.Context, names ...string) error {
	unlock, err := lock(ctx, c.dir)
	if err != nil {
		return err
	}
	defer unlock()
	st, err := loadState(c.dir)
	if err != nil {
		return err
	}
	picked, err := st.pick(names)
	if err != nil {
		return err
	}
	if i := slices.IndexFunc(picked, func(p *process) bool { return p.Role != RoleData }); i >= 0 {
		return fmt.Errorf("%s is no data node: only those can be wiped", picked[i].Name)
	}
	for _, p := range picked {
		p.Stopping = true
	}
	if err := st.save(c.dir); err != nil {
		return err
	}
	if _, err := c.stopAll(ctx, picked); err != nil {
		return err
	}
	for _, p := range picked {
		if err := os.RemoveAll(dataDir(c.dir, p.Name)); err != nil {
			return fmt.Errorf("remove the data of %s: %w", p.Name, err)
		}
	}
	return nil
}
