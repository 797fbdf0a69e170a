// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/culvert-mesh/culvert/internal/capture"
	"github.com/culvert-mesh/culvert/internal/cli"
	"github.com/culvert-mesh/culvert/internal/lab"
)

const (
	webPort, mailPort = 8080, 2525
	// requests are made by each family, on a connection each.
	requests = 10
	// bodySize is what a request carries, and its answer again (bytes).
	bodySize = 128 << 10
	// exchangePatience bounds one exchange: on one machine it takes milliseconds.
	exchangePatience = 5 * time.Second
)

// families are the IP versions that everything is shown for.
var families = []int{4, 6}

// stage is the lab with its applications: shop and batch on the first node, web and mail on the second.
type stage struct {
	lab                    *lab.Lab
	shop, batch, web, mail *lab.Pod
	ztunnel                string
	marker                 string
	daemons                []*lab.Daemon
}

func newStage(ctx context.Context, o options) (*stage, error) {
	l, err := lab.New(ctx, lab.Config{Prefix: o.prefix})
	if err != nil {
		return nil, err
	}
	var random [8]byte
	rand.Read(random[:])
	s := &stage{
		lab: l, ztunnel: o.ztunnel, marker: "culvert-demo-secret-" + hex.EncodeToString(random[:]),
		shop: l.Pod(1, 1), batch: l.Pod(1, 2), web: l.Pod(2, 1), mail: l.Pod(2, 2),
	}
	for p, name := range map[*lab.Pod]string{s.shop: "shop", s.batch: "batch", s.web: "web", s.mail: "mail"} {
		p.Name, p.ServiceAccount = name, name
	}
	if _, err = s.web.HTTP(webPort, lab.WhoAmI("web")); err == nil {
		_, err = s.mail.Greet(mailPort, "mail")
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *stage) close() error { return s.lab.Close() }

func (s *stage) introduce(w io.Writer) {
	fmt.Fprintln(w, "Two nodes with two pods each, in network namespaces of this machine:")
	t := cli.NewTable()
	t.Indent = "  "
	for _, n := range s.lab.Nodes {
		for _, p := range n.Pods {
			t.Row(n.Name, p.Name, p.V4, p.V6)
		}
	}
	t.WriteTo(w)
	fmt.Fprintf(w, "shop calls web (HTTP, port %d); batch calls mail (port %d), which speaks first.\n", webPort, mailPort)
}

// startDaemons starts a ztunnel on each node and waits until both are ready.
func (s *stage) startDaemons(ctx context.Context) error {
	errs := make([]error, len(s.lab.Nodes))
	s.daemons = make([]*lab.Daemon, len(s.lab.Nodes))
	var wg sync.WaitGroup
	for i, n := range s.lab.Nodes {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
			defer cancel()
			s.daemons[i], errs[i] = n.StartDaemon(ctx, lab.DaemonConfig{Binary: s.ztunnel})
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// outcome is what the applications saw of one round of traffic, and what the wire did.
type outcome struct {
	clients   map[int][]netip.Addr // family: as whom web saw its client, by request
	greetings map[int]string       // family: what mail said first
	errs      map[string]error     // exchange: what went wrong
	transfer  int64                // bytes that the applications sent

	wireErr    error
	plain      int   // segments with payload between pods on another port than 15008
	tunnel     int64 // bytes of payload on port 15008
	marker     int   // times that the marker crossed
	unreadable int   // frames that may hold TCP and cannot be read
	firstPlain string
}

const hbonePort = 15008

// exchange makes the traffic while a capture runs between the nodes.
func (s *stage) exchange(ctx context.Context, pcap string) outcome {
	o := outcome{
		clients: map[int][]netip.Addr{}, greetings: map[int]string{},
		errs: map[string]error{},
	}
	node := s.lab.Nodes[0]
	wire, err := capture.Start(capture.Config{
		NS: node.NS, Interface: node.Uplink(s.lab.Nodes[1]), Markers: []string{s.marker}, Pcap: pcap,
	})
	if err != nil {
		o.wireErr = err
		return o
	}
	for _, family := range families {
		if err := s.http(ctx, family, &o); err != nil {
			o.errs[httpLabel(family)] = err
		}
		if err := s.speaksFirst(ctx, family, &o); err != nil {
			o.errs[mailLabel(family)] = err
		}
	}
	o.wireErr = wire.Close()
	pods := lab.PodCIDRs()
	plain := func(c capture.Segment) bool { return c.Between(pods...) && !c.Port(hbonePort) }
	o.plain, _ = wire.Payload(plain)
	for _, c := range wire.Segments(func(c capture.Segment) bool { return plain(c) && c.Len > 0 }) {
		o.firstPlain = fmt.Sprintf("%s to %s, %d bytes", c.Src, c.Dst, c.Len)
		break
	}
	_, o.tunnel = wire.Payload(func(c capture.Segment) bool { return c.Port(hbonePort) })
	o.marker = wire.Seen(0)
	o.unreadable = wire.Unreadable()
	return o
}

// http sends requests from shop to web, each on a connection of its own and with the marker at both ends of its body.
func (s *stage) http(ctx context.Context, family int, o *outcome) error {
	client := s.shop.HTTPClient()
	client.Timeout = exchangePatience
	body := []byte(s.marker + strings.Repeat(".", bodySize-2*len(s.marker)) + s.marker)
	url := "http://" + netip.AddrPortFrom(s.web.Addr(family), webPort).String() + "/"
	for i := range requests {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return fmt.Errorf("request %d: %w", i+1, err)
		}
		answer, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			return fmt.Errorf("answer %d: %w", i+1, err)
		}
		if resp.StatusCode != http.StatusOK || !bytes.HasSuffix(answer, body) {
			return fmt.Errorf("answer %d: %s, %d bytes, without the %d sent", i+1, resp.Status, len(answer), len(body))
		}
		seen, err := netip.ParseAddr(resp.Header.Get("Client-Address"))
		if err != nil {
			return fmt.Errorf("answer %d: %w", i+1, err)
		}
		o.clients[family] = append(o.clients[family], seen)
		o.transfer += int64(len(body) + len(answer))
	}
	return nil
}

// speaksFirst connects from batch to mail and says nothing until mail has.
func (s *stage) speaksFirst(ctx context.Context, family int, o *outcome) error {
	ctx, cancel := context.WithTimeout(ctx, exchangePatience)
	defer cancel()
	c, err := s.batch.Dial(ctx, netip.AddrPortFrom(s.mail.Addr(family), mailPort))
	if err != nil {
		return err
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)
	r := bufio.NewReader(c)
	greeting, err := r.ReadString('\n')
	if err != nil {
		return fmt.Errorf("wait for the greeting: %w", err)
	}
	o.greetings[family] = strings.TrimSpace(greeting)
	line := "HELO " + s.marker
	if _, err := fmt.Fprintf(c, "%s\r\nQUIT\r\n", line); err != nil {
		return fmt.Errorf("answer the greeting: %w", err)
	}
	rest, err := io.ReadAll(r)
	if err != nil {
		return fmt.Errorf("read the answer: %w", err)
	}
	if want := "250 " + line + "\r\n221 bye\r\n"; string(rest) != want {
		return fmt.Errorf("the answer is %q", rest)
	}
	o.transfer += int64(len(greeting) + len(line) + len("\r\nQUIT\r\n") + len(rest))
	return nil
}

// logs prints the end of both daemons' logs.
func (s *stage) logs(w io.Writer) {
	for _, d := range s.daemons {
		if d != nil {
			fmt.Fprintf(w, "\nThe end of %s's log:\n%s\n", d.Node.Name, d.LogTail(15))
		}
	}
}

// invite says how to look around in what is left running.
func (s *stage) invite(w io.Writer) {
	node := s.lab.Nodes[0]
	fmt.Fprintf(w, `
All of it runs until Ctrl-C. From another terminal, what crosses between the nodes:
  sudo nsenter --net=%s tcpdump -nni %s -A tcp
and a call through the tunnel:
  sudo nsenter --net=%s curl -s -d hello http://%s/
(nsenter --net rather than ip netns exec, which hides the cgroups.) Logs are below %s.
`, node.NetnsPath(), node.Uplink(s.lab.Nodes[1]),
		s.shop.NetnsPath(), netip.AddrPortFrom(s.web.V4, webPort), s.lab.Dir)
}
