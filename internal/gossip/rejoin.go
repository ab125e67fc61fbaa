package gossip

import (
	"context"
	"math/rand/v2"
	"net"
	"slices"
	"time"
)

// How many seeds are contacted in one round, one after the other: by a process that
// sees no other, and by one that does. The latter looks for members that were cut
// off so long that both sides forgot each other.
const (
	seedsAlone   = 16
	seedsInGroup = 3
)

// resolveTimeout bounds the lookup of a seed's name.
const resolveTimeout = 2 * time.Second

// rejoin contacts seeds that are not known to be alive, until the loops end.
func (g *Gossip) rejoin() {
	warned := false
	for {
		g.follow()
		alone, reached := g.contactSeeds()
		if failed := alone && !reached; failed != warned {
			warned = failed
			if failed {
				g.cfg.Logger.Warn("no other member is known and no seed answers, trying on")
			}
		}
		// Processes that were started together spread out.
		pause := g.cfg.RejoinInterval/2 + rand.N(g.cfg.RejoinInterval)
		select {
		case <-g.stopping.Done():
			return
		case <-time.After(pause):
		}
	}
}

// contactSeeds tells whether this process saw no other, and whether it reached a
// seed or had none to reach.
func (g *Gossip) contactSeeds() (alone, reached bool) {
	known := map[string]bool{}
	for _, m := range g.table.list() {
		// Its own entry keeps a process from joining itself.
		if m.Alive {
			known[m.Address] = true
		}
	}
	alone = len(known) <= 1
	limit := seedsInGroup
	if alone {
		limit = seedsAlone
	}
	seeds := slices.Clone(g.cfg.Seeds())
	rand.Shuffle(len(seeds), func(i, j int) { seeds[i], seeds[j] = seeds[j], seeds[i] })
	reached = true
	for _, seed := range seeds {
		for _, addr := range g.resolve(seed) {
			if known[addr] {
				continue
			}
			if limit == 0 || g.stopping.Err() != nil {
				return alone, reached
			}
			limit--
			// Who answers tells of all the others.
			if _, err := g.run.Load().list.Join([]string{addr}); err == nil {
				return alone, true
			}
			reached = false
		}
	}
	return alone, reached
}

// resolve returns the addresses of a seed as members are known by. The library
// would resolve names itself, but asks name servers for more than addresses.
func (g *Gossip) resolve(seed string) []string {
	host, port, err := net.SplitHostPort(seed)
	if err != nil {
		g.cfg.Logger.Debug("bad seed", "seed", seed, "error", err)
		return nil
	}
	if ip := net.ParseIP(host); ip != nil {
		return []string{net.JoinHostPort(ip.String(), port)}
	}
	ctx, cancel := context.WithTimeout(g.stopping, resolveTimeout)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupHost(ctx, host)
	if err != nil {
		g.cfg.Logger.Debug("seed cannot be resolved", "seed", seed, "error", err)
		return nil
	}
	for i, a := range addrs {
		addrs[i] = net.JoinHostPort(a, port)
	}
	return addrs
}
