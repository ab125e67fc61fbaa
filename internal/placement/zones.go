package placement

// Bounds is a share of slots, of a node or of a zone.
type Bounds struct{ Least, Most int }

// Share is what a node should have of the first N slots of all vnodes.
type Share struct {
	Bounds
	// Forced is set where the zones leave no choice: every vnode needs the node's zone
	// more often, or can use it less often, than its nodes would have it.
	Forced bool
}

// Shares returns what each zone's nodes should have of the first n slots of so many
// vnodes.
//
// In each vnode a zone can have level or level+1 of the slots, or all of its nodes
// where it has no more; what lies between is filled so that all nodes have the same.
func Shares(nodes []Node, vnodes, n int) map[string]Share {
	z := newZones(nodes)
	out := make(map[string]Share, len(z.names))
	for i, s := range z.shares(vnodes, n) {
		out[z.names[i]] = s
	}
	return out
}

// zones holds the nodes' zones by index.
type zones struct {
	names []string
	size  []int
	of    []int // by node
}

func newZones(nodes []Node) *zones {
	z := &zones{of: make([]int, len(nodes))}
	index := map[string]int{}
	for i, n := range nodes {
		at, ok := index[n.Zone]
		if !ok {
			at = len(z.names)
			index[n.Zone] = at
			z.names, z.size = append(z.names, n.Zone), append(z.size, 0)
		}
		z.of[i] = at
		z.size[at]++
	}
	return z
}

// bounds returns how many of a vnode's first n slots may lie in each zone.
func (z *zones) bounds(n int) []Bounds {
	level := 0
	for ; ; level++ {
		sum := 0
		for _, size := range z.size {
			sum += min(size, level+1)
		}
		if sum > n || level >= n {
			break
		}
	}
	out := make([]Bounds, len(z.size))
	for i, size := range z.size {
		out[i] = Bounds{min(size, level), min(size, level+1)}
	}
	return out
}

// shares returns what each zone's nodes should have of the first n slots of so many vnodes.
func (z *zones) shares(vnodes, n int) []Share {
	var least, most []int
	for _, b := range z.bounds(n) {
		least, most = append(least, vnodes*b.Least), append(most, vnodes*b.Most)
	}
	var out []Share
	for _, p := range z.divide(least, most, vnodes*n) {
		out = append(out, Share{Bounds{p.all / p.among, (p.all + p.among - 1) / p.among}, p.forced})
	}
	return out
}

// part is what some nodes have together.
type part struct {
	all, among int
	forced     bool
}

// divide fills zones like the items of a row: all take an equal part of the rest for each
// of their nodes; those that get too little or too much are set to their bound, the kind
// that is off by more in all first, and what then remains is divided again.
func (z *zones) divide(least, most []int, rest int) []part {
	out := make([]part, len(z.size))
	free := make([]bool, len(z.size))
	among := 0
	for i, size := range z.size {
		free[i] = true
		among += size
	}
	for among > 0 {
		// off sums by how much the parts lie below their bounds, times among.
		off := 0
		var low, high []int
		for i, size := range z.size {
			if !free[i] {
				continue
			}
			fair := size * rest
			if d := least[i]*among - fair; d > 0 {
				low, off = append(low, i), off+d
			}
			if d := fair - most[i]*among; d > 0 {
				high, off = append(high, i), off-d
			}
		}
		if len(low)+len(high) == 0 {
			break
		}
		set, bound := low, least
		if off < 0 || len(low) == 0 {
			set, bound = high, most
		}
		for _, i := range set {
			out[i] = part{bound[i], z.size[i], true}
			free[i] = false
			rest -= bound[i]
			among -= z.size[i]
		}
	}
	for i := range out {
		if free[i] {
			out[i] = part{rest, among, false}
		}
	}
	return out
}
