package capacity

import "slices"

// launchZones returns where to launch nodes: each in the zone that has fewest then, the first by name
// among several. A zone whose only nodes leave is still one. Without zones they are "".
func launchZones(o *Observation, n int) []string {
	have := map[string]int{}
	for _, node := range o.Nodes {
		have[node.Zone] += 0
		if !node.Leaving {
			have[node.Zone]++
		}
	}
	for _, zone := range o.Launching {
		have[zone]++
	}
	names := []string{}
	for zone := range have {
		names = append(names, zone)
	}
	slices.Sort(names)
	out := make([]string, n)
	if len(names) == 0 {
		return out
	}
	for i := range out {
		out[i] = slices.MinFunc(names, func(a, b string) int { return have[a] - have[b] })
		have[out[i]]++
	}
	return out
}

// leavers returns the nodes to drain: each from the zone that has most then, so that zones stay
// as even as they can be; of those one without slots first, then the newest.
func leavers(o *Observation, n int) []uint64 {
	zones := map[string][]*Node{}
	names := []string{}
	for i := range o.Nodes {
		node := &o.Nodes[i]
		if node.Leaving {
			continue
		}
		if zones[node.Zone] == nil {
			names = append(names, node.Zone)
		}
		zones[node.Zone] = append(zones[node.Zone], node)
	}
	slices.Sort(names)
	for _, of := range zones {
		slices.SortFunc(of, func(a, b *Node) int {
			if a.Member != b.Member {
				if b.Member {
					return -1
				}
				return 1
			}
			if a.Incarnation > b.Incarnation {
				return -1
			}
			return 1
		})
	}
	var out []uint64
	for range n {
		zone := slices.MaxFunc(names, func(a, b string) int { return len(zones[a]) - len(zones[b]) })
		out = append(out, zones[zone][0].Incarnation)
		zones[zone] = zones[zone][1:]
	}
	return out
}
