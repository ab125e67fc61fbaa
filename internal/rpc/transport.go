// Package rpc is how Kvasir's processes talk: gRPC servers and connections with
// one codec, one mapping of errors and one place for TLS, and links, which carry
// many small calls to one peer over one stream in batches. It knows messages as
// frames only; what they mean is for the protocols above.
package rpc

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
)

// maxMessageBytes bounds one message; the largest batch and some headers fit.
const maxMessageBytes = 48 << 20

// Windows of flow control. The defaults of 64 KiB make a link wait for window
// updates.
const (
	streamWindow = 4 << 20
	connWindow   = 16 << 20
	ioBuffer     = 64 << 10
)

// Dialer opens connections. It is the seam where a simulated network is put in.
type Dialer func(ctx context.Context, address string) (net.Conn, error)

// NetDialer dials TCP.
func NetDialer(ctx context.Context, address string) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "tcp", address)
}

// TLSFiles names the files of a process's identity, in PEM. The zero value means
// no TLS. With TLS both sides must show a certificate of the authority.
type TLSFiles struct {
	Cert string `yaml:"cert" help:"PEM file with this process's certificate"`
	Key  string `yaml:"key" help:"PEM file with its key"`
	CA   string `yaml:"ca" help:"PEM file with the authority of all certificates"`
}

// Check returns an error unless all files or none are named.
func (f TLSFiles) Check() error {
	if f != (TLSFiles{}) && (f.Cert == "" || f.Key == "" || f.CA == "") {
		return errors.New("TLS needs a certificate, a key and an authority: name all three files or none")
	}
	return nil
}

// Load reads the files. It returns nil when none is named.
func (f TLSFiles) Load() (*tls.Config, error) {
	if err := f.Check(); f == (TLSFiles{}) || err != nil {
		return nil, err
	}
	cert, err := tls.LoadX509KeyPair(f.Cert, f.Key)
	if err != nil {
		return nil, fmt.Errorf("load TLS certificate %s with key %s: %w", f.Cert, f.Key, err)
	}
	pem, err := os.ReadFile(f.CA)
	if err != nil {
		return nil, fmt.Errorf("load TLS authority: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("load TLS authority: %s holds no certificate", f.CA)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{cert},
		RootCAs:      pool,
		ClientCAs:    pool,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		MinVersion:   tls.VersionTLS13,
	}, nil
}

// DecodeKey reads a key of 16, 24 or 32 bytes in base64, with which gossip is
// encrypted. An empty text is no key, nil.
func DecodeKey(text string) ([]byte, error) {
	key, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("is not base64: %w", err)
	}
	if n := len(key); n != 0 && n != 16 && n != 24 && n != 32 {
		return nil, fmt.Errorf("has %d bytes: want 16, 24 or 32", n)
	}
	if len(key) == 0 {
		return nil, nil
	}
	return key, nil
}

// CheckAddress returns an error unless address is host:port with a port of 1 to
// 65535. With reachable the host must be one that others can dial, and not all
// interfaces.
func CheckAddress(address string, reachable bool) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("%q is not host:port", address)
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		return fmt.Errorf("%q: want a port of 1 to 65535", address)
	}
	if ip := net.ParseIP(host); reachable && (host == "" || ip != nil && ip.IsUnspecified()) {
		return fmt.Errorf("%q is no address that others can reach: name a host", address)
	}
	return nil
}

// Listen listens on TCP. A busy port's error says which and what to do.
func Listen(address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("address %s is in use: stop the process that listens there, or choose another port", address)
	}
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	return l, nil
}

// Transport is how a process reaches others and is reached.
type Transport struct {
	// Dial is NetDialer in production.
	Dial Dialer
	// TLS is nil for plain text.
	TLS *tls.Config
}

// NewServer returns a gRPC server with Kvasir's codec, limits and error mapping.
func (t Transport) NewServer() *grpc.Server {
	opts := []grpc.ServerOption{
		grpc.ForceServerCodecV2(codec{}),
		grpc.MaxRecvMsgSize(maxMessageBytes),
		grpc.MaxSendMsgSize(maxMessageBytes),
		grpc.InitialWindowSize(streamWindow),
		grpc.InitialConnWindowSize(connWindow),
		grpc.ReadBufferSize(ioBuffer),
		grpc.WriteBufferSize(ioBuffer),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		// What handlers use is closed after the server.
		grpc.WaitForHandlers(true),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			resp, err := next(ctx, req)
			if err != nil {
				return nil, AsError(err)
			}
			return resp, nil
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			if err := next(srv, ss); err != nil {
				return AsError(err)
			}
			return nil
		}),
	}
	if t.TLS != nil {
		opts = append(opts, grpc.Creds(credentials.NewTLS(t.TLS)))
	}
	return grpc.NewServer(opts...)
}

// NewConn returns a connection to an address, which is dialled when it is first
// used. An address that does not answer fails calls at once rather than hold them. Where
// more options contradict those that all connections have, they hold.
func (t Transport) NewConn(address string, more ...grpc.DialOption) (*grpc.ClientConn, error) {
	creds := insecure.NewCredentials()
	if t.TLS != nil {
		creds = credentials.NewTLS(t.TLS)
	}
	cc, err := grpc.NewClient("passthrough:///"+address, append([]grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(t.Dial),
		grpc.WithDefaultCallOptions(
			grpc.ForceCodecV2(codec{}),
			grpc.MaxCallRecvMsgSize(maxMessageBytes),
			grpc.MaxCallSendMsgSize(maxMessageBytes),
		),
		grpc.WithInitialWindowSize(streamWindow),
		grpc.WithInitialConnWindowSize(connWindow),
		grpc.WithReadBufferSize(ioBuffer),
		grpc.WithWriteBufferSize(ioBuffer),
		grpc.WithIdleTimeout(0),
		grpc.WithDisableServiceConfig(),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 2, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true}),
	}, more...)...)
	if err != nil {
		return nil, fmt.Errorf("connection to %s: %w", address, err)
	}
	return cc, nil
}
