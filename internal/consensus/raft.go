package consensus

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
)

// maxCalls bounds the calls of Propose, Barrier and VerifyLeader under way; further
// ones wait for their turn. It is the length of the library's queue of
// verifications, which may then never block its main goroutine.
const maxCalls = 64

// maxConns is how many idle connections to each server are kept.
const maxConns = 3

// Raft is this process's server. Its methods are safe for concurrent use.
type Raft struct {
	raft      *raft.Raft
	transport *transport
	group     string
	streams   *streams
	store     *store
	logger    *raftLogger
	// calls holds a token of each call under way.
	calls chan struct{}
	// stopping tells calls to give up, closed that Close is through. closeErr is
	// written before closed is.
	stopping chan struct{}
	closing  atomic.Bool
	closed   chan struct{}
	closeErr error
}

// Status is a moment of a server.
type Status struct {
	// State is follower, candidate, leader or closed.
	State string
	// Leader is the name of the server that leads; empty when it is not known.
	Leader string
	Term   uint64
	// Committed is the index of the last entry known to be agreed on, Applied that of
	// the last one handed to the state machine.
	Committed, Applied uint64
	// LastContact is when the leader was last heard of: now on the leader itself, the
	// zero time on a server that never heard of one.
	LastContact time.Time
}

// Open starts this process's server. A store that is new is founded with the
// servers of the configuration; all of them may do so, since all write the same. A
// store that is not must have been founded with the same servers. The state machine
// must be empty; when Open returns it has the state of the newest snapshot, and
// catches up once there is a leader.
func Open(cfg Config, sm StateMachine) (*Raft, error) {
	cfg = cfg.withDefaults()
	if err := cfg.Validate(); err != nil {
		if cfg.Streams != nil {
			cfg.Streams.Close()
		}
		return nil, err
	}
	s, err := openStore(cfg.FS, cfg.Dir, cfg.Logger, cfg.Fatal)
	if errors.Is(err, errLostTail) {
		err = fmt.Errorf("%w: %s", err, remedy(len(cfg.Servers)))
	}
	if err != nil {
		cfg.Streams.Close()
		return nil, err
	}
	r, err := start(cfg, s, sm)
	if err != nil {
		cfg.Streams.Close()
		return nil, errors.Join(fmt.Errorf("consensus: store in %s: %w", cfg.Dir, err), s.close())
	}
	return r, nil
}

// remedy says what to do about a store that lost its tail. Starting it as it is
// could break what the servers agreed on.
func remedy(servers int) string {
	if servers == 1 {
		return "there is no other server to learn them from: restore the whole directory from a copy made since the last change; an empty directory would found a new cluster"
	}
	return "start it with an empty directory, but only while all other servers are up, one of them leads and the rest have applied what it has: they bring it up to date"
}

// start runs a server on an open store.
func start(cfg Config, s *store, sm StateMachine) (*Raft, error) {
	logger := newRaftLogger(cfg.Logger)
	conf := cfg.raftConfig(logger)
	if err := raft.ValidateConfig(conf); err != nil {
		return nil, err
	}
	found, err := s.recover(cfg.Logger)
	if err != nil {
		return nil, err
	}
	if found.empty {
		// The store is new, or its founding was cut short. It has not voted yet, since
		// it is founded before the server runs.
		if err := s.clearStable(); err != nil {
			return nil, err
		}
		if cfg.Group != "" {
			if err := s.setGroup(cfg.Group); err != nil {
				return nil, fmt.Errorf("founding: %w", err)
			}
		}
		if err := raft.BootstrapCluster(conf, s, s, s, nil, cfg.servers()); err != nil {
			return nil, fmt.Errorf("founding: %w", err)
		}
	} else if err := checkServers(cfg.servers(), found.servers); err != nil {
		return nil, err
	}
	group, err := s.group()
	if err != nil {
		return nil, err
	}
	if cfg.Group != "" && cfg.Group != group {
		return nil, fmt.Errorf("the store is of group %q, not %q: %w", group, cfg.Group, ErrOtherGroup)
	}
	if found.restore {
		if err := sm.Restore(found.snapshot); err != nil {
			return nil, fmt.Errorf("restoring the newest snapshot: %w", err)
		}
	}

	r := &Raft{
		group:    group,
		streams:  newStreams(cfg.Streams, group),
		store:    s,
		logger:   logger,
		calls:    make(chan struct{}, maxCalls),
		stopping: make(chan struct{}),
		closed:   make(chan struct{}),
	}
	r.transport = &transport{raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Logger:  logger,
		Stream:  r.streams,
		MaxPool: maxConns,
		Timeout: cfg.RPCTimeout,
	}), 3 * cfg.RPCTimeout}
	r.raft, err = raft.NewRaft(conf, machine{to: sm}, s, s, s, r.transport)
	if err != nil {
		r.transport.Close()
		return nil, err
	}
	return r, nil
}

// Propose has a command agreed on and applied, and returns what the state machine's
// Apply returned. It must run on the leader. After ErrNotLeader the command will
// never be applied; after any other error it may or may not be. Commands should stay
// below 512 KiB: longer ones hold up the heartbeats.
func (r *Raft) Propose(ctx context.Context, command []byte) (any, error) {
	return r.call(ctx, func() (any, error) {
		f := r.raft.Apply(command, untilDeadline(ctx))
		if err := f.Error(); err != nil {
			return nil, err
		}
		return f.Response(), nil
	})
}

// Barrier waits until the state machine holds everything that was committed before
// the call. It must run on the leader, and writes to the log.
func (r *Raft) Barrier(ctx context.Context) error {
	_, err := r.call(ctx, func() (any, error) { return nil, r.raft.Barrier(untilDeadline(ctx)).Error() })
	return err
}

// VerifyLeader asks a majority whether this server still leads, and returns
// ErrNotLeader or ErrLeadershipLost where it does not.
func (r *Raft) VerifyLeader(ctx context.Context) error {
	_, err := r.call(ctx, func() (any, error) { return nil, r.raft.VerifyLeader().Error() })
	return err
}

// HandOver has the server lead that is most up to date, and returns once this one no
// longer leads. Until it does it proposes nothing: calls get ErrNotLeader. It must run
// on the leader, and fails when no other server can lead; then this one goes on.
func (r *Raft) HandOver(ctx context.Context) error {
	_, err := r.call(ctx, func() (any, error) { return nil, r.raft.LeadershipTransfer().Error() })
	return err
}

// call runs f, which waits for the library without regard to a context. It returns
// when ctx ends, and leaves f to end by itself: at the latest when this server loses
// its leadership.
func (r *Raft) call(ctx context.Context, f func() (any, error)) (any, error) {
	if r.closing.Load() {
		return nil, ErrClosed
	}
	select {
	case r.calls <- struct{}{}:
	case <-r.stopping:
		return nil, ErrClosed
	case <-ctx.Done():
		return nil, timeoutError(ctx)
	}
	type outcome struct {
		value any
		err   error
	}
	done := make(chan outcome, 1)
	go func() {
		value, err := f()
		done <- outcome{value, err}
		<-r.calls
	}()
	select {
	case o := <-done:
		return o.value, translate(o.err)
	case <-ctx.Done():
		return nil, timeoutError(ctx)
	}
}

func timeoutError(ctx context.Context) error {
	return fmt.Errorf("%w: %w", ErrTimeout, context.Cause(ctx))
}

// untilDeadline returns how long the library may keep a command waiting before it
// takes it; 0 is without a bound.
func untilDeadline(ctx context.Context) time.Duration {
	deadline, ok := ctx.Deadline()
	if !ok {
		return 0
	}
	return max(time.Until(deadline), time.Nanosecond)
}

// translate maps the library's errors to this package's.
func translate(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return ErrNotLeader
	case errors.Is(err, raft.ErrLeadershipLost):
		return ErrLeadershipLost
	case errors.Is(err, raft.ErrEnqueueTimeout):
		return fmt.Errorf("%w: %w", ErrTimeout, context.DeadlineExceeded)
	case errors.Is(err, raft.ErrRaftShutdown):
		return ErrClosed
	}
	return fmt.Errorf("consensus: %w", err)
}

// Group returns the group that the server is of: the one it was founded with.
func (r *Raft) Group() string { return r.group }

// IsLeader tells whether this server believes that it leads. Only VerifyLeader knows.
func (r *Raft) IsLeader() bool { return r.raft.State() == raft.Leader }

// Leader returns the name of the server that leads, as far as this one knows.
func (r *Raft) Leader() (name string, ok bool) {
	_, id := r.raft.LeaderWithID()
	return string(id), id != ""
}

// LeaderChanges tells when this server begins (true) and ceases (false) to lead. It
// holds one value, the latest: a reader that is late misses earlier ones, and may
// see true twice in a row after leadership was lost and won again. There is one
// channel, for one reader; it is never closed.
func (r *Raft) LeaderChanges() <-chan bool { return r.raft.LeaderCh() }

// Status describes the server now. Its parts are not read at one instant.
func (r *Raft) Status() Status {
	s := Status{
		State:       state(r.raft.State()),
		Term:        r.raft.CurrentTerm(),
		Committed:   r.raft.CommitIndex(),
		Applied:     r.raft.AppliedIndex(),
		LastContact: r.raft.LastContact(),
	}
	s.Leader, _ = r.Leader()
	if r.IsLeader() {
		s.LastContact = time.Now()
	}
	return s
}

func state(s raft.RaftState) string {
	switch s {
	case raft.Follower:
		return "follower"
	case raft.Candidate:
		return "candidate"
	case raft.Leader:
		return "leader"
	}
	return "closed"
}

// Close stops the server and waits for its goroutines. It does not hand leadership
// over, as HandOver does. The others find out as they would after a crash.
func (r *Raft) Close() error {
	if !r.closing.CompareAndSwap(false, true) {
		<-r.closed
		return r.closeErr
	}
	defer close(r.closed)
	close(r.stopping)
	r.logger.quiet.Store(true)

	// The library forgets to answer calls whose command is committed when it stops.
	// So first make sure that there are none: without connections a leader can commit
	// nothing more, and steps down after LeaderLease at the latest, which answers
	// every call. A leader of one server answers them at once.
	r.streams.cut()
	for range maxCalls {
		r.calls <- struct{}{}
	}

	// Idle connections are closed before the transport, which would lose them.
	r.transport.CloseStreams()
	err := r.raft.Shutdown().Error()
	r.streams.handlers.Wait()
	r.closeErr = errors.Join(err, r.store.close())
	return r.closeErr
}
