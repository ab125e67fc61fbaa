package quorum

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvasirdb/kvasir/internal/bench"
)

// sample returns results of three rounds, of which the second is the median.
func sample() *results {
	rs := &results{}
	for _, factor := range []int64{9, 2, 1} {
		add := func(in *part, row string, us int64) {
			for _, s := range in.series {
				for _, l := range loads {
					rs.add(in, row, s, l, bench.Latency{Count: 100, P50: factor * us, P99: 5 * factor * us}).Mended += 10
				}
			}
		}
		for _, in := range []*part{farNear, farAny, noneFar} {
			for i, s := range settings {
				add(in, s.name, int64(1000*(i+1)))
			}
		}
		for _, row := range []string{"0%", "1%", "10%"} {
			add(staleGets, row, 700)
		}
	}
	return rs
}

func TestReport(t *testing.T) {
	var b strings.Builder
	sample().report(&b)
	for _, want := range []string{
		"| 40%: W=R=2 | 1 caller | 2.00 | 10.0 | 2.00 | 10.0 |\n",
		"| get | 1 caller | 3.0 | 3.0 | ≥ 3 |\n",
		"| | callers | off p50 | p99 | asynchronous p50 | p99 | blocking p50 | p99 |\n|---|---|---|---|---|---|---|---|\n",
		"| 10% | 32 callers, 200/s | 1.40 | 7.00 | 1.40 | 7.00 | 1.40 | 7.00 |\n",
		"Of the gets with blocking repair 10.0% (0% stale), 10.0% (1% stale), 10.0% (10% stale) mended some.\n",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
}

func TestPictures(t *testing.T) {
	dir := t.TempDir()
	if err := sample().draw(dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{farPicture, settingsPicture, stalePicture} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		for d := xml.NewDecoder(strings.NewReader(string(b))); err == nil; {
			_, err = d.Token()
		}
		if !errors.Is(err, io.EOF) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNiceStep(t *testing.T) {
	for least, want := range map[float64]float64{0: 1, 0.3: 0.5, 1: 1, 1.1: 2, 4.7: 5, 5.1: 10, 60: 100} {
		if got := niceStep(least); got != want {
			t.Errorf("step of at least %g: %g, want %g", least, got, want)
		}
	}
}
