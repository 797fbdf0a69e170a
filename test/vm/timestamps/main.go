// SPDX-License-Identifier: Apache-2.0

// Timestamps keeps the kernel's time stamps of packets on for as long as it runs.
// Each capture of the tests would turn them on and off, by rewriting code that other
// processors run (netstamp_needed_key), and with emulated ones a kernel was seen to
// fall over that: "Oops: int3" in __netif_receive_skb_core.
package main

import (
	"log"

	"golang.org/x/sys/unix"
)

func main() {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		log.Fatal(err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1); err != nil {
		log.Fatal(err)
	}
	for {
		_ = unix.Pause()
	}
}
