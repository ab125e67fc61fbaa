package topology

import "slices"

// Endpoints returns the nodes that writes to a vnode of a namespace go to, incoming and
// reporting ones included, in ascending order, and whether neither its slots nor the
// namespace's N or quorums are changing and no copy is being filled.
func (t *Topology) Endpoints(vnode uint32, ns *Namespace) (nodes []uint64, stable bool) {
	stable = ns.AlsoN == 0
	for i, s := range t.Slots(vnode, ns.Wide()) {
		stable = stable && t.Ring[vnode].Slots[i].Phase == Stable
		for _, w := range s.Write {
			if w != 0 && !slices.Contains(nodes, w) {
				nodes = append(nodes, w)
			}
		}
	}
	for _, c := range t.Copies(vnode, ns.ID) {
		stable = stable && c.State != Filling
		nodes = append(nodes, c.Node)
	}
	slices.Sort(nodes)
	return nodes, stable
}
