// SPDX-License-Identifier: Apache-2.0

package istio

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What a ztunnel is told of its pods, and how it is heard. The bytes are written
// out by hand from istio/ztunnel's proto/zds.proto.
func TestAgentTells(t *testing.T) {
	const (
		add  = "\x0a\x17" + "\x0a\x03uid" + "\x12\x10" + "\x0a\x03web" + "\x12\x04demo" + "\x1a\x03svc"
		sent = "\x1a\x00"
		ack  = "\x0a\x00"
	)
	for _, c := range []struct {
		name    string
		answers []string
		heard   []string
		err     string
	}{
		{"taken", []string{ack, ack}, []string{add, sent}, ""},
		{"refused", []string{"\x0a\x06\x0a\x04nope"}, []string{add}, "nope"},
		{"nonsense", []string{"\x12\x00"}, []string{add}, "no acknowledgement"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "zds.sock")
			l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			namespace, err := os.Open("/proc/self/ns/net")
			if err != nil {
				t.Fatal(err)
			}
			defer namespace.Close()
			heard := make(chan []string, 1)
			go func() { heard <- fakeZtunnel(t, path, namespace, c.answers) }()
			agent, err := l.AcceptUnix()
			if err != nil {
				t.Fatal(err)
			}
			err = welcome(agent, []addition{{addWorkload("uid", "web", "demo", "svc"), int(namespace.Fd())}})
			agent.Close()
			if got := <-heard; strings.Join(got, "|") != strings.Join(c.heard, "|") {
				t.Errorf("it heard %q, want %q", got, c.heard)
			}
			if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
				t.Errorf("got error %v, want %q", err, c.err)
			}
		})
	}
}

// fakeZtunnel says hello and answers what it hears, and returns that. A pod's
// namespace has to come with it.
func fakeZtunnel(t *testing.T, path string, namespace *os.File, answers []string) (heard []string) {
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Error(err)
		return nil
	}
	defer c.Close()
	_, err = c.Write([]byte{1 << 3, 1}) // version 1
	for i := 0; err == nil && i < len(answers); i++ {
		buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
		var n, oobn int
		if n, oobn, _, _, err = c.ReadMsgUnix(buf, oob); err != nil {
			break
		}
		heard = append(heard, string(buf[:n]))
		if i == 0 && !same(t, oob[:oobn], namespace) {
			t.Error("the first message brings another descriptor, or none")
		}
		_, err = c.Write([]byte(answers[i]))
	}
	if err != nil && !errors.Is(err, unix.EPIPE) {
		t.Error(err)
	}
	return heard
}

func same(t *testing.T, oob []byte, namespace *os.File) bool {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(messages) != 1 {
		return false
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return false
	}
	f := os.NewFile(uintptr(fds[0]), "got")
	defer f.Close()
	got, err := f.Stat()
	if err != nil {
		t.Error(err)
		return false
	}
	want, err := namespace.Stat()
	return err == nil && os.SameFile(got, want)
}
