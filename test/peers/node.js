// SPDX-License-Identifier: Apache-2.0

// A peer by Node.js: http2 (nghttp2) over tls (OpenSSL), nothing of ours. As a
// client it listens on loopback ports and asks for each connection by CONNECT; as
// a server it answers CONNECT by connecting to an application of its pod. It is
// told what to do by one argument of JSON, and by lines of JSON on its standard
// input; what it sees it says in lines of JSON on its standard output.
'use strict';
const fs = require('fs');
const http2 = require('http2');
const net = require('net');
const readline = require('readline');

const { NGHTTP2_NO_ERROR, NGHTTP2_CANCEL } = http2.constants;
const config = JSON.parse(process.argv[2]);
const say = (event) => process.stdout.write(JSON.stringify(event) + '\n');

const settings = { initialWindowSize: 1 << 20, maxFrameSize: 1 << 20 };
// Its default of 10 MB, for all streams of a session, refuses new ones beyond.
const limits = { settings, maxSessionMemory: 256 };

function certificates(f) {
	return {
		cert: fs.readFileSync(f.Cert), key: fs.readFileSync(f.Key), ca: fs.readFileSync(f.Root),
		minVersion: 'TLSv1.3', ALPNProtocols: ['h2'],
	};
}

// The one URI of a certificate, as Node.js writes alternative names.
const identity = (cert) => ((cert && cert.subjectaltname) || '').replace(/^URI:/, '');

// join ties a TCP connection to a stream: bytes with each side's own flow control,
// ends as ends, resets as resets.
function join(socket, stream) {
	socket.pipe(stream);
	stream.pipe(socket, { end: false });
	// The end of what can be read comes with a reset too.
	stream.on('end', () => { if (stream.rstCode === NGHTTP2_NO_ERROR && !stream.aborted) socket.end(); });
	// Not stream.close(code), which sends END_STREAM before RST_STREAM.
	socket.on('error', (err) => stream.destroy(err));
	stream.on('error', () => {}); // 'close' comes after it
	stream.on('close', () => { if (stream.rstCode !== NGHTTP2_NO_ERROR) socket.resetAndDestroy(); });
}

function widen(session) {
	session.setLocalWindowSize(16 << 20);
}

// ---- client

const sessions = new Map();

// session is the one of a kind that takes new streams.
function session(kind) {
	let s = sessions.get(kind.name);
	if (s && !s.closed && !s.destroyed && !s.drained) return s;
	s = http2.connect('https://' + kind.at, {
		...limits, ...certificates(kind.files), servername: '',
		checkServerIdentity: (_, cert) => {
			if (identity(cert) !== kind.expect) return new Error('is ' + identity(cert));
		},
	});
	sessions.set(kind.name, s);
	s.on('connect', () => { widen(s); say({ event: 'session', kind: kind.name }); });
	s.on('error', (err) => say({ event: 'error', kind: kind.name, code: err.code || '', message: err.message }));
	s.on('goaway', (code) => { s.drained = true; say({ event: 'goaway', kind: kind.name, code }); });
	s.on('close', () => say({ event: 'closed', kind: kind.name }));
	return s;
}

function listen(route, port) {
	const kind = config.kinds.find((k) => k.name === route.cluster);
	net.createServer({ allowHalfOpen: true, pauseOnConnect: true }, (socket) => {
		let stream;
		socket.on('error', () => {});
		try {
			stream = session(kind).request({ ':method': 'CONNECT', ':authority': route.authority }, { endStream: false });
		} catch (err) {
			say({ event: 'failed', route: route.name, message: err.message });
			socket.resetAndDestroy();
			return;
		}
		stream.on('error', (err) => say({ event: 'failed', route: route.name, code: err.code || '', message: err.message }));
		let answered = false;
		stream.on('response', (h) => {
			answered = true;
			if (h[':status'] === 200) {
				socket.resume();
				join(socket, stream);
				return;
			}
			say({ event: 'refused', route: route.name, status: h[':status'], reason: h['culvert-reason'] || '' });
			stream.close(NGHTTP2_CANCEL);
			socket.resetAndDestroy();
		});
		stream.on('close', () => { if (!answered) socket.resetAndDestroy(); });
	}).listen(port, '127.0.0.1', 1024);
}

// ---- server

function serve(s) {
	const server = http2.createSecureServer({
		...limits, ...certificates(s.files), requestCert: true, rejectUnauthorized: true, allowHTTP1: false,
	});
	server.on('session', (session) => {
		const who = identity(session.socket.getPeerCertificate());
		if (who !== s.expect) {
			say({ event: 'stranger', who });
			session.destroy();
			return;
		}
		widen(session);
		serving.add(session);
		say({ event: 'session', who });
		session.on('goaway', (code) => say({ event: 'goaway', code }));
		session.on('close', () => { serving.delete(session); say({ event: 'closed' }); });
		session.on('error', (err) => say({ event: 'error', code: err.code || '', message: err.message }));
	});
	server.on('tlsClientError', (err) => say({ event: 'tls', code: err.code || '', message: err.message }));
	server.on('stream', (stream, h) => {
		stream.on('error', () => {});
		const port = Number((h[':authority'] || '').replace(/.*:/, ''));
		const status = h[':method'] === 'CONNECT' ? s.statuses[port] : 405;
		if (status) {
			stream.respond({ ':status': status }, { endStream: true });
			return;
		}
		const socket = net.connect({ host: '127.0.0.1', port, allowHalfOpen: true });
		socket.once('connect', () => {
			stream.respond({ ':status': 200 });
			join(socket, stream);
		});
		socket.once('error', () => {
			if (stream.headersSent) return;
			stream.respond({ ':status': 503 }, { endStream: true });
		});
		stream.on('close', () => { if (!stream.headersSent) socket.destroy(); });
	});
	server.listen(s.port, '::', 1024);
	return server;
}

const serving = new Set();

if (config.routes) config.routes.forEach((r, i) => listen(r, config.first + i));
const server = config.server && serve(config.server);

// ---- what it is told

readline.createInterface({ input: process.stdin }).on('line', (line) => {
	const order = JSON.parse(line);
	switch (order.do) {
	case 'goaway': // of every session: nothing new, what is open goes on; the other side closes
	case 'close': // and this one does
		for (const s of [...serving, ...sessions.values()]) {
			s.drained = true;
			if (s.closed || s.destroyed) continue;
			if (order.do === 'close') s.close();
			else s.goaway(NGHTTP2_NO_ERROR);
		}
		break;
	case 'renew':
		server.setSecureContext(certificates(config.server.files));
		break;
	}
	say({ event: 'done', do: order.do });
}).on('close', () => process.exit(0));

say({ event: 'ready', node: process.version, nghttp2: process.versions.nghttp2, openssl: process.versions.openssl });
