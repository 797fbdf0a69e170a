// SPDX-License-Identifier: Apache-2.0

package relay_test

import (
	"io"
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/culvert-mesh/culvert/tunnel/relay"
)

// sendAround sends bytes before and after an urgent one, all before the loop of
// w looks: a read ends at the urgent one, though more is there.
func sendAround(t *testing.T, w *relay.Worker, c *net.TCPConn) {
	t.Helper()
	defer hold(w)()
	rc, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []struct {
		text  string
		flags int
	}{{"before ", 0}, {"!", unix.MSG_OOB}, {"after", 0}} {
		if cerr := rc.Control(func(fd uintptr) { err = unix.Sendto(int(fd), []byte(part.text), part.flags, nil) }); cerr != nil || err != nil {
			t.Fatal(cerr, err)
		}
	}
}

func TestWhatIsBehindAnUrgentByteIsRead(t *testing.T) {
	r := newRig(t, 2, echo)
	c := r.dial()
	exchange(t, c)
	sendAround(t, r.client, c)
	got := make([]byte, len("before after"))
	if n, err := io.ReadFull(c, got); err != nil || string(got) != "before after" {
		t.Errorf("came back: %q, %v", got[:n], err)
	}
}

func TestPipeReadsWhatIsBehindAnUrgentByte(t *testing.T) {
	p := newPipes(t)
	_, client, app := p.open(0)
	sendAround(t, p.w, client)
	got := make([]byte, len("before after"))
	if n, err := io.ReadFull(app, got); err != nil || string(got) != "before after" {
		t.Errorf("arrived: %q, %v", got[:n], err)
	}
}
