package rows_test

import (
	"strings"
	"testing"

	"github.com/kvasirdb/kvasir/internal/cli/rows"
)

// BenchmarkSplit and BenchmarkJoin bound what an import and an export can reach.
func BenchmarkSplit(b *testing.B) {
	for _, c := range benchRows() {
		b.Run(c.layout.Format.String(), func(b *testing.B) {
			b.SetBytes(int64(len(c.row)))
			b.ReportAllocs()
			for b.Loop() {
				if _, _, err := c.layout.Split(c.row); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkJoin(b *testing.B) {
	for _, c := range benchRows() {
		key, value, err := c.layout.Split(c.row)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(c.layout.Format.String(), func(b *testing.B) {
			b.SetBytes(int64(len(c.row)))
			b.ReportAllocs()
			var dst []byte
			for b.Loop() {
				if dst, err = c.layout.Join(dst[:0], key, value); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

type benchRow struct {
	layout rows.Layout
	row    []byte
}

func benchRows() []benchRow {
	text := strings.Repeat("some words of text ", 10)
	return []benchRow{
		{tsv(1), []byte("package-name\t1.2.3-4\t" + text)},
		{csv(1), []byte("package-name,1.2.3-4,\"" + text + "\"")},
		{jsonl, []byte(`{"key":"package-name","value":"` + text + `"}`)},
	}
}
