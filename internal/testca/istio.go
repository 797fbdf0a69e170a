// SPDX-License-Identifier: Apache-2.0

package testca

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"time"
)

// Issue answers a request with a chain: the leaf first, the root last.
type Issue func(*x509.CertificateRequest) ([]*x509.Certificate, error)

// Issue gives a request the leaf that it asks for, with options. Its time begins
// with it: a ztunnel asks for the next one in the middle of a certificate's time,
// and without end where that is over when it comes.
func (ca *CA) Issue(r *x509.CertificateRequest, options ...Option) ([]*x509.Certificate, error) {
	l := newLeaf(r.URIs, options)
	if l.template.NotBefore.IsZero() {
		l.template.NotBefore = time.Now().Add(-time.Second)
	}
	c, err := ca.SignKey(l.template, r.PublicKey, false)
	return []*x509.Certificate{c, ca.Intermediate, ca.Root}, err
}

// Istio is a server that answers istio.v1.auth.IstioCertificateService, which
// Istio's ztunnel asks for its certificates: a CSR in, a chain out, which issue
// makes, and ca.Issue where that is nil. Nobody has to prove anything. Its own
// certificate, below ca's root, is for localhost; ServeTLS takes it from the
// server. The caller closes it.
func (ca *CA) Istio(issue Issue) (*http.Server, error) {
	if issue == nil {
		issue = func(r *x509.CertificateRequest) ([]*x509.Certificate, error) { return ca.Issue(r) }
	}
	c, key, err := ca.Sign(&x509.Certificate{
		DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, false)
	if err != nil {
		return nil, err
	}
	return &http.Server{
		Handler: issue, ReadHeaderTimeout: 10 * time.Second,
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{{PrivateKey: key, Certificate: [][]byte{c.Raw, ca.Intermediate.Raw}}}},
	}, nil
}

// ServeHTTP is http.Handler's.
func (issue Issue) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	answer := func(chain []byte, err error) {
		w.Header().Set("Content-Type", "application/grpc")
		status, message := "0", ""
		if err != nil {
			status, message, chain = "13", err.Error(), nil // INTERNAL
		} else {
			chain = append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(chain))), chain...)
		}
		_, _ = w.Write(chain)
		w.Header().Set(http.TrailerPrefix+"Grpc-Status", status)
		w.Header().Set(http.TrailerPrefix+"Grpc-Message", message)
	}
	b, err := io.ReadAll(io.LimitReader(r.Body, 64<<10))
	if err != nil {
		answer(nil, err)
		return
	}
	answer(issue.answer(b))
}

// answer reads IstioCertificateRequest, whose field 1 is a CSR in PEM, out of a
// gRPC message, and makes IstioCertificateResponse, whose field 1 is repeated: a
// chain in PEM, the root last.
func (issue Issue) answer(message []byte) ([]byte, error) {
	const prefix = 5 // compressed or not, and the length
	if len(message) < prefix || message[0] != 0 {
		return nil, errors.New("no plain gRPC message")
	}
	message = message[prefix:]
	n, size := uint64(0), 0
	if len(message) > 0 && message[0] == 1<<3|2 {
		n, size = binary.Uvarint(message[1:])
	}
	if size <= 0 || n > uint64(len(message)-1-size) {
		return nil, errors.New("no CSR in front")
	}
	block, _ := pem.Decode(message[1+size:][:n])
	if block == nil {
		return nil, errors.New("the CSR is not PEM")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	chain, err := issue(csr)
	if err != nil {
		return nil, err
	}
	var out []byte
	for _, c := range chain {
		text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
		out = append(binary.AppendUvarint(append(out, 1<<3|2), uint64(len(text))), text...)
	}
	return out, nil
}
