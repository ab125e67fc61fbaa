//go:build mutants

package mutant

import "os"

var on = os.Getenv("KVASIR_MUTANT")

// On reports whether a planted bug is to be shown.
func On(name string) bool { return name == on }
