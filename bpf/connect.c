//go:build ignore
// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Marks the TCP sockets of enrolled pods that connect to what is carried, and
 * refuses those that must not leave in plaintext. Nothing is rewritten: the
 * pod's ip rule sends what is marked to lo, where steer.c finds it.
 *
 * Attached at a cgroup (cgroup/connect4, connect6). A socket of the tunnel's own
 * is known by its storage, which user space sets by descriptor and accepted
 * sockets inherit; not by its mark, which any container may set (CAP_NET_RAW).
 * What is carried stays so: a third hook keeps its mark (cgroup/setsockopt).
 */
#include "culvert.h"

#define REFUSE 0
#define PASS 1

/* By network namespace cookie, which is never used again while the machine runs. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS);
	__type(key, __u64);
	__type(value, struct pod);
} enrolled SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_CIDRS);
	__type(key, struct cidr);
	__type(value, __u32);
} bypass SEC(".maps");

/* Bounded by the sockets there are. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, int);
	__type(value, __u32);
} own_sockets SEC(".maps");

static __always_inline enum decision decide(const struct pod *pod, const struct address *dst)
{
	const __u32 *known;

	if (is_loopback(dst) || is_unspecified(dst))
		return DECISION_CONNECT_LOOPBACK;
	if (equal(dst, &pod->v4) || equal(dst, &pod->v6))
		return DECISION_CONNECT_OWN_ADDRESS;
	if (is_probe(dst))
		return DECISION_CONNECT_PROBE;
	if (in_cidrs(&bypass, dst))
		return DECISION_CONNECT_BYPASS;
	known = bpf_map_lookup_elem(&destinations, dst);
	if (!known)
		return in_cidrs(&mesh_cidrs, dst) ? DECISION_CONNECT_REFUSED_UNKNOWN
						  : DECISION_CONNECT_OUTSIDE;
	if (*known == DESTINATION_TCP)
		return DECISION_TCP_DESTINATION;
	if (*known != DESTINATION_HBONE)
		return DECISION_CONNECT_REFUSED_DESTINATION;
	if (is_zero(is4(dst) ? &pod->v4 : &pod->v6))
		return DECISION_CONNECT_REFUSED_NO_ADDRESS;
	return DECISION_CONNECT_CARRIED;
}

/*
 * An application may bind to a device without privilege (since 5.7), and the
 * route to lo would not be found. The kernel lets only CAP_NET_RAW bind again.
 * To none, as others are: answers to a pod's own address come in by the device
 * that has it, says the route, so one bound to lo would not hear them.
 */
static __always_inline enum decision mark(struct bpf_sock_addr *ctx, struct bpf_sock *sk, enum decision marked)
{
	__u32 old = 0, new = MARK;
	int none = 0;

	if (sk->bound_dev_if) {
		if (bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTOIFINDEX, &none, sizeof(none)))
			return DECISION_CONNECT_REFUSED_DEVICE;
		count(DECISION_CONNECT_REBOUND);
	}
	bpf_getsockopt(ctx, SOL_SOCKET, SO_MARK, &old, sizeof(old));
	if (old == MARK)
		return marked;
	if (old)
		count(DECISION_CONNECT_MARK_REPLACED);
	if (bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &new, sizeof(new)))
		return DECISION_CONNECT_REFUSED_NO_MARK;
	return marked;
}

/*
 * A socket that was carried connects to something that is not. Were its mark
 * kept, it would be sent to lo and reset there: wrong, but nothing leaks.
 */
static __always_inline void unmark(struct bpf_sock_addr *ctx)
{
	__u32 old = 0, none = 0;

	if (bpf_getsockopt(ctx, SOL_SOCKET, SO_MARK, &old, sizeof(old)) || old != MARK)
		return;
	if (bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &none, sizeof(none))) {
		count(DECISION_CONNECT_MARK_KEPT);
		return;
	}
	count(DECISION_CONNECT_MARK_CLEARED);
}

/* Without a daemon nothing takes the connection: say so now. */
static __always_inline int is_served(__u64 cookie, const struct address *dst)
{
	struct listener key = {.cookie = cookie, .slot = is4(dst) ? SLOT_OUTBOUND4 : SLOT_OUTBOUND6};
	struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, &key);

	if (!sk)
		return 0;
	bpf_sk_release(sk);
	return 1;
}

static __always_inline void report(struct bpf_sock_addr *ctx, enum decision d, __u64 cookie,
				   const struct pod *pod, const struct address *dst)
{
	struct event e = {.cookie = cookie, .decision = d};

	e.uid = bpf_get_current_uid_gid();
	e.src = is4(dst) ? pod->v4 : pod->v6;
	e.dst = *dst;
	e.dport = bpf_ntohs(ctx->user_port);
	bpf_get_current_comm(e.comm, sizeof(e.comm));
	tell(&e);
}

static __always_inline int refuse(struct bpf_sock_addr *ctx, enum decision d, __u64 cookie,
				  const struct pod *pod, const struct address *dst)
{
	count(d);
	report(ctx, d, cookie, pod, dst);
	if (bpf_set_retval(-ECONNREFUSED))
		count(DECISION_CONNECT_NO_ERRNO);
	return REFUSE;
}

static __always_inline int capture(struct bpf_sock_addr *ctx, const struct address *dst)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	const struct pod *pod;
	enum decision d;

	if (ctx->protocol != IPPROTO_TCP) {
		count(DECISION_CONNECT_NOT_TCP);
		return PASS;
	}
	pod = bpf_map_lookup_elem(&enrolled, &cookie);
	if (!pod) {
		count(DECISION_CONNECT_NOT_ENROLLED);
		return PASS;
	}
	if (!ctx->sk)
		return refuse(ctx, DECISION_CONNECT_REFUSED_NO_SOCKET, cookie, pod, dst);
	if (bpf_sk_storage_get(&own_sockets, ctx->sk, NULL, 0)) {
		count(DECISION_CONNECT_OWN_SOCKET);
		return PASS;
	}
	d = decide(pod, dst);
	if (d == DECISION_CONNECT_CARRIED || d == DECISION_CONNECT_PROBE)
		d = (pod->carried || d == DECISION_CONNECT_PROBE) && is_served(cookie, dst) ?
			    mark(ctx, ctx->sk, d) :
			    DECISION_CONNECT_REFUSED_NO_LISTENER;
	switch (d) {
	case DECISION_CONNECT_CARRIED:
	case DECISION_CONNECT_PROBE:
		count(d);
		return PASS;
	case DECISION_TCP_DESTINATION:
		report(ctx, d, cookie, pod, dst);
		/* fallthrough */
	case DECISION_CONNECT_LOOPBACK:
	case DECISION_CONNECT_OWN_ADDRESS:
	case DECISION_CONNECT_BYPASS:
	case DECISION_CONNECT_OUTSIDE:
		unmark(ctx);
		count(d);
		return PASS;
	default:
		return refuse(ctx, d, cookie, pod, dst);
	}
}

SEC("cgroup/connect4")
int capture4(struct bpf_sock_addr *ctx)
{
	struct address dst;

	set4(&dst, ctx->user_ip4);
	return capture(ctx, &dst);
}

/* Also what a dual-stack socket connects to over IPv4; connect4 is not called for it. */
SEC("cgroup/connect6")
int capture6(struct bpf_sock_addr *ctx)
{
	struct address dst;

	read6(&dst, ctx->user_ip6);
	return capture(ctx, &dst);
}

/*
 * The kernel hands programs no more than a page of an option's value, and refuses
 * longer ones (iptables' tables, say) unless a program says that it has not
 * touched it. The least page there is.
 */
#define MAX_OPTION 4096

/*
 * CAP_NET_RAW, which containers have by default, lets an application change mark
 * and device of a connection: what was carried would go on by eth0, in plaintext.
 * So would an application's accepted socket that has its mark from a delivery.
 * A closed socket may do as it likes: its next connect() is judged anew.
 *
 * Runs for every setsockopt() below the cgroup: what is not meant leaves first.
 */
SEC("cgroup/setsockopt")
int keep(struct bpf_sockopt *ctx)
{
	struct event e = {.decision = DECISION_OPTION_REFUSED};
	struct bpf_sock *sk = ctx->sk;
	__u64 cookie;

	if (ctx->optlen > MAX_OPTION)
		ctx->optlen = 0;
	if (ctx->level != SOL_SOCKET)
		return PASS;
	if (ctx->optname != SO_MARK && ctx->optname != SO_BINDTODEVICE && ctx->optname != SO_BINDTOIFINDEX)
		return PASS;
	if (!sk || sk->mark != MARK || sk->protocol != IPPROTO_TCP || sk->state == TCP_CLOSE)
		return PASS;
	cookie = bpf_get_netns_cookie(ctx);
	if (!bpf_map_lookup_elem(&enrolled, &cookie))
		return PASS;
	if (bpf_sk_storage_get(&own_sockets, sk, NULL, 0))
		return PASS;
	count(DECISION_OPTION_REFUSED);
	e.cookie = cookie;
	if (sk->family == AF_INET) {
		set4(&e.src, READ(sk->src_ip4));
		set4(&e.dst, READ(sk->dst_ip4));
	} else {
		read6(&e.src, sk->src_ip6);
		read6(&e.dst, sk->dst_ip6);
	}
	e.sport = sk->src_port;
	e.dport = bpf_ntohs(sk->dst_port);
	tell(&e);
	return REFUSE;
}

/* bpf_setsockopt, bpf_sk_storage_get: the kernel asks for a GPL-compatible program. */
char _license[] SEC("license") = "Dual BSD/GPL";
