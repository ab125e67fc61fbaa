// Package ring is the arithmetic of the consistent-hash ring: from a key to its
// token, from a token to its vnode. It knows nothing of nodes; which node holds a
// vnode is the topology's to say.
package ring

import (
	"fmt"
	"math/bits"

	"github.com/cespare/xxhash/v2"
)

// Bounds of Q, the number of vnodes of a cluster.
const (
	DefaultVnodes = 256
	MaxVnodes     = 65536
)

// Token is a key's place on the ring.
type Token uint64

// TokenOf hashes a key with XXH64, seed 0. The function is frozen: every record
// on every disk lies where it put it.
func TokenOf(key []byte) Token { return Token(xxhash.Sum64(key)) }

// CheckVnodes returns an error unless q is a power of two between 1 and MaxVnodes.
func CheckVnodes(q uint32) error {
	if q == 0 || q > MaxVnodes || q&(q-1) != 0 {
		return fmt.Errorf("vnodes is %d: want a power of two between 1 and %d", q, MaxVnodes)
	}
	return nil
}

// VnodeOf returns which of q equal slices of the ring holds a token.
// REQUIRES: CheckVnodes(q) == nil.
func VnodeOf(t Token, q uint32) uint32 {
	return uint32(uint64(t) >> (64 - bits.TrailingZeros32(q)))
}

// Range returns the first and the last token of a vnode.
// REQUIRES: CheckVnodes(q) == nil and vnode < q.
func Range(vnode, q uint32) (first, last Token) {
	shift := 64 - bits.TrailingZeros32(q)
	first = Token(uint64(vnode) << shift)
	return first, first | Token(^uint64(0)>>(64-shift))
}
