package cli

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// print writes a command's data: doc as one document with -o json and -o yaml, else
// what people writes.
func (a *App) print(doc any, people func(w io.Writer)) error {
	w := bufio.NewWriter(a.Stdout)
	var err error
	switch a.flags.output {
	case outputJSON:
		enc := json.NewEncoder(w)
		enc.SetEscapeHTML(false)
		enc.SetIndent("", "  ")
		err = enc.Encode(doc)
	case outputYAML:
		err = writeYAML(w, doc)
	default:
		people(w)
	}
	if err = errors.Join(err, w.Flush()); err != nil {
		return fmt.Errorf("write the answer: %w", err)
	}
	return nil
}

// warn writes a sentence for people to stderr.
func (a *App) warn(format string, args ...any) {
	fmt.Fprintf(a.Stderr, "kvctl: %s\n", fmt.Sprintf(format, args...))
}

// writeYAML writes a document with the names and the order that it has in JSON.
func writeYAML(w io.Writer, doc any) error {
	b, err := json.Marshal(doc)
	if err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	node, err := yamlNode(dec)
	if err != nil {
		return err
	}
	enc := yaml.NewEncoder(w)
	enc.SetIndent(2)
	return errors.Join(enc.Encode(node), enc.Close())
}

// yamlNode converts the next JSON value.
func yamlNode(dec *json.Decoder) (*yaml.Node, error) {
	t, err := dec.Token()
	if err != nil {
		return nil, err
	}
	switch t := t.(type) {
	case json.Delim:
		n := &yaml.Node{Kind: yaml.MappingNode, Tag: "!!map"}
		if t == '[' {
			n = &yaml.Node{Kind: yaml.SequenceNode, Tag: "!!seq"}
		}
		for dec.More() { // names and values of an object come in turn
			child, err := yamlNode(dec)
			if err != nil {
				return nil, err
			}
			n.Content = append(n.Content, child)
		}
		_, err := dec.Token() // the closing one
		return n, err
	case string:
		n := &yaml.Node{}
		n.SetString(t)
		return n, nil
	case json.Number:
		tag := "!!int"
		if strings.ContainsAny(t.String(), ".eE") {
			tag = "!!float"
		}
		return &yaml.Node{Kind: yaml.ScalarNode, Tag: tag, Value: t.String()}, nil
	case bool:
		return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!bool", Value: fmt.Sprint(t)}, nil
	}
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!null", Value: "null"}, nil
}

// table lays out rows in columns as wide as they must be.
type table struct {
	header []string
	right  []bool
	rows   [][]string
}

// newTable takes the columns' titles; one that begins with > is aligned right.
func newTable(titles ...string) *table {
	t := &table{}
	for _, title := range titles {
		name, right := strings.CutPrefix(title, ">")
		t.header = append(t.header, name)
		t.right = append(t.right, right)
	}
	return t
}

func (t *table) add(cells ...any) {
	row := make([]string, len(cells))
	for i, c := range cells {
		row[i] = fmt.Sprint(c)
	}
	t.rows = append(t.rows, row)
}

func (t *table) write(w io.Writer) {
	widths := make([]int, len(t.header))
	all := append([][]string{t.header}, t.rows...)
	for _, row := range all {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	for _, row := range all {
		var line strings.Builder
		for i, cell := range row {
			if i > 0 {
				line.WriteString("  ")
			}
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if t.right[i] {
				line.WriteString(pad + cell)
			} else {
				line.WriteString(cell + pad)
			}
		}
		if s := strings.TrimRight(line.String(), " "); s != "" {
			fmt.Fprintln(w, s)
		}
	}
}

// fields writes names and values below each other.
func fields(w io.Writer, pairs ...string) {
	width := 0
	for i := 0; i < len(pairs); i += 2 {
		width = max(width, utf8.RuneCountInString(pairs[i]))
	}
	for i := 0; i+1 < len(pairs); i += 2 {
		fmt.Fprintln(w, strings.TrimRight(fmt.Sprintf("%-*s  %s", width, pairs[i], pairs[i+1]), " "))
	}
}

// blob is bytes in a document: as text, or in base64 when they are not UTF-8.
type blob []byte

func (b blob) text() *string {
	if !utf8.Valid(b) {
		return nil
	}
	s := string(b)
	return &s
}

func (b blob) base64() *string {
	if utf8.Valid(b) {
		return nil
	}
	s := base64.StdEncoding.EncodeToString(b)
	return &s
}
