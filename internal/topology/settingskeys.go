package topology

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Setting is one setting of the cluster under its name in YAML. Its text is the same in
// files, on the command line and in the history.
type Setting struct {
	Name string
	// Help says what it is, Effect what a change of it waits for: none needs a restart.
	Help, Effect string
	// ref returns where the setting is kept, and how its text is read and written.
	ref func(*Settings) setting
}

// setting is a place in Settings that has a text.
type setting interface {
	text() string
	parse(string) error
}

// SettingGroup is the name of the auto-scaling group as a whole; as a setting it can be
// NoGroup only.
const (
	SettingGroup = "auto_scaling_group"
	NoGroup      = "none"
)

// Effects of changes.
const (
	effectAtOnce  = "at once"
	effectProbe   = "with the next probe"
	effectLeader  = "when the orchestrators decide next"
	effectWrites  = "for what is written from now on"
	effectNewHint = "at once; hints that are kept stay until they expire"
)

// settingKeys are all settings, in the order in which they are shown.
var settingKeys = []Setting{
	{"health_checks.interval", "between two probes of a node", effectProbe, func(s *Settings) setting { return (*span)(&s.HealthChecks.Interval) }},
	{"health_checks.timeout", "how long a probe may take", effectProbe, func(s *Settings) setting { return (*span)(&s.HealthChecks.Timeout) }},
	{"health_checks.healthy_threshold", "good probes in a row until a node is healthy", effectProbe, func(s *Settings) setting { return &count[int]{&s.HealthChecks.HealthyThreshold} }},
	{"health_checks.unhealthy_threshold", "failed probes in a row until it is unhealthy", effectProbe, func(s *Settings) setting { return &count[int]{&s.HealthChecks.UnhealthyThreshold} }},
	{"max_value_bytes", "largest value", effectWrites, func(s *Settings) setting { return &size[int]{&s.MaxValueBytes} }},
	{"max_batch_bytes", "largest batch, keys and values", effectWrites, func(s *Settings) setting { return &size[int]{&s.MaxBatchBytes} }},
	{"max_hint_bytes", "hints that a node keeps for all others", effectNewHint, func(s *Settings) setting { return &size[int64]{&s.MaxHintBytes} }},
	{"max_hints", "how many of them it keeps", effectNewHint, func(s *Settings) setting { return &count[int64]{&s.MaxHints} }},
	{"max_hint_age", "how long it keeps one", effectAtOnce, func(s *Settings) setting { return (*span)(&s.MaxHintAge) }},
	{"replace_after", "how long a node is unhealthy before others take its place; 0s is for ever", effectLeader, func(s *Settings) setting { return (*span)(&s.ReplaceAfter) }},
	{"auto_scaling_group.min_capacity", "data nodes there are at least", effectLeader, func(s *Settings) setting { return &count[int]{&s.AutoScalingGroup.MinCapacity} }},
	{"auto_scaling_group.max_capacity", "data nodes there are at most", effectLeader, func(s *Settings) setting { return &count[int]{&s.AutoScalingGroup.MaxCapacity} }},
	{"auto_scaling_group.target_cpu_utilization", "CPU that nodes are to use, as 70%, or off", effectLeader, func(s *Settings) setting { return &target{&s.AutoScalingGroup.TargetCPU, readPart, writePart} }},
	{"auto_scaling_group.target_disk_utilization", "disk that nodes are to use, as 60%, or off", effectLeader, func(s *Settings) setting { return &target{&s.AutoScalingGroup.TargetDisk, readPart, writePart} }},
	{"auto_scaling_group.target_operations", "operations a second that a node is to do, or off", effectLeader, func(s *Settings) setting {
		return &target{&s.AutoScalingGroup.TargetOperations, readNumber, writeNumber}
	}},
	{"auto_scaling_group.scale_up_cooldown", "least time between two scale-ups", effectLeader, func(s *Settings) setting { return (*span)(&s.AutoScalingGroup.ScaleUpCooldown) }},
	{"auto_scaling_group.scale_down_cooldown", "least time from any scaling to a scale-down", effectLeader, func(s *Settings) setting { return (*span)(&s.AutoScalingGroup.ScaleDownCooldown) }},
	{"join", "who gives slots to spares: manual, auto, or default, which is auto with an auto_scaling_group", effectLeader, func(s *Settings) setting {
		return &choice[JoinPolicy]{&s.Join, []JoinPolicy{0, JoinManual, JoinAuto}}
	}},
	{"placement", "strategy that nodes are given slots by: even or weighted", "for moves that are planned from now on", func(s *Settings) setting {
		return &choice[strategy]{(*strategy)(&s.Placement), []strategy{PlaceEven, PlaceWeighted}}
	}},
	{"rebalance.policy", "what is done when load is spread badly: accept or auto", effectLeader, func(s *Settings) setting {
		return &choice[RebalancePolicy]{&s.Rebalance.Policy, []RebalancePolicy{RebalanceAccept, RebalanceAuto}}
	}},
	{"rebalance.threshold", "how much above the mean the node with most may have", effectLeader, func(s *Settings) setting { return (*part)(&s.Rebalance.Threshold) }},
	{"rebalance.quiet_cpu_utilization", "CPU that the busiest node may use while slots move for that", effectLeader, func(s *Settings) setting { return (*part)(&s.Rebalance.QuietCPU) }},
	{"rebalance.cooldown", "least time between two rebalances", effectLeader, func(s *Settings) setting { return (*span)(&s.Rebalance.Cooldown) }},
}

// SettingKeys returns all settings, in the order in which they are shown.
func SettingKeys() []Setting { return slices.Clone(settingKeys) }

// ofGroup reports whether a setting is one of the auto-scaling group.
func (k *Setting) ofGroup() bool { return strings.HasPrefix(k.Name, SettingGroup+".") }

// Get returns a setting's text: NoGroup for those of an auto-scaling group where there is
// none.
func (k *Setting) Get(s Settings) string {
	if k.ofGroup() && !s.AutoScalingGroup.On() {
		return NoGroup
	}
	return k.ref(&s).text()
}

// Values returns all settings by name, as With takes them.
func (s Settings) Values() map[string]string {
	out := map[string]string{}
	for i := range settingKeys {
		k := &settingKeys[i]
		if k.ofGroup() && !s.AutoScalingGroup.On() {
			out[SettingGroup] = NoGroup
			continue
		}
		out[k.Name] = k.Get(s)
	}
	return out
}

// SettingsWith is Settings.With, where an auto-scaling group that comes to be has as many
// nodes at least as there are now unless said otherwise: it is not to begin by draining some.
func (t *Topology) SettingsWith(values map[string]string) (Settings, error) {
	g := DefaultGroup()
	g.MinCapacity = max(cmp.Or(t.DataNodes(), g.MinCapacity), t.Width())
	g.MaxCapacity = max(g.MinCapacity, g.MaxCapacity)
	return t.Settings.with(values, g)
}

// With returns the settings with some set to other values, all or none. Where there is no
// auto-scaling group, setting one of its keys makes one that has the defaults otherwise.
// Errors name the key and what is wanted.
func (s Settings) With(values map[string]string) (Settings, error) {
	return s.with(values, DefaultGroup())
}

func (s Settings) with(values map[string]string, group AutoScalingGroup) (Settings, error) {
	next := s
	for name, text := range values {
		if name == SettingGroup && text != NoGroup {
			return s, fmt.Errorf("%s is %q: write %s to do without one, or set its keys, such as %s.max_capacity", name, text, NoGroup, SettingGroup)
		}
		if strings.HasPrefix(name, SettingGroup+".") && !next.AutoScalingGroup.On() {
			next.AutoScalingGroup = group
		}
	}
	if _, none := values[SettingGroup]; none {
		for _, name := range slices.Sorted(maps.Keys(values)) {
			if strings.HasPrefix(name, SettingGroup+".") {
				return s, fmt.Errorf("%s is to be %s, and %s is to be set: write one of them", SettingGroup, NoGroup, name)
			}
		}
		next.AutoScalingGroup = AutoScalingGroup{}
	}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		if name == SettingGroup {
			continue
		}
		k := settingKey(name)
		if k == nil {
			return s, unknownSetting(name)
		}
		if err := k.ref(&next).parse(values[name]); err != nil {
			return s, fmt.Errorf("%s is %q: %w", name, values[name], err)
		}
	}
	if err := next.Validate(); err != nil {
		return s, err
	}
	return next, nil
}

func settingKey(name string) *Setting {
	i := slices.IndexFunc(settingKeys, func(k Setting) bool { return k.Name == name })
	if i < 0 {
		return nil
	}
	return &settingKeys[i]
}

// unknownSetting says which settings a name is most like.
func unknownSetting(name string) error {
	group, _, _ := strings.Cut(name, ".")
	var like []string
	for _, k := range settingKeys {
		last := k.Name[strings.LastIndexByte(k.Name, '.')+1:]
		if distance(k.Name, name) <= 2+len(name)/6 || distance(last, name) <= 2 || strings.HasPrefix(k.Name, group+".") {
			like = append(like, k.Name)
		}
	}
	slices.SortStableFunc(like, func(a, b string) int { return cmp.Compare(distance(a, name), distance(b, name)) })
	if len(like) == 0 {
		return fmt.Errorf("there is no setting %q: kvctl config show lists all", name)
	}
	return fmt.Errorf("there is no setting %q: did you mean %s?", name, strings.Join(like[:min(len(like), 3)], " or "))
}

// distance returns how many letters must be put in, left out or replaced to make b of a
// (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal, row[j+1] = row[j+1], min(replaced, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// SettingChange is a setting with its text before and after.
type SettingChange struct {
	Setting
	From, To string
}

// DiffSettings returns the settings that differ, in the order in which they are shown. Targets
// that are not looked at come and go with a group unmentioned.
func DiffSettings(from, to Settings) (out []SettingChange) {
	for _, k := range settingKeys {
		if a, b := k.Get(from), k.Get(to); a != b && (a != NoGroup || b != off) && (a != off || b != NoGroup) {
			out = append(out, SettingChange{k, a, b})
		}
	}
	return out
}

// DescribeChanges writes changes in a line.
func DescribeChanges(changes []SettingChange) string {
	var out []string
	for _, c := range changes {
		out = append(out, fmt.Sprintf("%s %s → %s", c.Name, c.From, c.To))
	}
	return strings.Join(out, ", ")
}

// span is a duration of whole milliseconds.
type span time.Duration

func (p *span) text() string {
	s := time.Duration(*p).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// longest bounds durations, far within what the wire's milliseconds can hold.
const longest = 10 * 365 * 24 * time.Hour

func (p *span) parse(s string) error {
	if n, err := strconv.ParseFloat(s, 64); err == nil && n != 0 {
		return fmt.Errorf("it has no unit: write %ss, for example", s)
	}
	var d time.Duration
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 12)
		if err != nil {
			return errors.New("write a duration, such as 500ms, 10s, 15m, 12h or 7d")
		}
		d = time.Duration(n) * 24 * time.Hour
	} else {
		var err error
		if d, err = time.ParseDuration(s); err != nil {
			return errors.New("write a duration, such as 500ms, 10s, 15m, 12h or 7d")
		}
	}
	if d%time.Millisecond != 0 || d < 0 || d > longest {
		return fmt.Errorf("write whole milliseconds, at most %s", (*span)(ptr(longest)).text())
	}
	*p = span(d)
	return nil
}

func ptr[T any](v T) *T { return &v }

// count is a whole number.
type count[T int | int64] struct{ to *T }

func (p *count[T]) text() string { return strconv.FormatInt(int64(*p.to), 10) }
func (p *count[T]) parse(s string) error {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || n > math.MaxUint32 {
		return fmt.Errorf("write a whole number, 0 to %d", uint32(math.MaxUint32))
	}
	*p.to = T(n)
	return nil
}

// size is a number of bytes.
type size[T int | int64] struct{ to *T }

// units are those that sizes may be given in, each 1024 times the one before.
var units = []string{"", "KiB", "MiB", "GiB"}

func (p *size[T]) text() string {
	n, unit := int64(*p.to), 0
	for n != 0 && n%1024 == 0 && unit+1 < len(units) {
		n, unit = n/1024, unit+1
	}
	return strconv.FormatInt(n, 10) + units[unit]
}

func (p *size[T]) parse(s string) error {
	unit := int64(1)
	digits := s
	for i, name := range units[1:] {
		if d, ok := strings.CutSuffix(s, name); ok {
			digits, unit = strings.TrimSpace(d), 1<<(10*(i+1))
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64/unit {
		return errors.New("write a number of bytes, such as 1048576 or 1MiB")
	}
	*p.to = T(n * unit)
	return nil
}

// part is a share, written in percent.
type part float64

func (p *part) text() string { return writePart(float64(*p)) }
func (p *part) parse(s string) error {
	f, err := readPart(s)
	if err == nil {
		*p = part(f)
	}
	return err
}

// writePart writes a share in percent, exactly: the point moves, nothing is computed.
func writePart(f float64) string {
	whole, rest, _ := strings.Cut(strconv.FormatFloat(f, 'f', -1, 64), ".")
	rest += strings.Repeat("0", max(0, 2-len(rest)))
	whole, rest = strings.TrimLeft(whole+rest[:2], "0"), rest[2:]
	if rest != "" {
		rest = "." + rest
	}
	return cmp.Or(whole, "0") + rest + "%"
}

// readPart reads a share in percent, 70%, or as a part of one, 0.7.
func readPart(s string) (float64, error) {
	digits, percent := strings.CutSuffix(s, "%")
	f, err := readNumber(digits)
	switch {
	case err != nil || digits == "":
		return 0, errors.New("write a percentage, such as 70%")
	case percent:
		return strconv.ParseFloat(digits+"e-2", 64)
	case f > 1:
		return 0, fmt.Errorf("write %s%%, or a part of one such as 0.7", digits)
	}
	return f, nil
}

func writeNumber(f float64) string { return strconv.FormatFloat(f, 'f', -1, 64) }

// readNumber reads a number of digits and a point.
func readNumber(s string) (float64, error) {
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || strings.Trim(s, "0123456789.") != "" {
		return 0, errors.New("write a number, such as 20000")
	}
	return f, nil
}

// off is a target that is not looked at.
const off = "off"

// target is a number above 0 that may be left out, which is kept as 0.
type target struct {
	to    *float64
	read  func(string) (float64, error)
	write func(float64) string
}

func (p *target) text() string {
	if *p.to == 0 {
		return off
	}
	return p.write(*p.to)
}

func (p *target) parse(s string) error {
	if s == off {
		*p.to = 0
		return nil
	}
	f, err := p.read(s)
	switch {
	case err != nil:
		return fmt.Errorf("%w, or %s", err, off)
	case f == 0:
		return fmt.Errorf("nodes that do nothing cannot be aimed at: write more, or %s", off)
	}
	*p.to = f
	return nil
}

// strategy is a placement strategy.
type strategy string

func (s strategy) String() string { return string(s) }

// choice is one of a few.
type choice[T interface {
	comparable
	fmt.Stringer
}] struct {
	to  *T
	all []T
}

func (p *choice[T]) text() string { return (*p.to).String() }
func (p *choice[T]) parse(s string) error {
	var names []string
	for _, v := range p.all {
		if v.String() == s {
			*p.to = v
			return nil
		}
		names = append(names, v.String())
	}
	return fmt.Errorf("write %s", strings.Join(names, " or "))
}
