// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cilium/ebpf"
)

const (
	// healAfter gathers what comes together, and bounds what a pod that changes
	// its routes for ever can cost.
	healAfter = 100 * time.Millisecond
	// healAgain is when what is not right is looked at again, unless something
	// happens before.
	healAgain = time.Second
	// notificationSize is enough for any of them; what is cut off is not read.
	notificationSize = 4096
)

// routingGroups are the multicast groups of rtnetlink that tell of what our
// routing rests on.
const routingGroups = 1<<(unix.RTNLGRP_LINK-1) |
	1<<(unix.RTNLGRP_IPV4_IFADDR-1) | 1<<(unix.RTNLGRP_IPV4_ROUTE-1) | 1<<(unix.RTNLGRP_IPV4_RULE-1) |
	1<<(unix.RTNLGRP_IPV6_IFADDR-1) | 1<<(unix.RTNLGRP_IPV6_ROUTE-1) | 1<<(unix.RTNLGRP_IPV6_RULE-1)

// healer puts a pod's rules and routes back where they went: with an address that
// was lost and came again, or by somebody's hand. While the address is away the
// pod is refused.
type healer struct {
	p    *Pod
	news *os.File // rtnetlink, in the pod's namespace
	done chan struct{}
	said map[netip.Addr]string // what does not work, as it was logged
}

func (p *Pod) startHealer() error {
	fd := -1
	err := p.cfg.NS.Do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: routingGroups})
	})
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return fmt.Errorf("listen for changes of its addresses: %w", err)
	}
	p.healer = &healer{p: p, news: os.NewFile(uintptr(fd), "rtnetlink"), done: make(chan struct{}), said: map[netip.Addr]string{}}
	go p.healer.run()
	return nil
}

func (h *healer) close() error {
	err := h.news.Close()
	<-h.done
	return err
}

func (h *healer) run() {
	defer close(h.done)
	buf := make([]byte, notificationSize)
	h.heal() // what has changed since it was set up
	for {
		wait := time.Time{}
		if len(h.said) > 0 {
			wait = time.Now().Add(healAgain)
		}
		for _, until := range []time.Time{wait, time.Now().Add(healAfter)} {
			if err := h.news.SetReadDeadline(until); err != nil {
				return // closed
			}
			for {
				_, err := h.news.Read(buf)
				switch {
				case errors.Is(err, os.ErrClosed):
					return
				case err != nil && !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, unix.ENOBUFS):
					h.p.n.cfg.Logger.Error("changes of a pod's routes are not seen any more", "pod", h.p.cfg.Name, "err", err)
					return
				}
				if until == wait || errors.Is(err, os.ErrDeadlineExceeded) {
					break // else there may be more
				}
			}
		}
		h.heal()
	}
}

// heal looks at each address, and says what has changed.
func (h *healer) heal() {
	log := h.p.n.cfg.Logger.With("pod", h.p.cfg.Name)
	for _, a := range h.p.Addrs() {
		var healed bool
		err := h.p.cfg.NS.Do(func() (err error) { healed, err = heal(a); return err })
		if err == nil {
			err = h.p.followDevice(a)
		}
		said, was := h.said[a]
		switch {
		case err != nil && said != err.Error():
			h.said[a] = err.Error()
			log.Error("a pod's connections are refused until this is mended", "address", a, "err", err)
		case err == nil && (was || healed):
			delete(h.said, a)
			log.Info("a pod's rule and route are there again", "address", a)
		}
	}
}

// heal sets rule and route for an address that is there and lacks them, on a
// thread in the namespace.
func heal(a netip.Addr) (healed bool, err error) {
	if checkRoute(a) == nil {
		return false, nil
	}
	found, err := findAddr(a)
	switch {
	case err != nil:
		return false, err
	case found == nil:
		return false, fmt.Errorf("no interface in the namespace has the address %s any more", a)
	case found.Flags&unix.IFA_F_TENTATIVE != 0 && found.Flags&unix.IFA_F_OPTIMISTIC == 0:
		return false, fmt.Errorf("the address %s is tentative (duplicate address detection)", a)
	}
	if err := addRouting(a); err != nil {
		return false, err
	}
	return true, checkRoute(a)
}

// followDevice has the steering know the device that holds an address by now.
func (p *Pod) followDevice(a netip.Addr) error {
	index, err := p.device(a)
	if err != nil || p.devices[a] == index {
		return err
	}
	if err := p.loadSteer(func(prog *ebpf.Program) error { return p.link.Update(prog) }); err != nil {
		return fmt.Errorf("replace the steering program for another device: %w", err)
	}
	return nil
}
