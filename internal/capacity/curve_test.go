package capacity_test

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvasirdb/kvasir/internal/capacity"
)

func TestParseCurve(t *testing.T) {
	want := capacity.Curve{{At: 0, Load: 100}, {At: 90 * time.Second, Load: 2500.5}}
	for _, in := range []string{
		"0,100\n90,2500.5\n",
		"seconds,load\n0,100\n90,2500.5",
		"\ufeffTime (s), Operations\r\n\r\n# a comment\r\n 0 , 100\r\n9e1,2500.5\r\n",
	} {
		if got, err := capacity.ParseCurve(strings.NewReader(in)); err != nil || !cmp.Equal(got, want) {
			t.Errorf("%q is %v, %v", in, got, err)
		}
	}
	for in, want := range map[string]string{
		"":                                   "0 points: a curve needs two at least",
		"0,1\n":                              "1 points: a curve needs two at least",
		"0,1\n1":                             `line 2: "1": want seconds,load`,
		"0,1\n1,2,3":                         "line 2: \"1,2,3\": want seconds,load",
		"0;1\n":                              "line 1: \"0;1\": want seconds,load",
		"a,b\nc,d\n0,1\n1,1":                 `line 2: seconds "c": want a number`,
		"\n0,1\n\nx,2":                       `line 4: seconds "x": want a number`,
		"0,1\n1,":                            `line 2: load "": want a number`,
		"0,x\n":                              `line 1: load "x": want a number`,
		"0,1\na,b\n":                         `line 2: seconds "a": want a number`,
		"0,1\n1,NaN":                         `line 2: load "NaN": want a number`,
		"0,1\n1,inf":                         `line 2: load "inf": want a number`,
		"0,1\n1,-2":                          "line 2: load -2: want a number from 0",
		"0,1\n1,1e300":                       "line 2: load 1e+300: want",
		"-1,1\n":                             "line 1: time -1 is negative",
		"5,1\n5,2":                           "line 2: time 5 s is not after 5 s, the one before: for a jump write two points a second apart",
		"5,1\n4,2":                           "line 2: time 4 s is not after 5 s",
		"0,1\n2678401,2":                     "line 2: time 2.678401e+06 s: a curve spans 31 days at most",
		"0,1\n1e30,2":                        "line 2: time 1e+30 s is too far away",
		"0," + strings.Repeat("1", 99):       "line 1: load",
		"0,1\n" + strings.Repeat("1", 1<<17): "line 2: bufio.Scanner: token too long",
	} {
		got, err := capacity.ParseCurve(strings.NewReader(in))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q is %v, %v, want %q", in, got, err, want)
		}
	}
}

func FuzzParseCurve(f *testing.F) {
	for _, s := range []string{"0,100\n90,2500.5\n", "seconds,load\n0,1\n1,2", "# x\n\n0,1\n1e-9,1", "0,1\n2678400,1e15", "1e-10,0\n2e-10,0", "-0,0\n1,-0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		c, err := capacity.ParseCurve(strings.NewReader(s))
		if err != nil {
			return
		}
		if err := c.Validate(); err != nil {
			t.Fatalf("%q is read, and refused: %v", s, err)
		}
		if c[len(c)-1].At-c[0].At > time.Hour {
			return // takes time
		}
		run, err := capacity.Simulate(capacity.Default(), c, capacity.DefaultOptions(100))
		if err != nil {
			t.Fatalf("%q: %v", s, err)
		}
		if got := run.Draw(80); strings.Contains(got, "NaN") || strings.Contains(got, "Inf") {
			t.Fatal(got)
		}
	})
}

func TestCurveAt(t *testing.T) {
	c := capacity.Curve{{At: 10 * time.Second, Load: 1}, {At: 20 * time.Second, Load: 3}, {At: 21 * time.Second, Load: 0}}.Scale(10)
	for at, want := range map[time.Duration]float64{0: 10, 10: 10, 15: 20, 20: 30, 21: 0, 100: 0} {
		if got := c.At(at * time.Second); math.Abs(got-want) > 1e-9 {
			t.Errorf("after %d s %v, want %v", at, got, want)
		}
	}
}

func TestNamed(t *testing.T) {
	for _, name := range capacity.Names() {
		c, err := capacity.Named(name)
		if err != nil {
			t.Fatal(err)
		}
		most := 0.0
		for _, p := range c {
			most = max(most, p.Load)
		}
		if err := c.Validate(); err != nil || most != 1 || c[0].At != 0 {
			t.Errorf("%s: %v, at most %v from %v on", name, err, most, c[0].At)
		}
	}
	if _, err := capacity.Named("moon"); err == nil || !strings.Contains(err.Error(), `there is no curve "moon": there are day, week, spike, step, ramp, sawtooth`) {
		t.Error(err)
	}
}
