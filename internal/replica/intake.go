package replica

import (
	"sync"
	"time"
)

const (
	// defaultHintRate is how many bytes of hints an idle node takes in a second.
	defaultHintRate = 16 << 20
	// fullCalls is how many calls at once count as full load.
	fullCalls = 4096
	// senderAge is after how long a sender of hints gets no share any more, maxSenders
	// how many are told apart.
	senderAge  = 5 * time.Second
	maxSenders = 1024
)

// intake decides how many bytes of hints this node takes from whom. Each reply to
// hints grants its sender a credit for the next second: an equal share of what the
// load leaves of the rate, less as more was sent than granted.
type intake struct {
	rate float64 // bytes a second when idle
	mu   struct {
		sync.Mutex
		taken   uint64
		owed    float64 // bytes taken that the rate has not made up for
		at      time.Time
		senders map[string]time.Time
		granted uint64 // by the last reply
	}
}

func newIntake(rate int) *intake {
	if rate == 0 {
		rate = defaultHintRate
	}
	i := &intake{rate: float64(rate)}
	i.mu.senders = map[string]time.Time{}
	return i
}

// took notes hints from a sender and returns its credit. load is 0 for an idle node
// and 1 for one that must not be given more work.
func (i *intake) took(sender string, bytes int64, load float64, now time.Time) uint64 {
	i.mu.Lock()
	defer i.mu.Unlock()
	share := i.rate * (1 - min(max(load, 0), 1))
	i.mu.owed = max(0, i.mu.owed-share*now.Sub(i.mu.at).Seconds()) + float64(bytes)
	i.mu.at = now
	i.mu.taken += uint64(bytes)
	for s, at := range i.mu.senders {
		if now.Sub(at) > senderAge {
			delete(i.mu.senders, s)
		}
	}
	if len(i.mu.senders) < maxSenders {
		i.mu.senders[sender] = now
	}
	// As long as no more than a second's share is owed there is a full share to grant.
	i.mu.granted = uint64(min(share, max(0, 2*share-i.mu.owed)) / float64(len(i.mu.senders)))
	return i.mu.granted
}

// totals returns the bytes taken so far and the last credit granted.
func (i *intake) totals() (taken, granted uint64) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.mu.taken, i.mu.granted
}
