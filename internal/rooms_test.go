package internal_test

import (
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/kvasirdb/kvasir"

// levels are the rooms from the bottom up. A room imports rooms of lower levels
// only, and of its own level only where siblings says so.
var levels = [][]string{
	{"hlc", "record", "ring", "topology", "placement", "capacity", "quorum", "report", "mutant"},
	{"storage", "rpc", "gossip", "consensus", "boottime"},
	{"replica", "coordinator", "handoff", "antientropy"},
	{"node", "orchestrator", "provision"},
	{"cli", "devcluster", "bench"},
}

// siblings are the imports allowed within a level.
var siblings = map[string][]string{
	"topology":     {"quorum", "ring", "capacity", "mutant"},
	"placement":    {"topology"},
	"record":       {"hlc", "mutant"},
	"quorum":       {"mutant"},
	"report":       {"record", "hlc"},
	"coordinator":  {"replica"},
	"orchestrator": {"provision"},
	"handoff":      {"replica"},
	"antientropy":  {"replica"},
	"cli":          {"devcluster", "bench"},
}

// unreachable are packages that a room must not reach, however indirectly.
var unreachable = map[string][]string{
	module + "/client":                {"github.com/cockroachdb/pebble/v2", "github.com/hashicorp/raft", "github.com/hashicorp/memberlist"},
	module + "/cmd/kvctl":             {"github.com/cockroachdb/pebble/v2", "github.com/hashicorp/raft", "github.com/hashicorp/memberlist"},
	module + "/internal/orchestrator": {module + "/internal/storage", module + "/internal/replica", module + "/internal/coordinator"},
	module + "/internal/node":         {"github.com/hashicorp/raft", module + "/internal/consensus"},
}

type pkg struct {
	ImportPath, Dir string
	GoFiles         []string
	Imports, Deps   []string
}

func packages(t *testing.T) []pkg {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Dir,GoFiles,Imports,Deps", module+"/...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []pkg
	for d := json.NewDecoder(strings.NewReader(string(out))); d.More(); {
		var p pkg
		if err := d.Decode(&p); err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	return all
}

// room returns the room of a package of ours below internal, or "".
func room(path string) string {
	rest, ok := strings.CutPrefix(path, module+"/internal/")
	if !ok {
		return ""
	}
	name, _, _ := strings.Cut(rest, "/")
	return name
}

func level(name string) int {
	return slices.IndexFunc(levels, func(rooms []string) bool { return slices.Contains(rooms, name) })
}

func TestImportsPointDownward(t *testing.T) {
	for _, p := range packages(t) {
		from := room(p.ImportPath)
		for _, imp := range p.Imports {
			to := room(imp)
			if to == "sim" && from != "sim" {
				t.Errorf("%s imports %s: the simulation is for tests only", p.ImportPath, imp)
			}
			if from == "" || to == "" || from == to || from == "sim" {
				continue
			}
			lf, lt := level(from), level(to)
			switch {
			case lf < 0 || lt < 0:
				t.Errorf("%s imports %s: a room that no level has", p.ImportPath, imp)
			case lt > lf, lt == lf && !slices.Contains(siblings[from], to):
				t.Errorf("%s imports %s: imports point downward", p.ImportPath, imp)
			}
		}
		if from == "topology" || level(from) == 0 {
			for _, imp := range p.Imports {
				if slices.Contains([]string{"os", "net", "io/fs", "log/slog", "context"}, imp) {
					t.Errorf("%s imports %s: a pure room does no I/O", p.ImportPath, imp)
				}
			}
		}
		for _, bad := range unreachable[p.ImportPath] {
			if slices.Contains(p.Deps, bad) {
				t.Errorf("%s reaches %s", p.ImportPath, bad)
			}
		}
	}
}

func TestRoomsHaveGoodNames(t *testing.T) {
	for _, p := range packages(t) {
		if base := filepath.Base(p.ImportPath); slices.Contains([]string{"util", "utils", "common", "helpers", "manager", "misc"}, base) {
			t.Errorf("%s: a room is named after one idea", p.ImportPath)
		}
	}
}

// Every package says what it is for, and pure rooms neither start goroutines nor
// read the clock.
func TestSources(t *testing.T) {
	for _, p := range packages(t) {
		if strings.HasPrefix(p.ImportPath, module+"/proto/") {
			continue // generated
		}
		documented := len(p.GoFiles) == 0
		for _, name := range p.GoFiles {
			fset := token.NewFileSet()
			f, err := parser.ParseFile(fset, filepath.Join(p.Dir, name), nil, parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			documented = documented || f.Doc != nil
			if level(room(p.ImportPath)) == 0 {
				checkPure(t, fset, f)
			}
		}
		if !documented {
			t.Errorf("%s has no package comment", p.ImportPath)
		}
	}
}

func checkPure(t *testing.T, fset *token.FileSet, f *ast.File) {
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.GoStmt:
			t.Errorf("%s: a pure room starts no goroutine", fset.Position(n.Pos()))
		case *ast.SelectorExpr:
			if x, ok := n.X.(*ast.Ident); ok && x.Name == "time" && slices.Contains([]string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "NewTimer", "NewTicker", "Tick"}, n.Sel.Name) {
				t.Errorf("%s: a pure room does not read the clock", fset.Position(n.Pos()))
			}
		}
		return true
	})
}
