// SPDX-License-Identifier: Apache-2.0

// Package bpf holds the BPF programs, in C, and what bpf2go makes of them: the
// objects and their Go side, both committed, so that a user needs no clang.
// Package redirect loads, attaches and pins them.
//
// Connect is the pair of connect hooks shared by the node; Steer is the
// sk_lookup program, loaded once per pod. Kernel 5.18 or newer
// (bpf_set_retval; ingress_ifindex of sk_lookup came with 5.17).
package bpf

//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -no-global-types -type pod -type cidr -type address -type listener -type plain_port Connect connect.c -- -mcpu=v3 -nostdinc -I headers -Wall -Werror
//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -no-global-types Steer steer.c -- -mcpu=v3 -nostdinc -I headers -Wall -Werror
