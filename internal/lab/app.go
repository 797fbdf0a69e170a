// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// App is an application that listens in a pod. Its code runs in this process, its sockets live in the pod; they are
// what Go's net package makes of them by default (MPTCP listeners, for one).
type App struct {
	Pod  *Pod
	Port uint16

	listener net.Listener
	server   *http.Server // of an HTTP application
	done     sync.WaitGroup

	mu     sync.Mutex // guards what follows
	peers  []netip.AddrPort
	conns  map[net.Conn]struct{}
	closed bool
}

// Listen listens in the pod. A network of "tcp" and an address of ":80" serve both families by one socket.
func (p *Pod) Listen(network, address string) (net.Listener, error) {
	var l net.Listener
	err := p.Do(func() (err error) {
		l, err = net.Listen(network, address)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen in %s: %w", p.Name, err)
	}
	return l, nil
}

// Dial connects from the pod as an ordinary application does.
func (p *Pod) Dial(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
	return p.DialWith(ctx, new(net.Dialer), to)
}

// DialWith is Dial with a dialer of the caller's: a local address, a Control function.
func (p *Pod) DialWith(ctx context.Context, d *net.Dialer, to netip.AddrPort) (*net.TCPConn, error) {
	return dial(ctx, p.Do, d, to.String())
}

func dial(ctx context.Context, do func(func() error) error, d *net.Dialer, to string) (*net.TCPConn, error) {
	var c net.Conn
	// With one literal address the dialer makes its socket on the calling thread.
	err := do(func() (err error) {
		c, err = d.DialContext(ctx, "tcp", to)
		return err
	})
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// HTTPClient returns a client whose connections begin in the pod, one for each request.
func (p *Pod) HTTPClient() *http.Client { return httpClient(p.Do) }

// HTTPClient returns a client whose connections begin in the node's namespace, one for each request.
func (n *Node) HTTPClient() *http.Client { return httpClient(n.Do) }

func httpClient(do func(func() error) error) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives:  true,
		DisableCompression: true, // a marker has to stay readable where it is in plaintext
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			c, err := dial(ctx, do, new(net.Dialer), address)
			if err != nil {
				return nil, err // not a nil *net.TCPConn in an interface
			}
			return c, nil
		},
	}}
}

// Serve runs handle for each connection to the port, on both families; the connection is closed when handle returns.
func (p *Pod) Serve(port uint16, handle func(*net.TCPConn)) (*App, error) {
	a, err := p.newApp(port)
	if err != nil {
		return nil, err
	}
	a.done.Go(func() {
		for {
			c, err := a.listener.Accept()
			if err != nil {
				return
			}
			if !a.admit(c) {
				c.Close()
				return
			}
			a.done.Go(func() {
				defer a.forget(c)
				handle(c.(*net.TCPConn))
			})
		}
	})
	return a, nil
}

func (p *Pod) newApp(port uint16) (*App, error) {
	l, err := p.Listen("tcp", fmt.Sprintf(":%d", port))
	if err != nil {
		return nil, err
	}
	a := &App{Pod: p, Port: l.Addr().(*net.TCPAddr).AddrPort().Port(), listener: l, conns: make(map[net.Conn]struct{})}
	p.Node.lab.mu.Lock()
	defer p.Node.lab.mu.Unlock()
	p.Node.lab.apps = append(p.Node.lab.apps, a)
	return a, nil
}

func (a *App) admit(c net.Conn) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return false
	}
	a.peers = append(a.peers, Peer(c))
	a.conns[c] = struct{}{}
	return true
}

func (a *App) forget(c net.Conn) {
	c.Close()
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.conns, c)
}

// Peer returns the address that a connection's getpeername says, v4-mapped ones as IPv4.
func Peer(c net.Conn) netip.AddrPort {
	a := c.RemoteAddr().(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// Peers returns the remote addresses of all connections accepted so far, in order.
func (a *App) Peers() []netip.AddrPort {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]netip.AddrPort(nil), a.peers...)
}

// Addr returns where the application is reached by a family: 4 or 6.
func (a *App) Addr(family int) netip.AddrPort {
	return netip.AddrPortFrom(a.Pod.Addr(family), a.Port)
}

// Close ends the application and its connections and waits for both.
func (a *App) Close() error {
	a.mu.Lock()
	a.closed = true
	a.listener.Close()
	for c := range a.conns {
		c.Close()
	}
	a.mu.Unlock()
	if a.server != nil {
		a.server.Close()
	}
	a.done.Wait()
	return nil
}

// Echo sends back what it gets, and half-closes when its peer does.
func (p *Pod) Echo(port uint16) (*App, error) {
	return p.Serve(port, func(c *net.TCPConn) {
		if _, err := io.Copy(c, c); err == nil {
			c.CloseWrite()
		}
	})
}

// Greet runs a server that speaks first: a greeting with its client's address, then "250 " and the line for each line
// that it gets, until QUIT.
func (p *Pod) Greet(port uint16, greeting string) (*App, error) {
	return p.Serve(port, func(c *net.TCPConn) {
		fmt.Fprintf(c, "220 %s %s\r\n", greeting, Peer(c))
		for s := bufio.NewScanner(c); s.Scan(); {
			if strings.TrimSpace(s.Text()) == "QUIT" {
				fmt.Fprint(c, "221 bye\r\n")
				return
			}
			fmt.Fprintf(c, "250 %s\r\n", s.Text())
		}
	})
}

// HTTP runs an HTTP server.
func (p *Pod) HTTP(port uint16, h http.Handler) (*App, error) {
	a, err := p.newApp(port)
	if err != nil {
		return nil, err
	}
	a.server = &http.Server{
		Handler: h, ReadHeaderTimeout: 10 * time.Second,
		ConnState: func(c net.Conn, s http.ConnState) {
			if s == http.StateNew {
				a.mu.Lock()
				a.peers = append(a.peers, Peer(c))
				a.mu.Unlock()
			}
		},
	}
	a.done.Go(func() { a.server.Serve(a.listener) })
	return a, nil
}

// WhoAmI is an HTTP handler that takes what it is sent, says who the client is as the server's socket sees it, and
// sends the body back after it.
func WhoAmI(name string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		addr, err := netip.ParseAddr(host)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Client-Address", addr.Unmap().String())
		fmt.Fprintf(w, "%s: you are %s, and you sent %d bytes\n", name, addr.Unmap(), len(body))
		w.Write(body)
	})
}

// Exchange sends text to an echo and wants it back.
func Exchange(c net.Conn, text string) error {
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	return Expect(c, text)
}

// Expect reads text, and wants it to be that.
func Expect(c net.Conn, text string) error {
	got := make([]byte, len(text))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != text {
		return fmt.Errorf("got %q, want %q", got, text)
	}
	return nil
}

// IsReset reports whether an error is a reset, as an application sees it.
func IsReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// Slowness is by how much an emulated machine is slower than others, as it says
// itself: 1 where it says nothing. Times in tests are multiplied by it.
func Slowness() time.Duration {
	n, _ := strconv.Atoi(os.Getenv("CULVERT_TEST_SLOWNESS"))
	return time.Duration(max(n, 1))
}

// Until calls f until it returns nil, every few milliseconds. When the context ends first, or one of the hopeless
// returns an error (Within, Process.Ended), the error says what was waited for, and the last reason.
func Until(ctx context.Context, what string, f func() error, hopeless ...func() error) error {
	const pause = 5 * time.Millisecond
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		for _, h := range hopeless {
			if end := h(); end != nil {
				return fmt.Errorf("wait until %s: %w", what, errors.Join(end, err))
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait until %s: %w", what, errors.Join(context.Cause(ctx), err))
		case <-tick.C:
		}
	}
}

// Within has Until give up once it has waited so long from now.
func Within(d time.Duration) func() error {
	end := time.Now().Add(d)
	return func() error {
		if time.Now().After(end) {
			return fmt.Errorf("has waited for %s", d)
		}
		return nil
	}
}
