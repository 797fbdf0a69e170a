// SPDX-License-Identifier: Apache-2.0

package handshake

import (
	"bytes"
	"encoding/hex"
	"errors"
)

// keyLog takes the traffic secrets out of crypto/tls, which gives them to
// nobody but a key log, in both roles and before Handshake returns.
type keyLog struct {
	clientHandshake []byte
	client, server  []byte // the application epoch's
}

// Write takes one line: label, client random and secret in hexadecimal. It
// overwrites the line, against io.Writer's custom: crypto/tls makes it for this
// call alone, and it is a key.
func (k *keyLog) Write(line []byte) (int, error) {
	defer clear(line)
	label, rest, ok := bytes.Cut(bytes.TrimSuffix(line, []byte("\n")), []byte(" "))
	_, secret, ok2 := bytes.Cut(rest, []byte(" "))
	if !ok || !ok2 {
		return 0, errors.New("key log line without a secret")
	}
	var to *[]byte
	switch string(label) {
	case "CLIENT_HANDSHAKE_TRAFFIC_SECRET":
		to = &k.clientHandshake
	case "CLIENT_TRAFFIC_SECRET_0":
		to = &k.client
	case "SERVER_TRAFFIC_SECRET_0":
		to = &k.server
	default:
		return len(line), nil
	}
	clear(*to)
	*to = make([]byte, hex.DecodedLen(len(secret)))
	if _, err := hex.Decode(*to, secret); err != nil {
		return 0, errors.New("key log line with a secret that is not hexadecimal")
	}
	return len(line), nil
}

// wipe overwrites what is still here.
func (k *keyLog) wipe() {
	clear(k.clientHandshake)
	clear(k.client)
	clear(k.server)
	*k = keyLog{}
}
