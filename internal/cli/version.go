package cli

import (
	"fmt"
	"io"
	"runtime"

	"github.com/spf13/cobra"
)

func (a *App) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Show the version of kvctl",
		Long:    "Shows the version of kvctl. Those of the cluster's processes are in kvctl cluster status.",
		Example: "  kvctl version -o json",
		RunE: func(*cobra.Command, []string) error {
			doc := struct {
				Software string `json:"software"`
				Go       string `json:"go"`
				Platform string `json:"platform"`
			}{a.Software, runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH}
			return a.print(doc, func(w io.Writer) { fmt.Fprintf(w, "kvctl %s (%s, %s)\n", doc.Software, doc.Go, doc.Platform) })
		},
	}
}
