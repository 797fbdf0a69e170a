// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net"
	"os"
)

// notifyReady tells the service manager that has started this process that it is
// ready (sd_notify(3)); where none has asked for it, it does nothing.
func notifyReady() error {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return nil
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"}) // "@name" is an abstract one for both
	if err == nil {
		defer c.Close()
		_, err = c.Write([]byte("READY=1"))
	}
	if err != nil {
		return fmt.Errorf("tell the service manager of readiness: %w", err)
	}
	return nil
}
