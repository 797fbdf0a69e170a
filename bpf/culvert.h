/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the programs share with each other and with package redirect.
 *
 * Addresses are 16 bytes in network order everywhere, IPv4 as ::ffff:a.b.c.d
 * (RFC 4291 section 2.5.5.2): a dual-stack socket reaches IPv4 through connect6
 * in that form, and one map serves both families.
 *
 * A change of a map's key, value, type or flags is a change of layout: count
 * layout up in redirect/node.go.
 */
#ifndef CULVERT_H
#define CULVERT_H

#include <linux/types.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

/* SO_MARK of what is carried, and of deliveries: the pod's ip rule sends it to lo. */
#define MARK 0x53a

/* The tunnel's ports in a pod. No pod reaches its own listeners by dialling them. */
#define PORT_OUTBOUND 15001
#define PORT_INBOUND 15006
#define PORT_HBONE 15008

/* lo is device 1 of every namespace (include/net/flow.h: LOOPBACK_IFINDEX). */
#define LO 1

/* linux/socket.h, linux/in.h, asm-generic/socket.h, asm-generic/errno.h; they need libc's headers. */
#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define SOL_SOCKET 1
#define SO_BINDTODEVICE 25
#define SO_MARK 36
#define SO_BINDTOIFINDEX 62
#define TCP_CLOSE 7 /* net/tcp_states.h */
#define ECONNREFUSED 111

#ifndef NULL
#define NULL ((void *)0)
#endif

/* Kubernetes runs 110 pods on a node by default, 500 at the most that anyone supports. */
#define MAX_PODS 4096
/* About 130,000 dual-stack workloads; memory is taken as it is filled, some 80 bytes each. */
#define MAX_DESTINATIONS 262144
/* Written by hand in a configuration file. */
#define MAX_CIDRS 4096

/* Sixteen ports with a mode of their own in every pod there can be. */
#define MAX_PLAIN_PORTS (16 * MAX_PODS)

/* Some 2,900 events (bytes; a power of two, and whole pages of any size). */
#define MAX_EVENTS (256 * 1024)

/* Slots of a pod in `listeners`. */
enum slot {
	SLOT_OUTBOUND4,
	SLOT_OUTBOUND6,
	SLOT_HBONE4,
	SLOT_HBONE6,
	SLOT_INBOUND4, /* plaintext from outside, where the pod takes it */
	SLOT_INBOUND6,
	SLOTS,
};

/* Values of `destinations`. */
enum destination {
	DESTINATION_HBONE = 1, /* carried */
	DESTINATION_TCP, /* known, takes plaintext */
	DESTINATION_REFUSE, /* known to be dead */
};

/*
 * What a program decided, or failed to do: one counter each. User space reads
 * the names from the object's BTF, in lower case and without DECISION_.
 */
enum decision {
	/* connect hooks: passed */
	DECISION_CONNECT_NOT_TCP,
	DECISION_CONNECT_NOT_ENROLLED,
	DECISION_CONNECT_OWN_SOCKET, /* the tunnel's */
	DECISION_CONNECT_LOOPBACK,
	DECISION_CONNECT_OWN_ADDRESS, /* the pod calls itself */
	DECISION_CONNECT_BYPASS,
	DECISION_TCP_DESTINATION, /* to a workload that takes plaintext */
	DECISION_CONNECT_OUTSIDE, /* beyond the mesh */
	/* connect hooks: marked */
	DECISION_CONNECT_CARRIED,
	DECISION_CONNECT_PROBE, /* to the probe's address: likewise */
	/* connect hooks: refused */
	DECISION_CONNECT_REFUSED_DESTINATION,
	DECISION_CONNECT_REFUSED_UNKNOWN, /* inside a mesh CIDR */
	DECISION_CONNECT_REFUSED_NO_ADDRESS, /* the pod has none of this family in the mesh */
	DECISION_CONNECT_REFUSED_DEVICE, /* bound to a device, and rebinding it failed */
	DECISION_CONNECT_REFUSED_NO_SOCKET, /* the kernel gave the hook none */
	DECISION_CONNECT_REFUSED_NO_LISTENER, /* no daemon */
	DECISION_CONNECT_REFUSED_NO_MARK, /* setting the mark failed */
	/* connect hooks: beside one of the above */
	DECISION_CONNECT_MARK_REPLACED, /* an application's own mark */
	DECISION_CONNECT_MARK_CLEARED, /* ours, of an earlier connect */
	DECISION_CONNECT_MARK_KEPT, /* ours, and clearing it failed */
	DECISION_CONNECT_REBOUND, /* from its device to none */
	DECISION_CONNECT_NO_ERRNO, /* refused, with EPERM for want of ECONNREFUSED */
	/* setsockopt hook: refused, with EPERM */
	DECISION_OPTION_REFUSED, /* mark or device of a carried socket */
	/* sk_lookup: passed */
	DECISION_STEER_NOT_TCP,
	DECISION_STEER_LOOPBACK,
	DECISION_STEER_DELIVERY,
	DECISION_STEER_OWN_ADDRESS,
	DECISION_STEER_OTHER_ADDRESS, /* not the pod's in the mesh */
	/* sk_lookup: given to a listener of the tunnel */
	DECISION_STEER_OUTBOUND,
	DECISION_STEER_PROBE, /* likewise */
	DECISION_STEER_UNKNOWN, /* to the same, which refuses it: not carried any more */
	DECISION_STEER_HBONE,
	DECISION_STEER_PLAIN, /* plaintext, to a port that takes it */
	/* sk_lookup: dropped, which answers with a reset */
	DECISION_STRICT_REFUSED,
	DECISION_STEER_DROPPED_OWN_PORT,
	DECISION_STEER_DROPPED_NO_LISTENER,
	DECISION_STEER_DROPPED_NOT_ASSIGNED,
	/* any: an event that found no room, or that nobody reads */
	DECISION_EVENT_LOST,
	DECISIONS,
};

/* Values of `plain_ports`. */
enum plain {
	PLAIN_TAKEN = 1, /* plaintext is given to the inbound listener */
	PLAIN_REFUSED, /* but not on this port */
};

struct address {
	__be32 w[4];
};

/* A pod's addresses in the mesh; all zero where it has none of that family. */
struct pod {
	struct address v4;
	struct address v6;
	__u32 carried; /* 0 until its probe has arrived: only probes are, then */
};

/* The family comes first, or ::/0 would be a prefix of every IPv4 address too. */
struct cidr {
	__u32 bits; /* of what follows: 32 more, and 96 more for IPv4 */
	__u32 family; /* AF_INET, AF_INET6 */
	struct address addr;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, DECISIONS);
	__type(key, enum decision); /* so that its names are in the object's BTF */
	__type(value, __u64);
} decisions SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_DESTINATIONS);
	__type(key, struct address);
	__type(value, __u32);
} destinations SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_CIDRS);
	__type(key, struct cidr);
	__type(value, __u32);
} mesh_cidrs SEC(".maps");

/*
 * Atomic: a connect hook can be preempted by another on the same CPU.
 */
static __always_inline void count(enum decision d)
{
	__u32 key = d;
	__u64 *n = bpf_map_lookup_elem(&decisions, &key);

	if (n)
		__sync_fetch_and_add(n, 1);
}

/* A pod's listener: by its namespace's cookie. */
struct listener {
	__u64 cookie;
	__u32 slot; /* enum slot */
	__u32 zero;
};

/*
 * A listener that is closed leaves its slot by itself, so that a dead daemon's
 * are empty: the connect hook then refuses, and so does sk_lookup. (A reset
 * alone would not do: the kernel cannot route one from an address that is not
 * the pod's, and the client would wait.)
 */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, MAX_PODS *SLOTS);
	__type(key, struct listener);
	__type(value, __u64);
} listeners SEC(".maps");

struct plain_port {
	__u64 cookie; /* of the pod's namespace */
	__u32 port; /* 0: all that have no row of their own */
	__u32 zero;
};

/* Where pods take plaintext (enum plain). No row: nowhere (STRICT). */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PLAIN_PORTS);
	__type(key, struct plain_port);
	__type(value, __u32);
} plain_ports SEC(".maps");

/* A decision that a user is to hear of: what was refused, or let pass in plaintext. */
struct event {
	__u64 cookie; /* of the pod's namespace */
	__u64 ns; /* CLOCK_MONOTONIC */
	__u32 decision;
	__u32 uid; /* connect hooks: of who called; else 0 */
	struct address src; /* connect hooks: the pod's, whatever it is bound to */
	struct address dst;
	__u16 sport; /* host order; connect hooks: 0 */
	__u16 dport;
	char comm[16]; /* connect hooks: of who called; else empty */
	__u32 zero;
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, MAX_EVENTS);
} events SEC(".maps");

/*
 * Never waits, and wakes nobody: user space looks by itself, so that a flood
 * costs no wakeups. What does not fit is lost, and counted. (A reserved record
 * would save a copy, but Linux 6.1 loses track of it where the compiler asks
 * twice whether there is one.)
 */
static __always_inline void tell(struct event *e)
{
	e->ns = bpf_ktime_get_ns();
	if (bpf_ringbuf_output(&events, e, sizeof(*e), BPF_RB_NO_WAKEUP))
		count(DECISION_EVENT_LOST);
}

static __always_inline void set4(struct address *a, __be32 ip)
{
	a->w[0] = 0;
	a->w[1] = 0;
	a->w[2] = bpf_htonl(0xffff);
	a->w[3] = ip;
}

/*
 * Loads where it stands. The compiler would join the loads of both families and
 * choose between two addresses in a context or a socket, whose fields may be read
 * at a constant place only.
 */
#define READ(field)                                                                                          \
	({                                                                                                   \
		__u32 v = (field);                                                                           \
		asm volatile("" : "+r"(v));                                                                  \
		v;                                                                                           \
	})

#define read6(a, ip6)                                                                                        \
	do {                                                                                                 \
		(a)->w[0] = READ((ip6)[0]);                                                                  \
		(a)->w[1] = READ((ip6)[1]);                                                                  \
		(a)->w[2] = READ((ip6)[2]);                                                                  \
		(a)->w[3] = READ((ip6)[3]);                                                                  \
	} while (0)

static __always_inline int is4(const struct address *a)
{
	return !a->w[0] && !a->w[1] && a->w[2] == bpf_htonl(0xffff);
}

static __always_inline int is_zero(const struct address *a)
{
	return !(a->w[0] | a->w[1] | a->w[2] | a->w[3]);
}

static __always_inline int equal(const struct address *a, const struct address *b)
{
	return a->w[0] == b->w[0] && a->w[1] == b->w[1] && a->w[2] == b->w[2] && a->w[3] == b->w[3];
}

/* 127.0.0.0/8 and ::1. */
static __always_inline int is_loopback(const struct address *a)
{
	if (is4(a))
		return (a->w[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !a->w[0] && !a->w[1] && !a->w[2] && a->w[3] == bpf_htonl(1);
}

/*
 * What redirect.Pod.Probe connects to, always carried: 192.0.0.8, the dummy address
 * of RFC 7600, and 100::1, of the discard prefix of RFC 6666. Nobody has them.
 */
static __always_inline int is_probe(const struct address *a)
{
	if (is4(a))
		return a->w[3] == bpf_htonl(0xc0000008);
	return a->w[0] == bpf_htonl(0x01000000) && !a->w[1] && !a->w[2] && a->w[3] == bpf_htonl(1);
}

/* 0.0.0.0 and ::, which connect() takes for loopback. */
static __always_inline int is_unspecified(const struct address *a)
{
	return is4(a) ? !a->w[3] : is_zero(a);
}

static __always_inline int in_cidrs(void *cidrs, const struct address *a)
{
	struct cidr key = {.bits = 160, .family = is4(a) ? AF_INET : AF_INET6, .addr = *a};

	return bpf_map_lookup_elem(cidrs, &key) != NULL;
}

#endif
