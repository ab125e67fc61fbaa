package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/kvasirdb/kvasir/internal/rpc"
)

// DefaultEndpoint is where a cluster is looked for when nothing says where it is.
const DefaultEndpoint = "127.0.0.1:7400"

// Context says how to reach one cluster.
type Context struct {
	// Endpoints are the host:port of nodes or orchestrators; one that answers is enough.
	Endpoints []string `yaml:"endpoints"`
	// TLS names the files to show and to trust; the zero value is plain text.
	TLS rpc.TLSFiles `yaml:"tls,omitempty"`
}

// Contexts is the content of the contexts file.
type Contexts struct {
	// Current names the context that is used when none is asked for; it may be empty.
	Current string             `yaml:"current"`
	ByName  map[string]Context `yaml:"contexts"`
}

func (a *App) contextsFile() string { return filepath.Join(a.ConfigDir, "contexts.yaml") }

// loadContexts reads the contexts file. One that does not exist is empty.
func (a *App) loadContexts() (*Contexts, error) {
	c := &Contexts{ByName: map[string]Context{}}
	if a.ConfigDir == "" {
		return c, nil
	}
	b, err := os.ReadFile(a.contextsFile())
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read contexts: %w", err)
	}
	dec := yaml.NewDecoder(bytes.NewReader(b))
	dec.KnownFields(true)
	if err := dec.Decode(c); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("contexts file %s: %w", a.contextsFile(), err)
	}
	if c.ByName == nil {
		c.ByName = map[string]Context{}
	}
	for name, x := range c.ByName {
		if err := x.check(); err != nil {
			return nil, fmt.Errorf("contexts file %s: context %s: %w", a.contextsFile(), name, err)
		}
	}
	return c, nil
}

// check returns an error unless a cluster can be looked for at the context.
func (c Context) check() error {
	if len(c.Endpoints) == 0 {
		return errors.New("no endpoints")
	}
	for _, e := range c.Endpoints {
		if err := rpc.CheckAddress(e, true); err != nil {
			return err
		}
	}
	return c.TLS.Check()
}

// storeContexts replaces the contexts file as a whole: a reader, or a crash, sees
// the old one or the new one.
func (a *App) storeContexts(c *Contexts) error {
	if a.ConfigDir == "" {
		return errors.New("write contexts: neither $XDG_CONFIG_HOME nor $HOME says where to keep them")
	}
	b, err := yaml.Marshal(c)
	if err != nil {
		return fmt.Errorf("write contexts: %w", err)
	}
	if err := os.MkdirAll(a.ConfigDir, 0o755); err != nil {
		return fmt.Errorf("write contexts: %w", err)
	}
	f, err := os.CreateTemp(a.ConfigDir, ".contexts-*")
	if err != nil {
		return fmt.Errorf("write contexts: %w", err)
	}
	defer os.Remove(f.Name()) // fails once it has been renamed
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), a.contextsFile())
	}
	if err != nil {
		return fmt.Errorf("write contexts: %w", err)
	}
	return nil
}

// saveContext adds or replaces a context and makes it the current one.
func (a *App) saveContext(name string, c Context) error {
	if err := c.check(); err != nil {
		return fmt.Errorf("context %s: %w", name, err)
	}
	all, err := a.loadContexts()
	if err != nil {
		return err
	}
	all.ByName[name] = c
	all.Current = name
	return a.storeContexts(all)
}

// removeContext forgets a context; one that does not exist is no error.
func (a *App) removeContext(name string) error {
	all, err := a.loadContexts()
	if err != nil {
		return err
	}
	delete(all.ByName, name)
	if all.Current == name {
		all.Current = ""
	}
	return a.storeContexts(all)
}

// names returns the names of the contexts in order.
func (c *Contexts) names() []string { return slices.Sorted(maps.Keys(c.ByName)) }

// resolve returns how to reach the cluster: --endpoints, then $KVCTL_ENDPOINTS, then
// the context of --context or the current one, then 127.0.0.1:7400. Endpoints that
// are given take the TLS files of --context, if that is given too.
func (a *App) resolve() (Context, error) {
	named, err := a.namedContext()
	if err != nil {
		return Context{}, err
	}
	for _, given := range []struct {
		what      string
		endpoints []string
	}{
		{"--endpoints", a.flags.endpoints},
		{"$KVCTL_ENDPOINTS", splitEndpoints(a.Getenv("KVCTL_ENDPOINTS"))},
	} {
		if len(given.endpoints) == 0 {
			continue
		}
		c := Context{Endpoints: given.endpoints}
		if a.flags.context != "" {
			c.TLS = named.TLS
		}
		if err := c.check(); err != nil {
			return Context{}, usagef("%s: %w", given.what, err)
		}
		return c, nil
	}
	if len(named.Endpoints) > 0 {
		return named, nil
	}
	return Context{Endpoints: []string{DefaultEndpoint}}, nil
}

// namedContext returns the context of --context, else the current one, else none.
func (a *App) namedContext() (Context, error) {
	if a.flags.context == "" && (len(a.flags.endpoints) > 0 || a.Getenv("KVCTL_ENDPOINTS") != "") {
		return Context{}, nil // a broken contexts file is then no concern
	}
	all, err := a.loadContexts()
	if err != nil {
		return Context{}, err
	}
	name := a.flags.context
	if name == "" {
		name = all.Current
	}
	if name == "" {
		return Context{}, nil
	}
	c, ok := all.ByName[name]
	switch {
	case ok:
		return c, nil
	case a.flags.context != "":
		return Context{}, usagef("--context: there is no context %q in %s: see `kvctl context ls`", name, a.contextsFile())
	}
	return Context{}, fmt.Errorf("the current context %q is not in %s: choose another with `kvctl context use`", name, a.contextsFile())
}

func splitEndpoints(s string) []string {
	var out []string
	for e := range strings.SplitSeq(s, ",") {
		if e = strings.TrimSpace(e); e != "" {
			out = append(out, e)
		}
	}
	return out
}
