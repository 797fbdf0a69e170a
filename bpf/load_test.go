// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause

package bpf_test

import (
	"errors"
	"os"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/culvert-mesh/culvert/bpf"
)

// The programs are what the verifier of this kernel takes.
func TestProgramsLoad(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("loading BPF programs needs root: run with sudo")
	}
	for name, load := range map[string]func() (*ebpf.CollectionSpec, error){"connect": bpf.LoadConnect, "steer": bpf.LoadSteer} {
		spec, err := load()
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range spec.Maps {
			m.Pinning = ebpf.PinNone
		}
		c, err := ebpf.NewCollection(spec)
		if err != nil {
			var ve *ebpf.VerifierError
			if errors.As(err, &ve) {
				t.Fatalf("%s: %+v", name, ve)
			}
			t.Fatalf("%s: %v", name, err)
		}
		c.Close()
	}
}
