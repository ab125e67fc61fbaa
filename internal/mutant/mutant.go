//go:build !mutants

// Package mutant switches planted bugs, by which the simulation's checker is checked:
// a build with the tag mutants has the one that KVASIR_MUTANT names, any other build
// has none, and pays nothing for them. It says nothing of what the bugs are; each
// stands where it would have been made.
package mutant

// On reports whether a planted bug is to be shown.
func On(string) bool { return false }
