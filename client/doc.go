// Package client is the Go client of Kvasir.
//
// A Client goes straight to a replica of each key, the one with the least to do among
// those that are near, follows changes of the cluster, and goes round nodes that do not
// answer:
//
//	c, err := client.New(ctx, []string{"127.0.0.1:7400", "127.0.0.1:7410"})
//	if err != nil {
//		return err
//	}
//	defer c.Close()
//	receipt, err := c.Put(ctx, []byte("greeting"), []byte("hello"))
//	value, err := c.Get(ctx, []byte("greeting"))
//
// # Quorums
//
// Every call takes its namespace's default quorum unless it names one: W("40%")
// writes to two of five replicas before it answers while the other three go on in
// the background, R("all") asks every replica. The receipt of a call says what its
// answer rests on.
//
// # Errors
//
// Errors match the package's variables with errors.Is, and carry reason and
// details as *Error. ErrOutcomeUnknown is the one to think about: the write may be
// seen by reads and survive, or not.
//
// # Retries
//
// What certainly had no effect is tried again. What may have had one is tried again
// only if that changes nothing: gets, scans, and puts, deletes and batches, which
// say what a key shall hold and not how to change it. A put that is tried again may
// be written twice, with two versions; in between another client's write may be
// seen. WithoutRetries turns this off for a call. Retries are paid from a budget,
// so that a cluster in trouble is not flooded.
package client
