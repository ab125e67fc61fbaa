package storage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/kvasirdb/kvasir/internal/hlc"
)

// markName is the file beside the store that vouches for the write-ahead log.
const markName = "MARK"

// mark is what must survive outside the write-ahead log. A log whose tail was
// cut, zeroed or flipped opens without an error and with fewer commits. So a number
// is written into the store now and then, which is then as new as the newest commit
// before it, and into the mark after it. Pebble's own sequence number would not do:
// its manifest may hold a later one than the log that is left.
type mark struct {
	// generation orders the two slots of the file.
	generation uint64
	// tail is the number in the store's entry of that name, synced before the mark.
	tail uint64
	// reserved is the greatest timestamp the node's clock may have issued.
	reserved hlc.Timestamp
	// lostTail is set for good once the store's number was found to be smaller.
	lostTail bool
	// damaged is set for good when the store was given up because of bit rot.
	damaged bool
}

// Encoding of one slot: magic(4) format(1) flags(1) generation(8) tail(8)
// reserved(8) crc32c(4), big-endian. The slots lie a page apart, so that a torn
// write harms one of them at most.
const (
	markMagic   = "KVMK"
	markFormat  = 1
	markLen     = 4 + 1 + 1 + 8 + 8 + 8 + 4
	markStride  = 4096
	markHasLost = 0x01
	markDamaged = 0x02
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (m mark) encode() []byte {
	b := append(make([]byte, 0, markLen), markMagic...)
	flags := byte(0)
	if m.lostTail {
		flags |= markHasLost
	}
	if m.damaged {
		flags |= markDamaged
	}
	b = append(b, markFormat, flags)
	b = binary.BigEndian.AppendUint64(b, m.generation)
	b = binary.BigEndian.AppendUint64(b, m.tail)
	b = binary.BigEndian.AppendUint64(b, uint64(m.reserved))
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// decodeMark parses one slot. Errors are ErrCorrupt or ErrNewerFormat.
func decodeMark(b []byte) (mark, error) {
	if len(b) != markLen || string(b[:4]) != markMagic {
		return mark{}, fmt.Errorf("%w: not a mark", ErrCorrupt)
	}
	body, sum := b[:markLen-4], binary.BigEndian.Uint32(b[markLen-4:])
	if crc32.Checksum(body, castagnoli) != sum {
		return mark{}, fmt.Errorf("%w: checksum of a mark", ErrCorrupt)
	}
	if b[4] > markFormat {
		return mark{}, fmt.Errorf("%w: mark of format %d", ErrNewerFormat, b[4])
	}
	if b[4] != markFormat || b[5]&^(markHasLost|markDamaged) != 0 {
		return mark{}, fmt.Errorf("%w: mark of format %d, flags %#x", ErrCorrupt, b[4], b[5])
	}
	return mark{
		lostTail:   b[5]&markHasLost != 0,
		damaged:    b[5]&markDamaged != 0,
		generation: binary.BigEndian.Uint64(b[6:]),
		tail:       binary.BigEndian.Uint64(b[14:]),
		reserved:   hlc.Timestamp(binary.BigEndian.Uint64(b[22:])),
	}, nil
}

// markFile keeps a mark on disk.
type markFile struct {
	file vfs.File
	// writing is when the write under way began, nil where none is.
	writing atomic.Pointer[time.Time]
	mu      struct {
		sync.Mutex
		mark
		synced time.Time // when the file last was
	}
}

// errNoMark is returned by openMark when the file holds no readable mark.
var errNoMark = errors.New("no readable mark")

// openMark opens or creates the file. With errNoMark the file is usable and its
// mark is zero.
func openMark(fs vfs.FS, dir string) (*markFile, error) {
	path := filepath.Join(dir, markName)
	f, err := fs.OpenReadWrite(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	m := &markFile{file: f}
	found := false
	for slot := range int64(2) {
		b := make([]byte, markLen)
		if _, err := f.ReadAt(b, slot*markStride); err != nil && !errors.Is(err, io.EOF) {
			return nil, errors.Join(fmt.Errorf("read %s: %w", path, err), f.Close())
		}
		got, err := decodeMark(b)
		if errors.Is(err, ErrNewerFormat) {
			return nil, errors.Join(fmt.Errorf("%s: %w", path, err), f.Close())
		}
		if err == nil && (!found || got.generation > m.mu.generation) {
			m.mu.mark, found = got, true
		}
	}
	if !found {
		return m, errNoMark
	}
	return m, nil
}

// update changes the mark and returns when it is on disk. It writes nothing when
// change leaves the mark as it is.
func (m *markFile) update(change func(*mark)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	next := m.mu.mark
	change(&next)
	if next == m.mu.mark {
		return nil
	}
	return m.write(next)
}

// proveInterval is how often the mark is written at least.
const proveInterval = 5 * time.Second

// prove writes the mark as it is unless it was written within an interval, so that a
// disk that takes nothing any more shows. It returns after how long it is to be called again.
func (m *markFile) prove(interval time.Duration) (again time.Duration, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if rest := interval - time.Since(m.mu.synced); rest > 0 {
		return rest, nil
	}
	return interval, m.write(m.mu.mark)
}

// write writes the next mark and returns when it is on disk.
// REQUIRES: m.mu is held.
func (m *markFile) write(next mark) error {
	began := time.Now()
	m.writing.Store(&began)
	defer m.writing.Store(nil)
	next.generation++
	if _, err := m.file.WriteAt(next.encode(), int64(next.generation%2)*markStride); err != nil {
		return fmt.Errorf("write %s: %w", markName, err)
	}
	if err := m.file.SyncData(); err != nil {
		return fmt.Errorf("sync %s: %w", markName, err)
	}
	m.mu.mark, m.mu.synced = next, time.Now()
	return nil
}

func (m *markFile) load() mark {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.mark
}

func (m *markFile) close() error { return m.file.Close() }
