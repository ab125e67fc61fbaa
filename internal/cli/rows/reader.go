package rows

import (
	"bufio"
	"errors"
	"fmt"
	"io"
)

// MaxRowBytes bounds a row for keys and values of the given sizes: JSON takes up to
// six bytes to write one.
func (f Format) MaxRowBytes(maxKey, maxValue int) int {
	if f == JSONL {
		return 6*(maxKey+maxValue) + 1<<10
	}
	return 2*maxKey + maxValue + 1<<10
}

// Row is one row of input.
type Row struct {
	// Bytes are the row without its line break. They are valid until the next row is
	// read.
	Bytes []byte
	// Line is the number of the row's first line, from 1.
	Line int
	// Err says why the row is refused; Bytes are then empty.
	Err error
}

// Reader reads rows one by one and keeps no more than one in memory.
type Reader struct {
	in     *bufio.Reader
	format Format
	max    int
	row    []byte
	line   int
	bytes  int64
}

// NewReader returns a reader of rows of at most maxRowBytes; longer ones are refused.
func NewReader(in io.Reader, format Format, maxRowBytes int) *Reader {
	return &Reader{in: bufio.NewReaderSize(in, 256<<10), format: format, max: maxRowBytes}
}

// BytesRead returns how many bytes of the input the rows so far were.
func (r *Reader) BytesRead() int64 { return r.bytes }

// Next returns the next row, or io.EOF after the last, or another error of the
// input. A row ends at a line break, which need not follow the last one; in CSV a
// line break between quotes belongs to the row. A refused row ends likewise, so that
// no part of it is taken for another row.
func (r *Reader) Next() (Row, error) {
	r.row = r.row[:0]
	out := Row{Line: r.line + 1}
	state := fieldStart
	size := 0
	for {
		chunk, err := r.in.ReadSlice('\n')
		r.bytes += int64(len(chunk))
		size += len(chunk)
		if size <= r.max {
			r.row = append(r.row, chunk...)
		}
		ended := err == nil // at a line break
		switch {
		case ended:
			r.line++
			chunk = chunk[:len(chunk)-1]
			state = r.advance(state, chunk)
			if state == quoted {
				continue
			}
		case errors.Is(err, bufio.ErrBufferFull):
			state = r.advance(state, chunk)
			continue
		case errors.Is(err, io.EOF):
			if size == 0 {
				return Row{}, io.EOF
			}
			if len(chunk) > 0 {
				r.line++
			}
			state = r.advance(state, chunk)
		default:
			return Row{}, fmt.Errorf("read line %d: %w", r.line+1, err)
		}
		out.Bytes, out.Err = r.finish(out.Line, state, size, ended)
		return out, nil
	}
}

// advance follows the quotes of a comma-separated row; other formats have none.
func (r *Reader) advance(state csvState, chunk []byte) csvState {
	if r.format != CSV {
		return fieldStart
	}
	for _, c := range chunk {
		state = state.next(c)
	}
	return state
}

// finish judges a row whose end has been found.
func (r *Reader) finish(line int, state csvState, size int, ended bool) ([]byte, error) {
	switch {
	case state == quoted && r.line > line:
		return nil, fmt.Errorf("malformed row: a quoted field begins here and does not end: everything up to line %d is refused", r.line)
	case state == quoted || state == broken:
		return nil, errMalformed
	case size > r.max:
		return nil, fmt.Errorf("the row has %d bytes: the limit is %d", size, r.max)
	case ended:
		return r.row[:len(r.row)-1], nil
	}
	return r.row, nil
}
