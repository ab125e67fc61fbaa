package devcluster

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// pollEvery is how often a change of a process is looked for.
const pollEvery = 25 * time.Millisecond

// readyReplyTimeout bounds one question to a process, readyReplyBytes its answer.
const (
	readyReplyTimeout = 2 * time.Second
	readyReplyBytes   = 512
)

// A StartError says that a process did not become ready.
type StartError struct {
	Name string
	// Exited tells a process that ended from one that runs and is not ready.
	Exited bool
	// Reason is how it ended, or what it answered last.
	Reason string
	// Log holds the last lines that it wrote, LogPath the rest.
	Log     []string
	LogPath string
}

// Error implements error. It is several lines long.
func (e *StartError) Error() string {
	what := "is not ready"
	if e.Exited {
		what = "ended before it was ready"
	}
	return fmt.Sprintf("%s %s: %s\n%s", e.Name, what, e.Reason, quoteLog(e.Log, e.LogPath))
}

// quoteLog formats the end of a log.
func quoteLog(lines []string, path string) string {
	return fmt.Sprintf("  | %s\n  (the end of %s)", strings.Join(lines, "\n  | "), path)
}

// removedPrefix begins the answer of a node that was removed from the cluster.
const removedPrefix = "removed: "

// WaitReady waits until every process of the names, all without names, says that it
// serves. It gives up with a StartError when one of them ends, or when one is not
// ready in time. A node that was removed from the cluster never is: it is told of, and
// not waited for.
func (c *Cluster) WaitReady(ctx context.Context, names ...string) error {
	st, err := loadState(c.dir)
	if err != nil {
		return err
	}
	all, err := st.pick(names)
	if err != nil {
		return err
	}
	waiting := slices.Clone(all)
	httpClient := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, Proxy: nil}, Timeout: readyReplyTimeout}
	deadline := time.NewTimer(c.opts.ReadyTimeout)
	defer deadline.Stop()
	tick := time.NewTicker(2 * pollEvery)
	defer tick.Stop()
	for {
		for _, p := range all {
			if p.state() == Stopped {
				return c.startError(p, true, c.howEnded(p.PID))
			}
		}
		reasons := askAll(ctx, httpClient, waiting)
		waiting = slices.DeleteFunc(waiting, func(p *process) bool {
			removed := strings.HasPrefix(reasons[p.Name], removedPrefix)
			if removed {
				c.noticef("%s was removed from the cluster and serves no more; let it join again, empty, with: kvctl dev start %s --wipe", p.Name, p.Name)
			}
			return removed || reasons[p.Name] == ""
		})
		if len(waiting) == 0 {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		case <-deadline.C:
			first := waiting[0]
			reason := fmt.Sprintf("after %s: %s", c.opts.ReadyTimeout, reasons[first.Name])
			if others := namesOf(waiting[1:]); len(others) > 0 {
				reason += fmt.Sprintf(" (nor are %s)", strings.Join(others, ", "))
			}
			return c.startError(first, false, reason)
		}
	}
}

func (c *Cluster) startError(p *process, exited bool, reason string) error {
	return &StartError{
		Name: p.Name, Exited: exited, Reason: reason,
		Log: tail(logPath(c.dir, p.Name), p.LogOffset), LogPath: logPath(c.dir, p.Name),
	}
}

// askAll asks processes at once whether they are ready, and returns why not, by name.
func askAll(ctx context.Context, httpClient *http.Client, processes []*process) map[string]string {
	var mu sync.Mutex
	var wg sync.WaitGroup
	reasons := map[string]string{}
	for _, p := range processes {
		wg.Go(func() {
			reason := ask(ctx, httpClient, p.adminAddr())
			mu.Lock()
			defer mu.Unlock()
			reasons[p.Name] = reason
		})
	}
	wg.Wait()
	return reasons
}

// ask returns why the process at an admin address is not ready, "" when it is.
func ask(ctx context.Context, httpClient *http.Client, adminAddr string) string {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+adminAddr+"/readyz", nil)
	if err != nil {
		return err.Error()
	}
	resp, err := httpClient.Do(req)
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		return ""
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, readyReplyBytes))
	if err != nil {
		return err.Error()
	}
	said := strings.TrimSpace(string(body))
	if strings.HasPrefix(said, removedPrefix) {
		return said
	}
	return fmt.Sprintf("/readyz says %q (HTTP %d)", said, resp.StatusCode)
}

func namesOf(processes []*process) []string {
	out := make([]string, len(processes))
	for i, p := range processes {
		out[i] = p.Name
	}
	return out
}
