package consensus

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"path/filepath"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// markName is the file beside the database that vouches for its write-ahead log.
const markName = "MARK"

// mark says how many commits were synced, outside the write-ahead log: one that
// lost its tail opens without an error. It is written after a commit is synced and
// before the commit returns, so a crash leaves it behind the log, never ahead of it.
type mark struct {
	file    vfs.File
	commits uint64
}

// Encoding of one slot: magic(4) format(1) commits(8) crc32c(4), big-endian. The
// slots take turns and lie a page apart, so that a torn write harms the older one.
const (
	markMagic  = "KVRM"
	markFormat = 1
	markLen    = 4 + 1 + 8 + 4
	markStride = 4096
)

func encodeMark(commits uint64) []byte {
	b := append(make([]byte, 0, markLen), markMagic...)
	b = append(b, markFormat)
	b = binary.BigEndian.AppendUint64(b, commits)
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func decodeMark(b []byte) (commits uint64, ok bool) {
	if len(b) != markLen || string(b[:4]) != markMagic || b[4] != markFormat {
		return 0, false
	}
	body, sum := b[:markLen-4], binary.BigEndian.Uint32(b[markLen-4:])
	return binary.BigEndian.Uint64(b[5:]), crc32.Checksum(body, castagnoli) == sum
}

// openMark opens or creates the file; found is false when no slot is readable.
func openMark(fsys vfs.FS, dir string) (m *mark, found bool, err error) {
	path := filepath.Join(dir, markName)
	f, err := fsys.OpenReadWrite(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		return nil, false, fmt.Errorf("open %s: %w", path, err)
	}
	m = &mark{file: f}
	for slot := range int64(2) {
		b := make([]byte, markLen)
		if _, err := f.ReadAt(b, slot*markStride); err != nil && !errors.Is(err, io.EOF) {
			return nil, false, errors.Join(fmt.Errorf("read %s: %w", path, err), f.Close())
		}
		if commits, ok := decodeMark(b); ok {
			m.commits, found = max(m.commits, commits), true
		}
	}
	d, err := fsys.OpenDir(dir)
	if err == nil {
		err = errors.Join(d.Sync(), d.Close())
	}
	if err != nil {
		return nil, false, errors.Join(fmt.Errorf("sync %s: %w", dir, err), f.Close())
	}
	return m, found, nil
}

// write returns when the mark is on disk.
func (m *mark) write(commits uint64) error {
	if _, err := m.file.WriteAt(encodeMark(commits), int64(commits%2)*markStride); err != nil {
		return fmt.Errorf("write %s: %w", markName, err)
	}
	if err := m.file.SyncData(); err != nil {
		return fmt.Errorf("sync %s: %w", markName, err)
	}
	m.commits = commits
	return nil
}
