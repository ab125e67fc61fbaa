package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
	topologyv1 "github.com/kvasirdb/kvasir/proto/kvasir/topology/v1"
)

// reports makes reports of all keys, one after the other, and judges what they hold.
type reports struct {
	client        *client.Client
	ledger        *ledger
	log           *journal
	made, refused int
}

// run makes reports until its context ends.
func (p *reports) run(ctx context.Context) {
	for ctx.Err() == nil {
		if p.one(ctx) != nil {
			time.Sleep(50 * time.Millisecond)
		}
	}
}

// one makes a report. What was acknowledged before it began must be in it, or what was
// written later.
func (p *reports) one(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	least := make([]client.Version, keyCount)
	for key := range least {
		least[key] = p.ledger.acknowledged(key)
	}
	found := make([]seen, keyCount)
	for rec, err := range p.client.ReportRows(ctx, client.Report{Prefix: []byte(keyPrefix)}, client.RowOptions{}) {
		if err != nil {
			p.refused++
			return err
		}
		key, err := strconv.Atoi(strings.TrimPrefix(string(rec.Key), keyPrefix))
		if err != nil || key >= keyCount {
			p.log.wrong("a report has the key %q, which nobody wrote", rec.Key)
			continue
		}
		found[key] = seen{true, rec.Value, rec.Version}
	}
	p.made++
	for key, s := range found {
		if wrong := p.ledger.judge(key, least[key], s); wrong != "" {
			p.log.wrong("report of %s: %s", keyName(key), wrong)
		}
	}
	return nil
}

// report has the cluster hold copies for reports, which no acknowledged write is to be
// missing from. Of a copy that does not answer, it goes on without, or writes fail.
func (w *world) report(ctx context.Context, block bool) error {
	policy, copies := topologyv1.ReportingPolicy_REPORTING_POLICY_DEGRADE, uint32(1)
	if block {
		policy = topologyv1.ReportingPolicy_REPORTING_POLICY_BLOCK
	}
	_, err := w.nodes[0].control.UpdateNamespace(ctx, &adminv1.UpdateNamespaceRequest{Name: topology.DefaultNamespace, Settings: &adminv1.NamespaceSettings{
		ReportingPolicy: &policy, ReportingCopies: &copies,
	}})
	return err
}

// inSync returns a copy for reports that is not in sync, or "".
func (w *world) inSync(ctx context.Context) string {
	c, err := w.nodes[0].control.GetClusterStatus(ctx, &adminv1.GetClusterStatusRequest{})
	if err != nil {
		return "no status of the cluster: " + err.Error()
	}
	for i, v := range c.GetTopology().GetRing() {
		if len(v.GetCopies()) != 1 || v.GetCopies()[0].GetState() != topologyv1.CopyState_COPY_STATE_IN_SYNC {
			return fmt.Sprintf("vnode %d has the copies %v", i, v.GetCopies())
		}
	}
	return ""
}

// ofInSync makes a fault of the reporting node one that hits copies in sync, and during which
// half the time writes fail that these do not have.
func ofInSync(hits func(*world, *rand.Rand) (string, func() error, error)) func(*world, *rand.Rand) (string, func() error, error) {
	return func(w *world, rng *rand.Rand) (string, func() error, error) {
		ctx := context.Background()
		if leader := w.leader(); leader != nil && until(ctx, 8*time.Second, w.inSync) != "" {
			// They stay out for long that have held writes up again and again; a new leader
			// knows nothing of that.
			if err := kill(leader); err != nil {
				return "", nil, err
			}
			if err := w.start(leader); err != nil {
				return "", nil, err
			}
			if why := until(ctx, healPatience, w.inSync); why != "" {
				return "", nil, fmt.Errorf("not in sync within %s: %s", healPatience, why)
			}
		}
		if rng.IntN(2) == 0 {
			return hits(w, rng)
		}
		if err := w.report(ctx, true); err != nil {
			return "", nil, err
		}
		what, heal, err := hits(w, rng)
		return what + ", which writes wait for", func() error {
			return errors.Join(heal(), w.report(ctx, false))
		}, err
	}
}

func killReporting(w *world, _ *rand.Rand) (string, func() error, error) {
	return w.reporting.name, func() error { return w.start(w.reporting) }, kill(w.reporting)
}

func pauseReporting(w *world, _ *rand.Rand) (string, func() error, error) {
	m := w.reporting
	return m.name, func() error { return m.signal(syscall.SIGCONT, false) }, m.signal(syscall.SIGSTOP, false)
}

// cutReporting cuts the reporting node off from all, from the orchestrators, without which
// it does not hear that it is left out, from the nodes, or from one of them; both ways or
// one.
func cutReporting(w *world, rng *rand.Rand) (string, func() error, error) {
	m, dir := w.reporting, rng.IntN(3)
	what, others := m.name+" from ", []*machine{one(rng, w.nodes)}
	switch rng.IntN(4) {
	case 0:
		return w.cutOffMachines(rng, dir != 1, dir != 2, m)
	case 1:
		what, others = what+"the orchestrators", w.orchestrators
	case 2:
		what, others = what+"the nodes", w.nodes
	default:
		what += others[0].name
	}
	var ends []end
	for _, o := range others {
		ends = append(ends, o.end())
	}
	var err error
	if dir != 1 {
		what += ", deaf"
		err = w.cuts.cut(ends, []end{m.end()})
	}
	if dir != 2 && err == nil {
		what += ", mute"
		err = w.cuts.cut([]end{m.end()}, ends)
	}
	return what, w.cuts.heal, err
}
