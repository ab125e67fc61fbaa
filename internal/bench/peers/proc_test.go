package main

import (
	"os"
	"strings"
	"testing"
	"time"
)

func TestParseStat(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"17 (etcd) S 1 17 17 0 -1 4194560 9 0 0 0 250 31 7 8 20 0 9 0 5 6": 2810 * time.Millisecond,
		"17 (a) S (b)) S 1 17 17 0 -1 4194560 9 0 0 0 1 2 7 8 20 0 9 0 5":  30 * time.Millisecond,
	} {
		if got, err := parseStat(text); got != want || err != nil {
			t.Errorf("parseStat(%q) = %v, %v, want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "17 (etcd) S 1 2", "17 (etcd) S 1 17 17 0 -1 4194560 9 0 0 0 x 31 7"} {
		if got, err := parseStat(text); err == nil {
			t.Errorf("parseStat(%q) = %v, want an error", text, got)
		}
	}
}

func TestParseResident(t *testing.T) {
	if got, err := parseResident("Name:\tetcd\nVmHWM:\t  9000 kB\nVmRSS:\t    2048 kB\nThreads:\t9\n"); got != 2<<20 || err != nil {
		t.Errorf("%d, %v", got, err)
	}
	if got, err := parseResident("Name:\tetcd\nState:\tZ (zombie)\n"); err == nil {
		t.Errorf("%d for a zombie, want an error", got)
	}
}

func TestParseFlushes(t *testing.T) {
	const text = `   7       0 loop0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0
 254       0 vda 57380 8846 2422826 83667 57834 117696 13616664 98965 0 44920 197518 17587 0 6702192 10006 9297 4879
 254      16 vdb 1 2 3 4 5 6 7 8 9 10 11
`
	if got, err := parseFlushes(text, "vda"); got != 9297 || err != nil {
		t.Errorf("%d, %v", got, err)
	}
	for _, name := range []string{"vdb", "vd", "sda"} {
		if got, err := parseFlushes(text, name); err == nil {
			t.Errorf("%d for %s, want an error", got, name)
		}
	}
}

func TestParseCPU(t *testing.T) {
	if idle, total, err := parseCPU("cpu  10 20 30 400 50 6 7 8 900 1000\ncpu0 1 2 3\n"); idle != 450 || total != 531 || err != nil {
		t.Errorf("%d of %d, %v", idle, total, err)
	}
	for _, text := range []string{"", "cpu0 1 2 3 4 5 6 7 8", "cpu 1 2 3 4 5 6 x 8"} {
		if _, _, err := parseCPU(text); err == nil {
			t.Errorf("no error for %q", text)
		}
	}
}

func TestOfThisProcess(t *testing.T) {
	me := []server{{name: "me", pid: os.Getpid(), replica: true}, {name: "again", pid: os.Getpid()}}
	before, err := cpuTime(me)
	if err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); time.Since(start) < 100*time.Millisecond; { // burn some
	}
	after, err := cpuTime(me)
	if err != nil || after <= before {
		t.Errorf("CPU time %v, then %v, %v", before, after, err)
	}
	m, err := memoryOf(me)
	if err != nil || m.Replica < 1<<20 || m.Replica != m.Each["me"] || m.Total <= m.Replica {
		t.Errorf("memory %+v, %v", m, err)
	}
	if _, err := memoryOf([]server{{name: "nobody", pid: 1 << 30}}); err == nil || !strings.Contains(err.Error(), "nobody") {
		t.Errorf("error = %v, want one about nobody", err)
	}
}

func TestDataInMemoryAreRefused(t *testing.T) {
	if _, err := diskOf("/proc"); err == nil || !strings.Contains(err.Error(), "no disk") {
		t.Errorf("error = %v", err)
	}
}
