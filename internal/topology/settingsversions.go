package topology

import (
	"fmt"
	"slices"

	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// SettingsVersion is one state of the cluster's settings.
type SettingsVersion struct {
	Settings Settings
	Epoch    uint64
	// AtMillis is milliseconds since 1970.
	AtMillis int64
	// What was changed, in words.
	What string
}

// maxSettingsVersions is how many settings are kept.
const maxSettingsVersions = 100

// setSettings replaces the cluster's settings, where they differ.
func (d *draft) setSettings(pb *topologyv1.SetSettings) {
	next := settingsFromProto(pb.GetSettings())
	next.Version = d.Topology.Settings.Version
	if next == d.Topology.Settings {
		return
	}
	next.Version++
	d.Topology.Settings = next
	d.changed, d.settings = true, true
}

// keepSettings keeps the settings in use as a version.
func (s *State) keepSettings(atMillis int64, what string) {
	s.SettingsVersions = append(s.SettingsVersions, SettingsVersion{s.Topology.Settings, s.Topology.Epoch, atMillis, what})
	if extra := len(s.SettingsVersions) - maxSettingsVersions; extra > 0 {
		s.SettingsVersions = slices.Delete(s.SettingsVersions, 0, extra)
	}
}

// Proto converts a version to its wire form.
func (v SettingsVersion) Proto() *topologyv1.SettingsVersion {
	return &topologyv1.SettingsVersion{Settings: v.Settings.Proto(), Epoch: v.Epoch, AtMs: uint64(v.AtMillis), What: v.What}
}

// SettingsVersionFromProto converts a version.
func SettingsVersionFromProto(pb *topologyv1.SettingsVersion) SettingsVersion {
	return SettingsVersion{settingsFromProto(pb.GetSettings()), pb.GetEpoch(), int64(pb.GetAtMs()), pb.GetWhat()}
}

// SettingsInUse returns the version of the settings that are in use.
func (s *State) SettingsInUse() SettingsVersion {
	if n := len(s.SettingsVersions); n > 0 {
		return s.SettingsVersions[n-1]
	}
	return SettingsVersion{Settings: s.Topology.Settings} // from before there were versions
}

// SettingsOf returns the settings of a version, or a refusal.
func (s *State) SettingsOf(version uint64) (Settings, error) {
	for _, v := range s.SettingsVersions {
		if v.Settings.Version == version {
			return v.Settings, nil
		}
	}
	oldest := s.Topology.Settings.Version
	if len(s.SettingsVersions) > 0 {
		oldest = s.SettingsVersions[0].Settings.Version
	}
	return Settings{}, refuse(NotFound, "SETTINGS_VERSION_NOT_FOUND",
		fmt.Sprintf("there is no version %d of the settings: versions %d to %d are kept", version, oldest, s.Topology.Settings.Version),
		"version", version, "oldest", oldest, "newest", s.Topology.Settings.Version)
}
