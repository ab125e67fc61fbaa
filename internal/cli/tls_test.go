package cli

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/kvasirdb/kvasir/internal/rpc"
)

// certificates writes a certificate that is its own authority.
func certificates(t *testing.T) rpc.TLSFiles {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kvasir"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	files := rpc.TLSFiles{Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem"), CA: filepath.Join(dir, "cert.pem")}
	for file, block := range map[string]*pem.Block{files.Cert: {Type: "CERTIFICATE", Bytes: cert}, files.Key: {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// TestTLS: a context with certificates reaches a cluster that wants them.
func TestTLS(t *testing.T) {
	files := certificates(t)
	f := newFakeWith(t, 1, files)
	dir := t.TempDir()
	at := func(a *App) { a.ConfigDir = dir }
	if err := (&App{ConfigDir: dir}).saveContext("secret", Context{Endpoints: []string{f.nodes[0].address}, TLS: files}); err != nil {
		t.Fatal(err)
	}
	runKvctl(t, at, "put", "k", "v").want(t, 0)
	runKvctl(t, at, "namespace", "ls").want(t, 0, "default")
	runKvctl(t, at, "health").want(t, 0, "ok")
	runKvctl(t, at, "put", "k", "v", "--endpoints", f.nodes[0].address, "--timeout", "200ms").want(t, 4, "no cluster at")
	runKvctl(t, at, "put", "k", "v", "--endpoints", f.nodes[0].address, "--context", "secret").want(t, 0)
}
