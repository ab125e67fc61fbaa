package node_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/client"
	"github.com/kvasirdb/kvasir/internal/node"
	"github.com/kvasirdb/kvasir/internal/orchestrator"
	"github.com/kvasirdb/kvasir/internal/rpc"
	"github.com/kvasirdb/kvasir/internal/sim/loopback"
)

// identity writes an authority and a certificate of it for 127.0.0.1.
func identity(t *testing.T) rpc.TLSFiles {
	t.Helper()
	dir := t.TempDir()
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		var b bytes.Buffer
		if err := pem.Encode(&b, &pem.Block{Type: kind, Bytes: der}); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	must := func(der []byte, err error) []byte {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	key := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	caKey := key()
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "process"}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	leafKey := key()
	return rpc.TLSFiles{
		CA:   write("ca.pem", "CERTIFICATE", must(x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey))),
		Cert: write("cert.pem", "CERTIFICATE", must(x509.CreateCertificate(rand.Reader, leaf, ca, &leafKey.PublicKey, caKey))),
		Key:  write("key.pem", "EC PRIVATE KEY", must(x509.MarshalECPrivateKey(leafKey))),
	}
}

// With TLS and a gossip key everything between processes is encrypted, and those
// without a certificate are turned away.
func TestEncryptedCluster(t *testing.T) {
	files := identity(t)
	const gossipKey = "MDEyMzQ1Njc4OWFiY2RlZg=="
	logger := slog.New(slog.DiscardHandler)
	fatal := func(err error) { t.Error(err) }
	a := loopback.Addresses(t, 15)
	var peers []orchestrator.Peer
	for i := range 3 {
		peers = append(peers, orchestrator.Peer{Name: fmt.Sprint("orch", i+1), Address: a[4*i], AdminAddress: a[4*i+1], GossipAddress: a[4*i+2], RaftAddress: a[4*i+3]})
	}
	for _, p := range peers {
		cfg := orchestrator.Defaults()
		cfg.Name, cfg.DataDir, cfg.Peers = p.Name, filepath.Join(t.TempDir(), p.Name), peers
		cfg.Listen, cfg.AdminListen, cfg.GossipListen, cfg.RaftListen = p.Address, p.AdminAddress, p.GossipAddress, p.RaftAddress
		cfg.Bootstrap.FoundingNodes, cfg.Bootstrap.Vnodes = 1, 16
		cfg.ElectionTimeout = 200 * time.Millisecond
		cfg.TLS, cfg.GossipKey, cfg.Logger, cfg.Fatal = files, gossipKey, logger, fatal
		o, err := orchestrator.Start(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer o.Stop()
	}
	cfg := node.Defaults()
	cfg.Name, cfg.DataDir, cfg.Orchestrators = "node1", filepath.Join(t.TempDir(), "node1"), []string{a[0], a[4], a[8]}
	cfg.Listen, cfg.AdminListen, cfg.GossipListen = a[12], a[13], a[14]
	cfg.TLS, cfg.GossipKey, cfg.Logger, cfg.Fatal = files, gossipKey, logger, fatal
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	n, err := node.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Stop()

	tlsConfig, err := files.Load()
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.New(ctx, []string{a[12]}, client.WithTLS(tlsConfig))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Put(ctx, []byte("k"), []byte("v")); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if plain, err := client.New(short, []string{a[12]}); err == nil {
		plain.Close()
		t.Error("a client without TLS gets in")
	}
	tlsConfig = tlsConfig.Clone()
	tlsConfig.Certificates = nil
	short, cancel = context.WithTimeout(ctx, time.Second)
	defer cancel()
	if nobody, err := client.New(short, []string{a[12]}, client.WithTLS(tlsConfig)); err == nil {
		nobody.Close()
		t.Error("a client without a certificate gets in")
	}
}
