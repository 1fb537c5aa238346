//! `/portForward`: connections to what listens on this host for a pod. Pods have the host's network, so a port is the
//! host's, by its loopback address. Source: cri-streaming `portforward`, kubelet's `server.go`.

use std::net::{Ipv4Addr, Ipv6Addr};

use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use super::body::Answer;
use super::streams::Settings;
use super::streams::port_forward::{ForwardedStream, Negotiated};

/// One copy: what a kubelet's io.Copy moves at once.
const COPY_BYTES: usize = 32 * 1024;

/// Answers with 101 and forwards beside it until the client goes or the pod has ended.
pub fn port_forward(
    mut request: Request<Incoming>,
    negotiated: Negotiated,
    room: OwnedSemaphorePermit,
    over: impl Future<Output = ()> + Send + 'static,
) -> Response<Answer> {
    let response = negotiated.response();
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let _room = room;
        let connection = match upgraded.await {
            Ok(connection) => connection,
            Err(error) => {
                tracing::info!(%error, "a port-forward could not begin");
                return;
            }
        };
        let mut forwarding = negotiated.accept(TokioIo::new(connection), Settings::PORT_FORWARD).await;
        // All connections end with the client and with the pod.
        let mut connections = JoinSet::new();
        tokio::pin!(over);
        loop {
            tokio::select! {
                stream = forwarding.streams.recv() => match stream {
                    Some(stream) => { connections.spawn(forward(stream)); }
                    None => break,
                },
                Some(_) = connections.join_next() => {}
                _ = forwarding.closed.wait() => break,
                () = &mut over => break,
            }
        }
    });
    response
}

/// Forwarded connections of all clients together: each takes a descriptor, of which a process has 1024 by default.
const FORWARDED: usize = 200;

static ROOM: Semaphore = Semaphore::const_new(FORWARDED);

async fn forward(stream: ForwardedStream) {
    let ForwardedStream { port, mut data, error } = stream;
    let Ok(_room) = ROOM.try_acquire() else {
        let _ = error.fail(&format!("{FORWARDED} connections are forwarded by this Node already")).await;
        return;
    };
    let mut server = match connect(port).await {
        Ok(server) => server,
        Err(problem) => {
            let _ = error.fail(&format!("port {port} of this pod's host: {problem}")).await;
            return;
        }
    };
    let _ = server.set_nodelay(true);
    let copied =
        tokio::io::copy_bidirectional_with_sizes(&mut data, &mut server, COPY_BYTES, COPY_BYTES).await;
    match copied {
        Ok(_) => {
            let _ = data.shutdown().await;
            let _ = error.finish().await;
        }
        Err(problem) => {
            tracing::debug!(port, %problem, "a forwarded connection was broken off");
            let _ = error.break_off().await;
        }
    }
}

/// To a server that listens by IPv4, or by IPv6 alone: containerd tries them in this order.
async fn connect(port: u16) -> std::io::Result<TcpStream> {
    match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Ok(server) => Ok(server),
        // What IPv4 said is told: there may be no IPv6 at all.
        Err(problem) => TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await.map_err(|_| problem),
    }
}
