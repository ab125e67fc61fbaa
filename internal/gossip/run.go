package gossip

import (
	"fmt"
	"net"
	"slices"
	"strconv"

	"github.com/hashicorp/memberlist"
)

// run is the library at work under one address. It takes an address for good, so another
// one takes another run; for the others that is as if the process had been restarted.
type run struct {
	list *memberlist.Memberlist
	// address is the host:port that the others are told.
	address string
}

// begin starts a run.
func (g *Gossip) begin(conf *memberlist.Config) error {
	conf.Transport = &transport{g.ports, g.stopping}
	conf.Events = g.table.anew()
	list, err := memberlist.Create(conf)
	if err != nil {
		return fmt.Errorf("gossip: %w", err)
	}
	g.run.Store(&run{list, list.LocalNode().Address()})
	g.conf = conf
	return nil
}

// follow begins anew where the name that is advertised stands for another address by
// now: a container that changes networks, or a host that is given another address. Until
// then the others would send to whoever has the old one.
func (g *Gossip) follow() {
	now := g.run.Load()
	addresses := g.advertised()
	if len(addresses) == 0 || slices.Contains(addresses, now.address) {
		return
	}
	g.cfg.Logger.Info("this process has another address, gossip begins anew", "was", now.address, "is", addresses[0])
	conf := *g.conf
	if host, port, err := net.SplitHostPort(addresses[0]); err == nil {
		conf.AdvertiseAddr = host
		conf.AdvertisePort, _ = strconv.Atoi(port)
	}
	_ = now.list.Shutdown() // its transport does not fail
	if err := g.begin(&conf); err != nil {
		g.cfg.Logger.Warn("gossip cannot begin anew, trying on", "error", err)
	}
}

// advertised returns the addresses that the process may be reached at by now, the one to
// tell others first; none where that is not known.
func (g *Gossip) advertised() []string {
	if g.cfg.Transport != nil {
		ip, port, err := g.cfg.Transport.FinalAdvertiseAddr("", 0)
		if err != nil {
			return nil
		}
		return []string{net.JoinHostPort(ip.String(), strconv.Itoa(port))}
	}
	host, _, err := net.SplitHostPort(g.cfg.Advertise)
	if err != nil || net.ParseIP(host) != nil {
		return nil
	}
	return g.resolve(net.JoinHostPort(host, strconv.Itoa(g.conf.AdvertisePort)))
}
