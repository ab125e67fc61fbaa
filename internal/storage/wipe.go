package storage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// WipeVnodes removes all records of some vnodes, of the given namespaces, and stores a
// value under a name, as SetMeta does, as one commit. It returns when that is on disk.
// Promises are kept; certificates, which tell of what was there, are not. Damaged
// records are no hindrance.
// REQUIRES: the vnodes are not in use.
func (s *Store) WipeVnodes(namespaces, vnodes []uint32, name string, value []byte) error {
	var places []Place
	for _, ns := range namespaces {
		for _, v := range vnodes {
			if p := (Place{ns, v}); !s.empty(p) { // nothing is cached of empty ones either
				places = append(places, p)
			}
		}
	}
	b := s.db.NewBatch()
	defer b.Close()
	if err := b.Set(metaKey(name), value, nil); err != nil {
		return err
	}
	if err := s.wipe(b, places); err != nil {
		return err
	}
	// Without records too there may be certificates.
	var certified []Place
	s.Collections(func(namespace, vnode uint32, _ Collection) bool {
		if slices.Contains(vnodes, vnode) {
			certified = append(certified, Place{namespace, vnode})
		}
		return true
	})
	return s.VoidCertificates(certified...)
}

// Wipe removes all records of some places, and their certificates, and returns when
// that is on disk. Promises are kept.
// REQUIRES: the places are not in use.
func (s *Store) Wipe(places []Place) error {
	if len(places) == 0 {
		return nil
	}
	b := s.db.NewBatch()
	defer b.Close()
	return errors.Join(s.wipe(b, places), s.VoidCertificates(places...))
}

func (s *Store) wipe(b *pebble.Batch, places []Place) error {
	var errs []error
	var ranges []keyRange
	wiped := map[vnodeID]bool{}
	for _, p := range places {
		r := rangeOf(p)
		errs = append(errs, b.DeleteRange([]byte(r.lower), []byte(r.upper), nil))
		ranges, wiped[vnodeID{p.Namespace, p.Vnode}] = append(ranges, r), true
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if len(ranges) > 0 { // else there is but a value to store
		defer s.latches.suspend(ranges...).resume()
	}
	if err := s.commit(func() error { return b.Commit(pebble.Sync) }); err != nil {
		return fmt.Errorf("wipe %d vnodes: %w", len(places), err)
	}
	s.unmark()
	s.trees.forget(func(id vnodeID) bool { return wiped[id] })
	return nil
}

// empty reports whether a place certainly has no records.
func (s *Store) empty(p Place) bool {
	lower, upper := vnodeRange(p.Namespace, p.Vnode, nil, nil)
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: upper})
	if err != nil {
		return false
	}
	defer it.Close()
	return !it.First() && it.Error() == nil
}

// Held returns the places that have records, dead ones included, in order.
func (s *Store) Held() ([]Place, error) {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{kindRecord}, UpperBound: []byte{kindRecord + 1}})
	if err != nil {
		return nil, readError(err)
	}
	defer it.Close()
	var out []Place
	for valid := it.First(); valid; {
		k := it.Key()
		if len(k) < recordPrefixLen {
			return nil, fmt.Errorf("%w: key %x", ErrCorrupt, k)
		}
		p := Place{binary.BigEndian.Uint32(k[1:]), binary.BigEndian.Uint32(k[5:])}
		out = append(out, p)
		_, upper := vnodeRange(p.Namespace, p.Vnode, nil, nil)
		valid = it.SeekGE(upper)
	}
	if err := it.Error(); err != nil {
		return nil, readError(err)
	}
	return out, nil
}

// asidePrefix begins the names of directories that hold a store that was set aside.
// asideName is a file that names such a directory while a store is on its way there.
const (
	asidePrefix = "lost-"
	asideName   = "ASIDE"
)

// SetAside moves the content of a data directory into a directory in it, whose name
// ends in suffix, so that the directory is as good as new. After a crash in between
// Open returns ErrCorrupt, and the next call goes on where the last one ended.
// REQUIRES: the store is not open.
func SetAside(disk vfs.FS, dir, suffix string) (path string, err error) {
	lock, err := pebble.LockDirectory(dir, disk)
	if err != nil {
		return "", fmt.Errorf("%w: %s (%w)", ErrInUse, dir, err)
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	name, err := asideInto(disk, dir)
	if err != nil {
		return "", err
	}
	if name == "" {
		name = asidePrefix + suffix
		if err := writeFile(disk, dir, asideName, name); err != nil {
			return "", err
		}
	}
	path = filepath.Join(dir, name)
	if err := disk.MkdirAll(path, 0o755); err != nil {
		return "", fmt.Errorf("make %s: %w", path, err)
	}
	names, err := disk.List(dir)
	if err != nil {
		return "", fmt.Errorf("list %s: %w", dir, err)
	}
	for _, n := range names {
		if n == "LOCK" || n == "lost+found" || n == asideName || strings.HasPrefix(n, asidePrefix) {
			continue
		}
		if err := disk.Rename(filepath.Join(dir, n), filepath.Join(path, n)); err != nil {
			return "", fmt.Errorf("move %s to %s: %w", n, path, err)
		}
	}
	if err := errors.Join(syncDir(disk, path), syncDir(disk, dir)); err != nil {
		return "", err
	}
	if err := disk.Remove(filepath.Join(dir, asideName)); err != nil {
		return "", fmt.Errorf("remove %s: %w", asideName, err)
	}
	return path, syncDir(disk, dir)
}

// asideInto returns the directory that a store is on its way to, or "".
func asideInto(disk vfs.FS, dir string) (string, error) {
	path := filepath.Join(dir, asideName)
	f, err := disk.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("open %s: %w", path, err)
	}
	b, err := io.ReadAll(io.LimitReader(f, 256))
	if err = errors.Join(err, f.Close()); err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	name := strings.TrimSuffix(string(b), "\n")
	if !strings.HasPrefix(name, asidePrefix) || strings.ContainsAny(name, `/\`) {
		return "", fmt.Errorf("%w: %s reads %q", ErrNotOurs, path, name)
	}
	return name, nil
}

// ForgetAside deletes what SetAside has moved.
func ForgetAside(disk vfs.FS, dir string) error {
	names, err := asides(disk, dir)
	for _, name := range names {
		if err := disk.RemoveAll(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove %s: %w", filepath.Join(dir, name), err)
		}
	}
	return err
}

// HasAside reports whether there is something that ForgetAside would delete.
func HasAside(disk vfs.FS, dir string) bool {
	names, err := asides(disk, dir)
	return err == nil && len(names) > 0
}

// asides returns the directories that hold stores that were set aside.
func asides(disk vfs.FS, dir string) ([]string, error) {
	names, err := disk.List(dir)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", dir, err)
	}
	return slices.DeleteFunc(names, func(name string) bool { return !strings.HasPrefix(name, asidePrefix) }), nil
}

func syncDir(disk vfs.FS, dir string) error {
	d, err := disk.OpenDir(dir)
	if err != nil {
		return fmt.Errorf("open %s: %w", dir, err)
	}
	return errors.Join(d.Sync(), d.Close())
}
