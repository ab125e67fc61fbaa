package orchestrator

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

func (s controlService) UpdateSettings(ctx context.Context, r *adminv1.UpdateSettingsRequest) (*adminv1.UpdateSettingsResponse, error) {
	return onLeader(ctx, s.o, change, r, s.updateSettings, adminv1.ControlServiceClient.UpdateSettings)
}

func (s controlService) updateSettings(ctx context.Context, r *adminv1.UpdateSettingsRequest) (*adminv1.UpdateSettingsResponse, error) {
	var u settingsUpdate
	decide := func(state *topology.State) (_ *topologyv1.Command, err error) {
		u, err = updateSettings(state, r)
		return u.cmd, err
	}
	if r.GetDryRun() {
		state := s.o.machine.state.Load()
		if state == nil {
			return nil, noLeader()
		}
		if _, err := decide(state); err != nil {
			return nil, err
		}
	} else {
		a, err := s.o.change(ctx, decide)
		if err != nil {
			return nil, err
		}
		u.after = a.state.SettingsInUse()
	}
	return &adminv1.UpdateSettingsResponse{Before: u.before.Proto(), After: u.after.Proto(), Warnings: u.warnings}, nil
}

// settingsUpdate is what comes of a request to change settings. The epoch of the settings
// after it is 0 until it is agreed on.
type settingsUpdate struct {
	cmd           *topologyv1.Command
	before, after topology.SettingsVersion
	warnings      []string
}

// updateSettings decides what the settings become.
func updateSettings(s *topology.State, r *adminv1.UpdateSettingsRequest) (settingsUpdate, error) {
	t := s.Topology
	u := settingsUpdate{before: s.SettingsInUse()}
	if v := r.GetIfVersion(); v != 0 && v != t.Settings.Version {
		return u, rpc.Errorf(codes.Aborted, "SETTINGS_CHANGED", "the settings are at version %d, the change was made for version %d: see what changed with kvctl config diff %d, then set again", t.Settings.Version, v, v).
			With("version", t.Settings.Version).With("expected_version", v)
	}
	next, back, err := wantedSettings(s, r)
	if err != nil {
		return u, err
	}
	if u.warnings, err = t.CheckSettings(next); err != nil {
		return u, badSettings(err)
	}
	what := topology.DescribeChanges(topology.DiffSettings(t.Settings, next))
	u.after = u.before
	if next.Version = t.Settings.Version; next != t.Settings {
		u.after = topology.SettingsVersion{Settings: next, What: back + what}
		u.after.Settings.Version++
	}
	u.cmd = &topologyv1.Command{
		ExpectEpoch: t.Epoch,
		Change:      &topologyv1.Change{Subject: subjectSettings, What: back + what},
		Mutations:   []*topologyv1.Mutation{{Kind: &topologyv1.Mutation_SetSettings{SetSettings: &topologyv1.SetSettings{Settings: next.Proto()}}}},
	}
	return u, nil
}

// subjectSettings is the subject of changes of settings, and of their correction at nodes.
const subjectSettings = "settings"

// wantedSettings returns the settings that a request asks for and, where they are those of
// an earlier version, words that say so.
func wantedSettings(s *topology.State, r *adminv1.UpdateSettingsRequest) (next topology.Settings, back string, err error) {
	v := r.GetRollbackTo()
	switch {
	case v != 0 && len(r.GetValues()) > 0:
		return next, "", rpc.Errorf(codes.InvalidArgument, rpc.ReasonBadRequest, "settings go back to a version or are set to values, not both")
	case v != 0:
		next, err = s.SettingsOf(v)
		return next, fmt.Sprintf("back to version %d: ", v), err
	case len(r.GetValues()) == 0:
		return next, "", rpc.Errorf(codes.InvalidArgument, rpc.ReasonBadRequest, "there is nothing to set")
	}
	if next, err = s.Topology.SettingsWith(r.GetValues()); err != nil {
		err = badSettings(err)
	}
	return next, "", err
}

func badSettings(err error) error {
	return rpc.Errorf(codes.InvalidArgument, "BAD_SETTINGS", "%s", err.Error())
}

func (s controlService) ListSettings(ctx context.Context, r *adminv1.ListSettingsRequest) (*adminv1.ListSettingsResponse, error) {
	return onLeader(ctx, s.o, idempotent, r, s.listSettings, adminv1.ControlServiceClient.ListSettings)
}

func (s controlService) listSettings(context.Context, *adminv1.ListSettingsRequest) (*adminv1.ListSettingsResponse, error) {
	state := s.o.machine.state.Load()
	if state == nil {
		return nil, noLeader()
	}
	resp := &adminv1.ListSettingsResponse{}
	for _, v := range state.SettingsVersions {
		resp.Versions = append(resp.Versions, v.Proto())
	}
	if len(resp.Versions) == 0 {
		resp.Versions = append(resp.Versions, state.SettingsInUse().Proto())
	}
	return resp, nil
}

// settleTime is how long after a change of settings the leader wants to hear from the nodes
// at once that they have it.
const settleTime = 10 * time.Second

// settling reports whether there are new settings that a healthy node has not taken in yet,
// as far as is known.
func settling(s *topology.State, v view) bool {
	if s == nil {
		return false
	}
	use := s.SettingsInUse()
	if v.nowMillis-use.AtMillis > settleTime.Milliseconds() {
		return false
	}
	for i := range s.Topology.Nodes {
		n := s.Topology.Nodes[i].Incarnation
		if v.healthy(n) && v.status(n).GetEpoch() < use.Epoch {
			return true
		}
	}
	return false
}

// driftPause is the least time between two equal corrections of a node: what differs because
// its software does not know a setting differs for good.
const driftPause = 10 * time.Minute

// correctSettings returns the command that has a node take the topology anew that says to
// have the newest one, and uses other settings. A later epoch does that: what leads to it
// has the checksum of the whole, so that whoever has something else asks for all of it. No
// epoch is ever two topologies, and those who got the wrong one from the node notice, too.
func correctSettings(s *topology.State, v view) *topologyv1.Command {
	t := s.Topology
	want := t.Settings.Hash()
	for i := range t.Nodes {
		n := &t.Nodes[i]
		status := v.status(n.Incarnation)
		hash := status.GetSettingsHash()
		if !v.healthy(n.Incarnation) || status.GetEpoch() != t.Epoch || hash == 0 || hash == want {
			continue
		}
		what := fmt.Sprintf("its settings differed from version %d, which it was to use (hash %016x, not %016x): corrected, it takes the whole topology again", t.Settings.Version, hash, want)
		if !saidLately(s, n.Name, what, v.nowMillis) {
			return &topologyv1.Command{ExpectEpoch: t.Epoch, Change: &topologyv1.Change{Subject: subjectSettings, Name: n.Name, What: what}}
		}
	}
	return nil
}

// saidLately reports whether the last correction of a node was the same, and not long ago.
func saidLately(s *topology.State, name, what string, nowMillis int64) bool {
	for i := len(s.History) - 1; i >= 0; i-- {
		if c := &s.History[i]; c.Subject == subjectSettings && c.Name == name {
			return c.What == what && nowMillis-c.AtMillis < driftPause.Milliseconds()
		}
	}
	return false
}
