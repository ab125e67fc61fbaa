package chaos

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/topology"
	adminv1 "github.com/kvasirdb/kvasir/proto/kvasir/admin/v1"
)

// Times of a run.
const (
	formPatience   = 60 * time.Second
	healPatience   = 40 * time.Second
	settlePatience = 3 * time.Minute
	// syncPatience is more than a copy stays out that has held writes up again and again.
	syncPatience = 6 * time.Minute
	leastFault   = 1500 * time.Millisecond
	mostFault    = 4 * time.Second
	// afterFault is for how long operations still count for the fault.
	afterFault = time.Second
	calm       = 2 * time.Second
)

// leastAvailable is the least share of operations, in percent, that must succeed
// during faults of a kind that leave a majority of every vnode's replicas.
const leastAvailable = 80

// run is one run.
type run struct {
	plan   plan
	log    *journal
	world  *world
	ledger *ledger
	client *client.Client

	reports *reports
}

// all does everything.
func (r *run) all(dir string) (err error) {
	ctx := context.Background()
	if err := isolate(); err != nil {
		return err
	}
	if r.world, err = build(dir, r.log); err != nil {
		return err
	}
	if err := r.world.startAll(r.world.machines()...); err != nil {
		return err
	}
	if why := until(ctx, formPatience, r.world.whole); why != "" {
		return fmt.Errorf("the cluster has not formed: %s", why)
	}
	var endpoints []string
	for _, m := range r.world.nodes {
		endpoints = append(endpoints, m.address())
	}
	if r.client, err = client.New(ctx, endpoints); err != nil {
		return err
	}
	defer r.client.Close()
	if err := r.world.report(ctx, false); err != nil {
		return err
	}
	r.ledger = newLedger(callers, keyCount)
	r.reports = &reports{client: r.client, ledger: r.ledger, log: r.log}
	r.log.say("%d nodes in %d zones, a reporting node, %d orchestrators, %d callers on %d keys; seed %d", nodeCount, zoneCount, orchestratorCount, callers, keyCount, r.plan.seed)
	loading, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { (&load{r.client, r.ledger, r.log}).run(loading, r.plan.seed) })
	wg.Go(func() { r.reports.run(loading) })
	err = r.faults(ctx)
	stop()
	wg.Wait()
	r.log.enter("settling")
	r.report()
	if err != nil {
		return err
	}
	return r.check(ctx)
}

// faults runs the schedule: rounds of all faults, each round in an order of its own.
func (r *run) faults(ctx context.Context) error {
	rng := rand.New(rand.NewPCG(r.plan.seed, 1))
	began := time.Now()
	r.calm()
	for round := 0; round < r.plan.rounds || time.Since(began) < r.plan.length; round++ {
		for _, i := range rng.Perm(len(r.plan.kinds)) {
			lasts := leastFault + time.Duration(rng.Int64N(int64(mostFault-leastFault)))
			// A stream of its own, so that what a fault draws shifts no later one.
			own := rand.New(rand.NewPCG(r.plan.seed, rng.Uint64()))
			if err := r.fault(ctx, r.plan.kinds[i], lasts, own); err != nil {
				return fmt.Errorf("%s: %w", r.plan.kinds[i].name, err)
			}
			r.calm()
		}
	}
	return nil
}

func (r *run) calm() {
	r.log.enter("calm")
	time.Sleep(calm)
}

// fault does one fault and waits until the cluster is whole again.
func (r *run) fault(ctx context.Context, k kind, lasts time.Duration, rng *rand.Rand) error {
	w := r.log.enter(k.name)
	what, heal, err := k.hits(r.world, rng)
	if err != nil {
		return err
	}
	time.Sleep(lasts)
	if err := heal(); err != nil {
		return err
	}
	healed := time.Now()
	time.Sleep(afterFault)
	r.log.enter("healing")
	why := until(ctx, k.heals, r.world.whole)
	r.log.say("%-9s %s, %.1f s, whole again after %.1f s: %s", k.name, what, lasts.Seconds(), time.Since(healed).Seconds(), w.line())
	if k.minority {
		for _, s := range w.sample() {
			r.log.say("          e.g. %s", s)
		}
	}
	if why != "" && k.losesData {
		// Another one might take the last copy of what was acknowledged.
		return fmt.Errorf("not whole again within %s: %s", k.heals, why)
	}
	if why != "" {
		r.log.wrong("%s: not whole again within %s: %s", k.name, k.heals, why)
		// What has ended by itself starts again, so that the run can go on.
		for _, m := range r.world.machines() {
			if !m.isRunning() {
				if err := r.world.start(m); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// report prints the figures and judges availability.
func (r *run) report() {
	r.log.table()
	w := r.ledger.totals()
	r.log.say("writes: %d acknowledged, %d with unknown outcome, %d refused", w[acked], w[maybe], w[refused])
	r.log.say("reports: %d were made, %d refused", r.reports.made, r.reports.refused)
	if r.reports.made < r.plan.rounds {
		r.log.wrong("only %d reports were made", r.reports.made)
	}
	_, sums, times := r.log.sums()
	for _, k := range r.plan.kinds {
		if times[k.name] < r.plan.rounds {
			r.log.wrong("%s happened %d times, not %d", k.name, times[k.name], r.plan.rounds)
		}
		if s := sums[k.name]; k.minority && s != nil {
			failures := 0
			for _, n := range s.mu.failed {
				failures += n
			}
			if p := percent(s.mu.ok, failures); p < leastAvailable {
				r.log.wrong("during %s only %.2f%% of operations succeeded", k.name, p)
			}
		}
	}
}

// check waits until the cluster has settled, reads everything, stops it and compares
// the copies.
func (r *run) check(ctx context.Context) error {
	if why := until(ctx, settlePatience, r.world.whole); why != "" {
		return fmt.Errorf("not whole at the end: %s", why)
	}
	if why := until(ctx, settlePatience, r.noHints); why != "" {
		return fmt.Errorf("hints are left: %s", why)
	}
	r.log.say("no hint is left")
	repaired, err := r.repaired(ctx)
	if err != nil {
		return err
	}
	// With repair by the cluster itself, reads must not lend a hand.
	how := client.RepairOff
	if !repaired {
		r.log.say("these nodes do not repair by themselves: reads do it")
		how = client.RepairBlocking
	}
	if err := r.readAll(ctx, how); err != nil {
		return err
	}
	if why := until(ctx, syncPatience, r.world.inSync); why != "" {
		return fmt.Errorf("not in sync at the end: %s", why)
	}
	if err := r.reports.one(ctx); err != nil {
		return fmt.Errorf("no report at the end: %w", err)
	}
	c, err := r.world.nodes[0].control.GetClusterStatus(ctx, &adminv1.GetClusterStatusRequest{})
	if err != nil {
		return err
	}
	t, err := topology.FromProto(c.GetTopology())
	if err != nil {
		return err
	}
	if err := stopAll(append(slices.Clone(r.world.nodes), r.world.reporting)...); err != nil {
		r.log.wrong("%v", err)
	}
	if err := stopAll(r.world.orchestrators...); err != nil {
		r.log.wrong("%v", err)
	}
	return r.compareAll(t)
}

// readAll reads every key from all replicas and judges what it finds.
func (r *run) readAll(ctx context.Context, how client.ReadRepair) error {
	var wg sync.WaitGroup
	var unread sync.Map
	for i := range callers {
		wg.Go(func() {
			for key := i; key < keyCount; key += callers {
				ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
				floor := r.ledger.floor(key)
				s, err := get(ctx, r.client, key, client.R("all"), client.Repair(how))
				cancel()
				if err != nil {
					unread.Store(key, err)
				} else if wrong := r.ledger.read(key, floor, s); wrong != "" {
					r.log.wrong("at the end: get %s: %s", keyName(key), wrong)
				}
			}
		})
	}
	wg.Wait()
	n := 0
	unread.Range(func(key, err any) bool {
		n++
		r.log.wrong("at the end: get %s from all: %v", keyName(key.(int)), err)
		return true
	})
	r.log.say("%d keys read from all replicas, %d could not be", keyCount-n, n)
	return nil
}

// noHints returns who still keeps hints.
func (r *run) noHints(ctx context.Context) string {
	for _, m := range r.world.nodes {
		s, err := m.nodeStatus(ctx)
		if err != nil {
			return m.name + ": " + rpc.AsError(err).Message
		}
		for _, h := range s.GetHints() {
			if h.GetCount() > 0 {
				return fmt.Sprintf("%s keeps %d for #%d", m.name, h.GetCount(), h.GetTarget())
			}
		}
	}
	return ""
}

// repaired waits until every node has been through two rounds of repair that began
// when there were no hints any more. It returns false when nodes have none.
func (r *run) repaired(ctx context.Context) (bool, error) {
	before, mended := map[*machine]uint64{}, uint64(0)
	for _, m := range r.world.nodes {
		s, err := m.repair.GetRepairStatus(ctx, &adminv1.GetRepairStatusRequest{})
		if err != nil && rpc.AsError(err).Code == codes.Unimplemented {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		before[m] = s.GetRounds()
		if _, err := m.repair.StartRepair(ctx, &adminv1.StartRepairRequest{}); err != nil {
			return false, err
		}
	}
	began := time.Now()
	why := until(ctx, settlePatience, func(ctx context.Context) string {
		mended = 0
		for _, m := range r.world.nodes {
			s, err := m.repair.GetRepairStatus(ctx, &adminv1.GetRepairStatusRequest{})
			if err != nil {
				return m.name + ": " + rpc.AsError(err).Message
			}
			mended += s.GetRecordsReceived() + s.GetRecordsSent()
			if s.GetRounds() < before[m]+2 {
				return fmt.Sprintf("%s has made %d rounds since", m.name, s.GetRounds()-before[m])
			}
		}
		return ""
	})
	if why != "" {
		return true, fmt.Errorf("repair has not been through: %s", why)
	}
	r.log.say("all nodes have been through two rounds of repair in %.1f s; since they started, repair moved %d records", time.Since(began).Seconds(), mended)
	return true, nil
}
