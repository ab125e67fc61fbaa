// Package provision launches and ends nodes for the orchestrators.
package provision

// Node is what is to be launched, or ended.
type Node struct {
	// Name is unique in the cluster's life.
	Name string
	Zone string
	// Incarnation is that of a node that is ended; 0 when it never registered.
	Incarnation uint64
}
