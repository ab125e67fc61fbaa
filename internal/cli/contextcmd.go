package cli

import (
	"io"
	"strings"

	"github.com/spf13/cobra"
)

// contextDoc is one context in a document.
type contextDoc struct {
	Name      string   `json:"name"`
	Current   bool     `json:"current"`
	Endpoints []string `json:"endpoints"`
	TLS       bool     `json:"tls"`
}

func (a *App) contextCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "context",
		Short: "Choose which cluster kvctl talks to",
		Long: `Chooses which cluster kvctl talks to. A context is a cluster's endpoints under a name;
kvctl dev writes one named dev. They are kept in contexts.yaml in kvctl's directory
under the user's configuration directory.`,
		Example: `  kvctl context ls
  kvctl context use dev`,
	}
	cmd.AddCommand(
		&cobra.Command{
			Use: "ls", Short: "List the contexts", Example: "  kvctl context ls -o json",
			RunE: func(*cobra.Command, []string) error { return a.listContexts() },
		},
		&cobra.Command{
			Use: "use NAME", Short: "Make a context the current one", Example: "  kvctl context use dev",
			RunE: func(_ *cobra.Command, args []string) error {
				all, err := a.contextsWith(args[0])
				if err != nil {
					return err
				}
				all.Current = args[0]
				return a.storeContexts(all)
			},
		},
		&cobra.Command{
			Use: "rm NAME", Short: "Forget a context; the cluster is left alone", Example: "  kvctl context rm old",
			RunE: func(_ *cobra.Command, args []string) error {
				if _, err := a.contextsWith(args[0]); err != nil {
					return err
				}
				return a.removeContext(args[0])
			},
		},
	)
	return cmd
}

// contextsWith returns the contexts if there is one of a name.
func (a *App) contextsWith(name string) (*Contexts, error) {
	all, err := a.loadContexts()
	if err != nil {
		return nil, err
	}
	if _, ok := all.ByName[name]; !ok {
		return nil, missingError{"context", name, map[string]string{"file": a.contextsFile()}}
	}
	return all, nil
}

func (a *App) listContexts() error {
	all, err := a.loadContexts()
	if err != nil {
		return err
	}
	docs := []contextDoc{}
	for _, name := range all.names() {
		c := all.ByName[name]
		docs = append(docs, contextDoc{name, name == all.Current, c.Endpoints, c.TLS.Cert != ""})
	}
	return a.print(docs, func(w io.Writer) {
		t := newTable("CURRENT", "NAME", "ENDPOINTS")
		for _, d := range docs {
			mark := ""
			if d.Current {
				mark = "*"
			}
			t.add(mark, d.Name, strings.Join(d.Endpoints, ", "))
		}
		t.write(w)
	})
}
