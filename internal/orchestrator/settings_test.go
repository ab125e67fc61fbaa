package orchestrator

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// update applies a change of settings, which must be made.
func update(t *testing.T, s *topology.State, r *adminv1.UpdateSettingsRequest) (*topology.State, settingsUpdate) {
	t.Helper()
	u, err := updateSettings(s, r)
	if err != nil {
		t.Fatal(err)
	}
	next, _, err := s.Apply(u.cmd)
	if err != nil {
		t.Fatal(err)
	}
	return next, u
}

func TestUpdateSettings(t *testing.T) {
	s, _ := ringOf(t, 3)
	set := func(pairs ...string) *adminv1.UpdateSettingsRequest {
		r := &adminv1.UpdateSettingsRequest{Values: map[string]string{}}
		for i := 0; i < len(pairs); i += 2 {
			r.Values[pairs[i]] = pairs[i+1]
		}
		return r
	}
	founded, epoch := s.Topology.Settings, s.Topology.Epoch
	s, u := update(t, s, set("replace_after", "0s", "join", "auto"))
	if v := s.SettingsInUse(); v.Settings != u.after.Settings || v.Settings.Version != 2 || v.Epoch != epoch+1 || v.What != "replace_after 10m → 0s, join default → auto" ||
		u.before.Settings != founded || len(u.warnings) != 1 {
		t.Errorf("version %+v came of %+v", v, u)
	}
	last := s.History[len(s.History)-1]
	if last.Subject != "settings" || last.What != s.SettingsInUse().What {
		t.Errorf("the history says %+v", last)
	}
	before := s
	if s, u = update(t, s, set("replace_after", "0s")); u.after.Settings != u.before.Settings || s.Topology.Epoch != before.Topology.Epoch || len(s.History) != len(before.History) {
		t.Errorf("what changes nothing is %+v", u)
	}
	s, _ = update(t, s, set("auto_scaling_group.max_capacity", "9"))
	back := &adminv1.UpdateSettingsRequest{RollbackTo: 2, IfVersion: 3}
	if s, u = update(t, s, back); u.after.Settings.Version != 4 || s.Topology.Settings.AutoScalingGroup.On() || !strings.HasPrefix(s.SettingsInUse().What, "back to version 2: auto_scaling_group.min_capacity 3 → none") {
		t.Errorf("back to version 2: %+v", s.SettingsInUse())
	}
	for _, tc := range []struct {
		r      *adminv1.UpdateSettingsRequest
		code   codes.Code
		reason string
	}{
		{back, codes.Aborted, "SETTINGS_CHANGED"},
		{&adminv1.UpdateSettingsRequest{RollbackTo: 9}, codes.NotFound, "SETTINGS_VERSION_NOT_FOUND"},
		{&adminv1.UpdateSettingsRequest{}, codes.InvalidArgument, rpc.ReasonBadRequest},
		{&adminv1.UpdateSettingsRequest{RollbackTo: 1, Values: map[string]string{"join": "auto"}}, codes.InvalidArgument, rpc.ReasonBadRequest},
		{set("join", "auto", "replace_after", "soon"), codes.InvalidArgument, "BAD_SETTINGS"},
		{set("auto_scaling_group.max_capacity", "13"), codes.InvalidArgument, "BAD_SETTINGS"}, // of 16 vnodes
		{set("listen", ":1"), codes.InvalidArgument, "BAD_SETTINGS"},
	} {
		u, err := updateSettings(s, tc.r)
		if e := rpc.AsError(err); e == nil || e.Code != tc.code || e.Reason != tc.reason || u.cmd != nil {
			t.Errorf("%v: %+v, %v", tc.r, u.cmd, err)
		}
	}
}

// A node that uses other settings than it should, in the epoch that it says to have, is
// told to take the topology anew, once.
func TestSettingsAreCorrected(t *testing.T) {
	s, cfg := ringOf(t, 3)
	right := s.Topology.Settings.Hash()
	v := alive(s)
	hash, epoch := right, s.Topology.Epoch
	status := v.status
	v.status = func(incarnation uint64) *adminv1.NodeStatus {
		out := status(incarnation)
		if incarnation == 2 {
			out.Epoch, out.SettingsHash = epoch, hash
		}
		return out
	}
	v.nowMillis = 1_000_000_000_000
	for hash = range map[uint64]struct{}{right: {}, 0: {}} { // the right one, and older software
		if _, what := next(t, s, cfg, v); what != "" {
			t.Errorf("hash %x: %s", hash, what)
		}
	}
	hash, epoch = 0x123, epoch-1
	if _, what := next(t, s, cfg, v); what != "" {
		t.Errorf("a node that lags: %s", what)
	}
	epoch++
	before := s
	s, what := next(t, s, cfg, v)
	if last := s.History[len(s.History)-1]; !strings.Contains(what, "its settings differed from version 1") || last.Subject != "settings" || last.Name != "n2" || s.Topology.Epoch != epoch+1 {
		t.Fatalf("%q in epoch %d: %+v", what, s.Topology.Epoch, last)
	}
	if s.Topology.Settings != before.Topology.Settings {
		t.Error("the settings are others")
	}
	if _, what := next(t, s, cfg, v); what != "" {
		t.Errorf("while it takes it in: %s", what)
	}
	epoch++
	if _, what := next(t, s, cfg, v); what != "" {
		t.Errorf("what differs for good: %s", what)
	}
	hash = 0x456
	if _, what := next(t, s, cfg, v); what == "" {
		t.Error("what differs in another way is not corrected")
	}
	hash, v.nowMillis = 0x123, v.nowMillis+driftPause.Milliseconds()
	if _, what := next(t, s, cfg, v); what == "" {
		t.Error("what differs again much later is not corrected")
	}
}

func TestSettling(t *testing.T) {
	s, _ := ringOf(t, 3)
	v := alive(s)
	s, _ = update(t, s, &adminv1.UpdateSettingsRequest{Values: map[string]string{"join": "auto"}})
	if !settling(s, v) {
		t.Error("nodes that lag are not looked at")
	}
	if settling(s, alive(s)) || settling(nil, v) || settling(s, alive(s, 1)) {
		t.Error("nodes that do not lag, or are dead, are looked at")
	}
	v.nowMillis = settleTime.Milliseconds() + 1
	if settling(s, v) {
		t.Error("nodes that lag are looked at for ever")
	}
}
