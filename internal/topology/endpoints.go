package topology

import "slices"

// Endpoints returns the nodes that writes to a vnode's first n slots go to, incoming
// ones included, in ascending order, and whether all those slots are stable.
func (t *Topology) Endpoints(vnode uint32, n int) (nodes []uint64, stable bool) {
	stable = true
	for i, s := range t.Slots(vnode, n) {
		stable = stable && t.Ring[vnode].Slots[i].Phase == Stable
		for _, w := range s.Write {
			if w != 0 && !slices.Contains(nodes, w) {
				nodes = append(nodes, w)
			}
		}
	}
	slices.Sort(nodes)
	return nodes, stable
}
