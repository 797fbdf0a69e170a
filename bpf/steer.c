//go:build ignore
// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Chooses the listener of a pod's incoming connections. One instance per pod:
 * sk_lookup has neither a mark nor a namespace cookie to go by.
 *
 * Runs for SYNs (and, under SYN cookies, for the ACK) that no connection takes.
 * SK_DROP is answered by a reset at once; SK_PASS is the kernel's own lookup.
 */
#include "culvert.h"

/* The pod's addresses in the mesh, all zero where it has none of that family. */
volatile const struct pod self = {};
/* The devices that hold them; 0: none. What comes in there is the mesh's business. */
volatile const __u32 device4 = 0;
volatile const __u32 device6 = 0;

/* Of the pod's namespace. */
volatile const __u64 cookie = 0;

static __always_inline int give(struct bpf_sk_lookup *ctx, __u32 slot, enum decision given)
{
	struct listener key = {.cookie = cookie, .slot = slot};
	struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, &key);
	long err;

	if (!sk) {
		count(DECISION_STEER_DROPPED_NO_LISTENER);
		return SK_DROP;
	}
	/* Else half of the connections go to another member of a reuseport group. */
	err = bpf_sk_assign(ctx, sk, BPF_SK_LOOKUP_F_NO_REUSEPORT);
	bpf_sk_release(sk);
	if (err) {
		count(DECISION_STEER_DROPPED_NOT_ASSIGNED);
		return SK_DROP;
	}
	count(given);
	return SK_PASS;
}

static __always_inline int is_own_port(__u32 port)
{
	return port == PORT_OUTBOUND || port == PORT_INBOUND || port == PORT_HBONE;
}

static __always_inline int is_self(const struct address *a)
{
	struct address v4 = {.w = {self.v4.w[0], self.v4.w[1], self.v4.w[2], self.v4.w[3]}};
	struct address v6 = {.w = {self.v6.w[0], self.v6.w[1], self.v6.w[2], self.v6.w[3]}};

	return equal(a, &v4) || equal(a, &v6);
}

static __always_inline int pass(enum decision d, __u32 port)
{
	if (is_own_port(port)) {
		count(DECISION_STEER_DROPPED_OWN_PORT);
		return SK_DROP;
	}
	count(d);
	return SK_PASS;
}

/*
 * On lo: what was marked, deliveries (which are bound to lo), loopback. The
 * device follows the route and not the wire: an address of eth0 that the pod
 * calls itself arrives with eth0, see from_device.
 */
static __always_inline int from_lo(struct bpf_sk_lookup *ctx, int v6, const struct address *local,
				   const struct address *remote)
{
	const __u32 *known;

	if (is_self(local))
		return pass(is_self(remote) ? DECISION_STEER_OWN_ADDRESS : DECISION_STEER_DELIVERY,
			    ctx->local_port);
	if (is_loopback(local))
		return pass(DECISION_STEER_LOOPBACK, ctx->local_port);
	if (is_probe(local))
		return give(ctx, v6 ? SLOT_OUTBOUND6 : SLOT_OUTBOUND4, DECISION_STEER_PROBE);
	known = bpf_map_lookup_elem(&destinations, local);
	if (known && *known == DESTINATION_HBONE)
		return give(ctx, v6 ? SLOT_OUTBOUND6 : SLOT_OUTBOUND4, DECISION_STEER_OUTBOUND);
	/*
	 * It was carried when it connected, and is not to be taken by the pod's own
	 * wildcard listeners. The reset of a drop could not be routed in IPv4, from
	 * an address that is not the pod's: the tunnel refuses it, and says so.
	 */
	if (known || in_cidrs(&mesh_cidrs, local))
		return give(ctx, v6 ? SLOT_OUTBOUND6 : SLOT_OUTBOUND4, DECISION_STEER_UNKNOWN);
	/* An address that the pod has given to lo. */
	return pass(DECISION_STEER_OTHER_ADDRESS, ctx->local_port);
}

static __always_inline int refuse(struct bpf_sk_lookup *ctx, const struct address *local,
				  const struct address *remote)
{
	struct event e = {.cookie = cookie, .decision = DECISION_STRICT_REFUSED};

	count(DECISION_STRICT_REFUSED);
	e.src = *remote;
	e.dst = *local;
	e.sport = bpf_ntohs(ctx->remote_port);
	e.dport = ctx->local_port;
	tell(&e);
	return SK_DROP;
}

static __always_inline int takes_plain(__u32 port)
{
	struct plain_port key = {.cookie = cookie, .port = port};
	const __u32 *plain;

	if (is_own_port(port))
		return 0;
	plain = bpf_map_lookup_elem(&plain_ports, &key);
	if (!plain) {
		key.port = 0;
		plain = bpf_map_lookup_elem(&plain_ports, &key);
	}
	return plain && *plain == PLAIN_TAKEN;
}

/* Plaintext from outside never gets a handshake (STRICT), but on ports that take it. */
static __always_inline int from_device(struct bpf_sk_lookup *ctx, int v6, const struct address *local,
				       const struct address *remote)
{
	/*
	 * The pod calls an address of its own, declared or not, perhaps from
	 * loopback. From outside those are martians in IPv4; in IPv6 the answer
	 * to a forged one stays in the pod.
	 */
	if (equal(local, remote) || is_loopback(remote) || is_self(remote))
		return pass(DECISION_STEER_OWN_ADDRESS, ctx->local_port);
	if (is_self(local)) {
		if (ctx->local_port == PORT_HBONE)
			return give(ctx, v6 ? SLOT_HBONE6 : SLOT_HBONE4, DECISION_STEER_HBONE);
		if (takes_plain(ctx->local_port))
			return give(ctx, v6 ? SLOT_INBOUND6 : SLOT_INBOUND4, DECISION_STEER_PLAIN);
		return refuse(ctx, local, remote);
	}
	/* An undeclared address of the mesh's device, link-local ones among them, is no way around. */
	if (ctx->ingress_ifindex == device4 || ctx->ingress_ifindex == device6)
		return refuse(ctx, local, remote);
	return pass(DECISION_STEER_OTHER_ADDRESS, ctx->local_port);
}

SEC("sk_lookup")
int steer(struct bpf_sk_lookup *ctx)
{
	int v6 = ctx->family == AF_INET6;
	struct address local, remote;

	if (ctx->protocol != IPPROTO_TCP) {
		count(DECISION_STEER_NOT_TCP);
		return SK_PASS;
	}
	if (v6) {
		read6(&local, ctx->local_ip6);
		read6(&remote, ctx->remote_ip6);
	} else {
		set4(&local, READ(ctx->local_ip4));
		set4(&remote, READ(ctx->remote_ip4));
	}
	if (ctx->ingress_ifindex == LO)
		return from_lo(ctx, v6, &local, &remote);
	return from_device(ctx, v6, &local, &remote);
}

char _license[] SEC("license") = "Dual BSD/GPL";
