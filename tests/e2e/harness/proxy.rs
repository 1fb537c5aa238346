//! A way to the API server that a test can cut, for its own pilot alone.

use std::io::ErrorKind;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::bed;

/// Forwards a loopback port to the API server until [`ApiProxy::cut`].
pub struct ApiProxy {
    port: u16,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    cut: bool,
    ended: bool,
    open: Vec<TcpStream>,
}

impl ApiProxy {
    /// Opens the way.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        thread::spawn(move || accept(listener, port, &shared));
        Self { port, state }
    }

    /// The API server's URL by this way.
    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// From now on connections are refused; those that are open are broken.
    pub fn cut(&self) {
        let mut state = self.state.lock().unwrap();
        state.cut = true;
        close(&mut state.open);
    }

    /// Opens the way again.
    pub fn restore(&self) {
        self.state.lock().unwrap().cut = false;
    }
}

impl Drop for ApiProxy {
    fn drop(&mut self) {
        let mut state = self.state.lock().unwrap();
        state.ended = true;
        close(&mut state.open);
    }
}

fn close(open: &mut Vec<TcpStream>) {
    for stream in open.drain(..) {
        // Whoever has closed it already is no matter.
        let _ = stream.shutdown(Shutdown::Both);
    }
}

fn accept(listener: TcpListener, port: u16, state: &Arc<Mutex<State>>) {
    let mut listener = Some(listener);
    loop {
        {
            let state = state.lock().unwrap();
            if state.ended {
                return;
            }
            if state.cut {
                // A port without a listener refuses, as one of a stopped API server does.
                listener = None;
            } else if listener.is_none() {
                listener = TcpListener::bind(("127.0.0.1", port)).ok();
            }
        }
        if let Some(listener) = &listener {
            listener.set_nonblocking(true).unwrap();
            match listener.accept() {
                Ok((client, _)) => {
                    forward(client, state);
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => panic!("accept: {error}"),
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn forward(client: TcpStream, state: &Arc<Mutex<State>>) {
    let Ok(server) = TcpStream::connect(bed().api_server()) else { return };
    client.set_nonblocking(false).unwrap();
    let mut state = state.lock().unwrap();
    for (from, to) in [(&client, &server), (&server, &client)] {
        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        thread::spawn(move || {
            // Its end is the connection's, whichever side it came from.
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Both);
            let _ = from.shutdown(Shutdown::Both);
        });
    }
    state.open.extend([client, server]);
}
