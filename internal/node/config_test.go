package node

import (
	"math"
	"strings"
	"testing"
	"time"
)

func TestConfig(t *testing.T) {
	good := func() Config {
		c := Defaults()
		c.Name, c.DataDir, c.Orchestrators, c.Listen, c.AdminListen, c.GossipListen = "n1", "data", []string{"o:1"}, "h:1", "h:2", "h:3"
		c.Complete()
		return c
	}
	c := good()
	if err := c.Validate(); err != nil || c.Advertise != "h:1" || c.GossipAdvertise != "h:3" {
		t.Fatalf("%+v: %v", c, err)
	}
	for _, limit := range []float64{math.NaN(), math.Inf(1), math.Inf(-1), -0.5} {
		c := good()
		c.CPULimit = limit
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), "cpu_limit:") {
			t.Errorf("cpu_limit %v: %v", limit, err)
		}
	}
	for key, harm := range map[string]func(*Config){
		"name":                func(c *Config) { c.Name = "a b" },
		"zone":                func(c *Config) { c.Zone = "" },
		"data_dir":            func(c *Config) { c.DataDir = "" },
		"orchestrators":       func(c *Config) { c.Orchestrators = []string{"o"} },
		"listen":              func(c *Config) { c.Listen = "h:99999" },
		"admin_listen":        func(c *Config) { c.AdminListen = "" },
		"gossip_listen":       func(c *Config) { c.GossipListen = "x" },
		"advertise":           func(c *Config) { c.Advertise = "0.0.0.0:1" },
		"gossip_advertise":    func(c *Config) { c.GossipAdvertise = ":1" },
		"cache_bytes":         func(c *Config) { c.CacheBytes = 1 },
		"record_cache_bytes":  func(c *Config) { c.RecordCacheBytes = -1 },
		"memtable_bytes":      func(c *Config) { c.MemTableBytes = 1 << 40 },
		"min_free_disk_bytes": func(c *Config) { c.MinFreeDiskBytes = -1 },
		"disk_stall_after":    func(c *Config) { c.DiskStallAfter = time.Millisecond },
		"drain_timeout":       func(c *Config) { c.DrainTimeout = time.Hour },
		"tls":                 func(c *Config) { c.TLS.Key = "k" },
		"gossip_key":          func(c *Config) { c.GossipKey = "c2hvcnQ=" },
	} {
		c := good()
		harm(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), key+":") {
			t.Errorf("error = %v, want one that names %s", err, key)
		}
	}
}

func TestParseQuota(t *testing.T) {
	for in, want := range map[string]float64{"max 100000\n": 0, "150000 100000\n": 1.5, "": 0, "x y": 0, "1 0": 0} {
		if got := parseQuota([]byte(in)); got != want {
			t.Errorf("%q: %v, want %v", in, got, want)
		}
	}
}

func TestParseMemoryLimit(t *testing.T) {
	const machine = "MemTotal:        8038476 kB\nMemFree:         1038476 kB\n"
	for _, test := range []struct {
		group, machine string
		want           uint64
	}{
		{"max\n", machine, 8038476 << 10},
		{"536870912\n", machine, 512 << 20},
		{"9223372036854771712\n", machine, 8038476 << 10}, // more than there is
		{"", machine, 8038476 << 10},
		{"536870912\n", "", 512 << 20},
		{"max\n", "MemTotal: ? kB\n", 0},
		{"", "", 0},
	} {
		if got := parseMemoryLimit([]byte(test.group), []byte(test.machine)); got != test.want {
			t.Errorf("%q and %q: %d, want %d", test.group, test.machine, got, test.want)
		}
	}
}

func TestProcess(t *testing.T) {
	p := newProcess(2)
	if p.cpu() != 0 {
		t.Error("CPU of one sample is not 0")
	}
	for range 100 {
		p.sample()
	}
	if len(p.mu.used) != cpuWindow+1 || p.cpu() < 0 {
		t.Errorf("%d samples, CPU %v", len(p.mu.used), p.cpu())
	}
	if memory() < 1<<20 {
		t.Errorf("memory is %d bytes", memory())
	}
	if newProcess(0).allowance <= 0 {
		t.Error("no allowance")
	}
}

// Nodes that are configured alike have equal hashes, whatever tells them apart.
func TestConfigHash(t *testing.T) {
	base := func() Config {
		c := Defaults()
		c.Name, c.Zone, c.DataDir, c.Orchestrators = "n1", "z1", "/data/n1", []string{"o1:1", "o2:1"}
		c.Complete()
		return c
	}
	want := base().hash()
	for name, change := range map[string]func(*Config){
		"name": func(c *Config) { c.Name = "n2" }, "zone": func(c *Config) { c.Zone = "z2" }, "data_dir": func(c *Config) { c.DataDir = "/x" },
		"listen": func(c *Config) { c.Listen = "h:1" }, "advertise": func(c *Config) { c.Advertise = "h:1" },
		"gossip_listen": func(c *Config) { c.GossipListen = "h:1" }, "order": func(c *Config) { c.Orchestrators = []string{"o2:1", "o1:1"} },
	} {
		c := base()
		if change(&c); c.hash() != want {
			t.Errorf("%s is part of the hash", name)
		}
	}
	for name, change := range map[string]func(*Config){
		"cache_bytes": func(c *Config) { c.CacheBytes++ }, "record_cache_bytes": func(c *Config) { c.RecordCacheBytes++ }, "cpu_limit": func(c *Config) { c.CPULimit = 2 },
		"scrub_cycle": func(c *Config) { c.ScrubCycle *= 2 }, "orchestrators": func(c *Config) { c.Orchestrators = c.Orchestrators[:1] },
		"gossip_key": func(c *Config) { c.GossipKey = "MDEyMzQ1Njc4OWFiY2RlZg==" }, "tls": func(c *Config) { c.TLS.CA = "ca.pem" },
	} {
		c := base()
		if change(&c); c.hash() == want {
			t.Errorf("%s is no part of the hash", name)
		}
	}
	a, b := base(), base()
	a.GossipKey, b.GossipKey = "MDEyMzQ1Njc4OWFiY2RlZg==", "MDEyMzQ1Njc4OWFiY2RlZh=="
	if a.hash() != b.hash() {
		t.Error("a secret is part of the hash")
	}
}
