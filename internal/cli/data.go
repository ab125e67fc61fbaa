package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/topology"
)

// dataFlags are those of commands that read and write records. Each command
// registers the ones that mean something to it.
type dataFlags struct {
	namespace string
	w, r      string
	repair    client.ReadRepair
	ttl       time.Duration
	trace     bool
	replica   string
	file      string
}

const quorumWords = `a count (2), a percent of N (40%), one, quorum or all`

func (f *dataFlags) addNamespace(cmd *cobra.Command) {
	cmd.Flags().VarP(nameFlag(&f.namespace, topology.DefaultNamespace), "namespace", "n", "namespace of the keys")
}

func (f *dataFlags) addWrite(cmd *cobra.Command) {
	cmd.Flags().VarP(quorumFlag(&f.w), "w", "w", "replicas that must have the write before it is acknowledged: "+quorumWords+" (default: the namespace's W)")
}

func (f *dataFlags) addRead(cmd *cobra.Command) {
	cmd.Flags().VarP(quorumFlag(&f.r), "r", "r", "replicas that must answer: "+quorumWords+" (default: the namespace's R)")
	cmd.Flags().Var(repairFlag(&f.repair), "read-repair", "what to do about stale replicas: blocking, async or off (default: the namespace's setting)")
}

func (f *dataFlags) addTrace(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.trace, "trace", false, "show the request's timeline, replica by replica, waiting at most 5s for late ones")
}

// options returns the call options that the flags ask for.
func (f *dataFlags) options() []client.CallOption {
	opts := []client.CallOption{client.Namespace(f.namespace)}
	if f.w != "" {
		opts = append(opts, client.W(f.w))
	}
	if f.r != "" {
		opts = append(opts, client.R(f.r))
	}
	if f.repair != 0 {
		opts = append(opts, client.Repair(f.repair))
	}
	if f.ttl > 0 {
		opts = append(opts, client.TTL(f.ttl))
	}
	if f.replica != "" {
		opts = append(opts, client.FromReplica(f.replica))
	}
	if f.trace {
		opts = append(opts, client.Traced())
	}
	return opts
}

func (a *App) putCommand() *cobra.Command {
	f := &dataFlags{}
	cmd := &cobra.Command{
		Use:   "put KEY [VALUE]",
		Short: "Store a value under a key",
		Long: `Stores a value under a key: VALUE, or the content of --file.

A key is 1 B to 4 KiB, a value 0 B to the cluster's limit (see kvctl config show).
Prints what the acknowledgement rests on: the version written, and how many of the
key's N replicas had it when the answer came; the others go on in the background.`,
		Example: `  kvctl put greeting hello
  kvctl put photo --file photo.jpg -w all
  kvctl put session token --ttl 30m
  kvctl put greeting hello -n wide -w 40% --trace`,
		RunE: func(cmd *cobra.Command, args []string) error {
			value, err := a.valueOf(args, f.file, cmd.Flags().Changed("file"))
			if err != nil {
				return err
			}
			return a.change(cmd.Context(), f, func(ctx context.Context, c *client.Client) (client.Receipt, error) {
				return c.Put(ctx, []byte(args[0]), value, f.options()...)
			})
		},
	}
	f.addNamespace(cmd)
	f.addWrite(cmd)
	f.addTrace(cmd)
	cmd.Flags().StringVarP(&f.file, "file", "f", "", "file that holds the value, - for stdin")
	cmd.Flags().Var(durationFlag(&f.ttl, 0, time.Millisecond), "ttl", "time to live, 1ms or more: 500ms, 30m, 12h, 7d (default: the namespace's TTL)")
	return cmd
}

// valueOf returns the value to put: the second argument or a file's content.
func (a *App) valueOf(args []string, file string, fromFile bool) ([]byte, error) {
	switch {
	case fromFile && len(args) > 1:
		return nil, usagef("VALUE and --file are both given: want one of them")
	case !fromFile && len(args) < 2:
		return nil, usagef("VALUE is missing: give it after KEY, or a file with --file")
	case !fromFile:
		return []byte(args[1]), nil
	}
	in := a.Stdin
	if file != "-" {
		opened, err := os.Open(file)
		if err != nil {
			return nil, usagef("--file: %w", err)
		}
		defer opened.Close()
		in = opened
	}
	value, err := io.ReadAll(io.LimitReader(in, topology.HardMaxValue+1))
	if err != nil {
		return nil, usagef("--file: %w", err)
	}
	if len(value) > topology.HardMaxValue {
		return nil, usagef("--file %s: the value is above %s, the most that any cluster takes", file, sizeText(topology.HardMaxValue))
	}
	return value, nil
}

func (a *App) delCommand() *cobra.Command {
	f := &dataFlags{}
	cmd := &cobra.Command{
		Use:     "del KEY",
		Aliases: []string{"delete", "rm"},
		Short:   "Delete a key",
		Long: `Deletes a key. Deleting one that does not exist succeeds too: a tombstone is
written to its replicas either way.`,
		Example: `  kvctl del greeting
  kvctl del greeting -w all --trace`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.change(cmd.Context(), f, func(ctx context.Context, c *client.Client) (client.Receipt, error) {
				return c.Delete(ctx, []byte(args[0]), f.options()...)
			})
		},
	}
	f.addNamespace(cmd)
	f.addWrite(cmd)
	f.addTrace(cmd)
	return cmd
}

// change makes a change and prints its receipt.
func (a *App) change(ctx context.Context, f *dataFlags, do func(context.Context, *client.Client) (client.Receipt, error)) error {
	c, err := a.openClient(ctx, a.flags.timeout)
	if err != nil {
		return err
	}
	defer c.Close()
	receipt, err := do(ctx, c)
	if err != nil {
		a.explain(ctx, c, err)
		return err
	}
	if !f.trace {
		return a.print(receiptDocOf(receipt), func(w io.Writer) { fmt.Fprintln(w, receiptLine(receipt)) })
	}
	if a.flags.output == outputTable {
		// The answer is shown before late replicas are waited for.
		if err := a.print(nil, func(w io.Writer) { fmt.Fprintln(w, receiptLine(receipt)) }); err != nil {
			return err
		}
	}
	t := a.timeline(ctx, c, receipt, opWrite)
	doc := struct {
		receiptDoc
		traceDoc
	}{receiptDocOf(receipt), t.doc()}
	return a.print(doc, t.write)
}

func (a *App) getCommand() *cobra.Command {
	f := &dataFlags{}
	cmd := &cobra.Command{
		Use:   "get KEY",
		Short: "Read the value of a key",
		Long: `Reads the value of a key and writes it to stdout as it is, with a newline only on a
terminal. With --trace, the timeline goes to stderr. Exit code 3 if there is none.

With --replica, one node's own copy is read, without quorum or repair: that shows what
a replica really has. A node is given by its name, or by its incarnation as #17.`,
		Example: `  kvctl get greeting
  kvctl get photo > photo.jpg
  kvctl get greeting -r all --read-repair blocking --trace
  kvctl get greeting --replica node2`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.replica != "" {
				for _, other := range []string{"r", "read-repair", "trace"} {
					if cmd.Flags().Changed(other) {
						return usagef("--replica and --%s are both given: one node's own copy is read without a quorum", other)
					}
				}
			}
			return a.get(cmd.Context(), f, []byte(args[0]))
		},
	}
	f.addNamespace(cmd)
	f.addRead(cmd)
	f.addTrace(cmd)
	cmd.Flags().StringVar(&f.replica, "replica", "", "node whose own copy is read: NAME or #INCARNATION")
	return cmd
}

func (a *App) get(ctx context.Context, f *dataFlags, key []byte) error {
	c, err := a.openClient(ctx, a.flags.timeout)
	if err != nil {
		return err
	}
	defer c.Close()
	v, err := c.Get(ctx, key, f.options()...)
	missing := errors.Is(err, client.ErrNotFound)
	if err != nil && !missing {
		a.explain(ctx, c, err)
		return err
	}
	if !missing && a.flags.output == outputTable {
		if err := a.writeValue(v.Value); err != nil {
			return err
		}
	}
	doc := valueDoc{keyDoc: keyDocOf(key), halfDoc: halfDocOf(v.Value), Version: v.Receipt.Version.String(), ExpiresAt: timeDoc(v.ExpiresAt), Receipt: receiptDocOf(v.Receipt)}
	if f.trace {
		t := a.timeline(ctx, c, v.Receipt, opRead)
		if a.flags.output == outputTable {
			t.write(a.Stderr) // stdout has the value
		}
		doc.traceDoc = t.doc()
	}
	if missing {
		what := "key"
		if f.replica != "" {
			what = "record on node " + f.replica + " of key"
		}
		return missingError{what, string(key), map[string]string{"namespace": f.namespace}}
	}
	if a.flags.output == outputTable {
		return nil
	}
	return a.print(doc, nil)
}

// writeValue writes a raw value.
func (a *App) writeValue(value []byte) error {
	_, err := a.Stdout.Write(value)
	if err == nil && a.Terminal {
		_, err = io.WriteString(a.Stdout, "\n")
	}
	if err != nil {
		return fmt.Errorf("write the value: %w", err)
	}
	return nil
}
