package bench

import (
	"context"
	"errors"

	"github.com/kvasirdb/kvasir/client"
)

// Store is what is measured. Its methods are safe for concurrent use, and keep no slice.
type Store interface {
	// Read returns ErrNotFound when there is no such record.
	Read(ctx context.Context, key []byte) error
	Write(ctx context.Context, key, value []byte) error
	// Scan reads up to limit records in key order.
	Scan(ctx context.Context, start []byte, limit int) error
	// Load writes many records.
	Load(ctx context.Context, keys, values [][]byte) error
}

// ErrNotFound matches the error of a read that found nothing.
var ErrNotFound = errors.New("not found")

// Kvasir returns a cluster as what is measured, through the client library.
func Kvasir(c *client.Client, opts ...client.CallOption) Store { return kvasir{c, opts} }

type kvasir struct {
	client *client.Client
	opts   []client.CallOption
}

func (k kvasir) Read(ctx context.Context, key []byte) error {
	_, err := k.client.Get(ctx, key, k.opts...)
	if errors.Is(err, client.ErrNotFound) {
		return ErrNotFound
	}
	return err
}

func (k kvasir) Write(ctx context.Context, key, value []byte) error {
	_, err := k.client.Put(ctx, key, value, k.opts...)
	return err
}

func (k kvasir) Scan(ctx context.Context, start []byte, limit int) error {
	for _, err := range k.client.Scan(ctx, client.Range{Start: start, Limit: limit}, k.opts...) {
		if err != nil {
			return err
		}
	}
	return nil
}

func (k kvasir) Load(ctx context.Context, keys, values [][]byte) error {
	ops := make([]client.Operation, len(keys))
	for i := range keys {
		ops[i] = client.Operation{Key: keys[i], Value: values[i]}
	}
	results, err := k.client.Batch(ctx, ops, k.opts...)
	for _, r := range results {
		err = errors.Join(err, r.Err)
	}
	return err
}
