//! What the streams of one connection and its task share: what was received and not read, what waits to be sent.
//!
//! [`Link::open`] makes a stream's two halves; the rules are in the parent module.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::ReadBuf;
use tokio::sync::watch;
use tokio::time::Instant;

use super::stream::{Closed, StreamReader, StreamWriter};
use super::{CHUNK, CONTROL_BACKLOG, Ended, OUTBOX, STREAM_BUFFER, Settings};

/// How a stream's bytes are put into what the connection carries.
pub(super) trait Framing: Send + Sync {
    /// Bytes of the stream.
    fn data(&self, stream: u32, bytes: &[u8]) -> Bytes;
    /// That no more will come, where the protocol can say so.
    fn finish(&self, stream: u32) -> Option<Bytes>;
    /// That the stream is broken off, where the protocol can say so.
    fn reset(&self, stream: u32) -> Option<Bytes>;
    /// What only asks the client whether it is there.
    fn probe(&self) -> Bytes;
}

/// What a unit is: what it counts for, and how a WebSocket sends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Bytes of a stream.
    Data,
    /// What answers the client, or ends a stream.
    Control,
    /// What asks whether the client lives. It is no activity.
    Probe,
}

/// One frame or message, encoded.
#[derive(Debug)]
pub(super) struct Unit {
    /// What it is.
    pub kind: Kind,
    /// The frame or the message's payload.
    pub bytes: Bytes,
}

/// What the connection's task finds in the outbox.
#[derive(Debug)]
pub(super) enum Next {
    /// Send this.
    Unit(Unit),
    /// Nothing at the moment.
    Empty,
    /// Nothing, and nothing will come: say goodbye.
    Drained,
}

/// How a stream's bytes from the client ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The client has closed its side.
    Finished,
    /// It was broken off.
    Reset,
}

#[derive(Default)]
struct Stream {
    inbox: BytesMut,
    end: Option<End>,
    reader: Option<Waker>,
    reader_gone: bool,
    writer: Option<Waker>,
    writer_gone: bool,
    /// Nothing more is sent: finished or reset by either side.
    sent_all: bool,
    /// The client has broken it off.
    broken_off: Arc<AtomicBool>,
}

struct State {
    streams: HashMap<u32, Stream>,
    units: VecDeque<Unit>,
    /// Bytes in `units` and in the hands of the task.
    queued: usize,
    control: usize,
    /// Units ever queued, handed to the connection, flushed.
    pushed: u64,
    written: u64,
    flushed: u64,
    /// Streams whose writer waits.
    waiting: Vec<u32>,
    sender: Option<Waker>,
    receiver: Option<Waker>,
    closing: bool,
    blamed: bool,
    ended: Option<Ended>,
    active: Instant,
}

/// Shared by the streams of a connection and its task.
pub(super) struct Link {
    framing: Box<dyn Framing>,
    settings: Settings,
    state: Mutex<State>,
    ended: watch::Sender<Option<Ended>>,
    closing: tokio::sync::Notify,
}

impl Link {
    pub(super) fn new(framing: impl Framing + 'static, settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            framing: Box::new(framing),
            settings,
            state: Mutex::new(State {
                streams: HashMap::new(),
                units: VecDeque::new(),
                queued: 0,
                control: 0,
                pushed: 0,
                written: 0,
                flushed: 0,
                waiting: Vec::new(),
                sender: None,
                receiver: None,
                closing: false,
                blamed: false,
                ended: None,
                active: Instant::now(),
            }),
            ended: watch::Sender::new(None),
            closing: tokio::sync::Notify::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// A new stream of this number, which is not in use.
    pub(super) fn open(self: &Arc<Self>, id: u32) -> (StreamReader, StreamWriter) {
        self.state().streams.insert(id, Stream::default());
        (StreamReader::new(self.clone(), id), StreamWriter::new(self.clone(), id))
    }

    /// Bytes held for streams and for the client.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        let state = self.state();
        state.queued + state.streams.values().map(|stream| stream.inbox.capacity()).sum::<usize>()
    }

    /// Streams that are not over.
    pub(super) fn open_streams(&self) -> usize {
        self.state().streams.len()
    }

    /// Lets what is queued reach the client and then ends the connection. Writers fail from now on.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closing = true;
        state.wake_writers();
        state.wake_sender();
        state.wake_receiver();
        drop(state);
        self.closing.notify_one();
    }

    /// The goodbye is to say that the client broke the protocol.
    pub(super) fn blame(&self) {
        self.state().blamed = true;
    }

    /// Whether [`Link::blame`] was called.
    pub(super) fn blames(&self) -> bool {
        self.state().blamed
    }

    /// Whether [`Link::close`] was called.
    pub(super) fn is_closing(&self) -> bool {
        self.state().closing
    }

    /// Resolves once [`Link::close`] was called.
    pub(super) async fn closing(&self) {
        self.closing.notified().await;
    }

    /// The connection is over: wakes everyone. Only the first reason counts. With `clean`, readers see an end of file.
    pub(super) fn end(&self, why: Ended, clean: bool) {
        let mut state = self.state();
        if state.ended.is_some() {
            return;
        }
        state.ended = Some(why.clone());
        state.units.clear();
        for stream in state.streams.values_mut() {
            stream.finish_receiving(if clean { End::Finished } else { End::Reset });
        }
        state.wake_writers();
        drop(state);
        self.ended.send_replace(Some(why));
    }

    /// Tells when and why the connection ends.
    pub(super) fn closed(&self) -> Closed {
        Closed::new(self.ended.subscribe())
    }

    /// Queues what is no stream's bytes.
    pub(super) fn push(&self, kind: Kind, bytes: Bytes) {
        self.state().push(kind, bytes);
    }

    /// Asks the client whether it is there, unless a question is still waiting to be sent.
    pub(super) fn probe(&self) {
        let mut state = self.state();
        if !state.units.iter().any(|unit| unit.kind == Kind::Probe) {
            state.push(Kind::Probe, self.framing.probe());
        }
    }

    /// Something came from the client.
    pub(super) fn touch(&self) {
        self.state().active = Instant::now();
    }

    /// When something was last sent or received.
    pub(super) fn active(&self) -> Instant {
        self.state().active
    }

    /// How many units the connection has taken.
    pub(super) fn progress(&self) -> u64 {
        self.state().written
    }

    /// What to send next.
    pub(super) fn next(&self) -> Next {
        let mut state = self.state();
        match state.units.pop_front() {
            Some(unit) => Next::Unit(unit),
            None if state.closing || state.ended.is_some() => Next::Drained,
            None => Next::Empty,
        }
    }

    /// Waits until [`Link::next`] has something to say.
    pub(super) fn poll_sendable(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        if !state.units.is_empty() || state.closing || state.ended.is_some() {
            return Poll::Ready(());
        }
        state.sender = Some(cx.waker().clone());
        Poll::Pending
    }

    /// The connection has taken a unit.
    pub(super) fn written(&self, kind: Kind, bytes: usize) {
        let mut state = self.state();
        state.written += 1;
        state.queued = state.queued.saturating_sub(bytes);
        if kind != Kind::Data {
            state.control = state.control.saturating_sub(bytes);
            state.wake_receiver();
        }
        if kind != Kind::Probe {
            state.active = Instant::now();
        }
        state.wake_writers();
    }

    /// What the connection has taken is on its way.
    pub(super) fn flushed(&self) {
        let mut state = self.state();
        state.flushed = state.written;
        state.wake_writers();
    }

    /// Waits until one more answer to the client may be queued.
    pub(super) fn poll_answerable(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        if state.control < CONTROL_BACKLOG {
            return Poll::Ready(());
        }
        state.receiver = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Gives a stream as much of `bytes` as it has room for and says how much; all of it when nobody reads the stream
    /// any more, or it never was.
    pub(super) fn poll_deliver(&self, cx: &mut Context<'_>, id: u32, bytes: &[u8]) -> Poll<usize> {
        let mut state = self.state();
        let closing = state.closing;
        let Some(stream) = state.streams.get_mut(&id) else { return Poll::Ready(bytes.len()) };
        if closing || stream.reader_gone || stream.end.is_some() {
            return Poll::Ready(bytes.len());
        }
        let room = STREAM_BUFFER.saturating_sub(stream.inbox.len()).min(bytes.len());
        if room == 0 && !bytes.is_empty() {
            state.receiver = Some(cx.waker().clone());
            return Poll::Pending;
        }
        if let Some(bytes) = bytes.get(..room) {
            stream.inbox.extend_from_slice(bytes);
        }
        if let Some(reader) = stream.reader.take() {
            reader.wake();
        }
        Poll::Ready(room)
    }

    /// No more will come for a stream.
    pub(super) fn received_all(&self, id: u32, end: End) {
        let mut state = self.state();
        if let Some(stream) = state.streams.get_mut(&id) {
            stream.finish_receiving(end);
            if end == End::Reset {
                stream.broken_off.store(true, Ordering::Relaxed);
                stream.sent_all = true;
                if let Some(writer) = stream.writer.take() {
                    writer.wake();
                }
            }
        }
        state.forget_if_over(id);
    }

    /// Takes what a stream has received.
    pub(super) fn poll_read(
        &self,
        cx: &mut Context<'_>,
        id: u32,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut state = self.state();
        let Some(stream) = state.streams.get_mut(&id) else { return Poll::Ready(Ok(())) };
        if !stream.inbox.is_empty() {
            let taken = stream.inbox.len().min(buf.remaining());
            buf.put_slice(stream.inbox.get(..taken).unwrap_or_default());
            stream.inbox.advance(taken);
            state.wake_receiver();
            return Poll::Ready(Ok(()));
        }
        match stream.end {
            Some(End::Finished) => Poll::Ready(Ok(())),
            Some(End::Reset) => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            None => {
                stream.reader = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Nobody reads a stream any more.
    pub(super) fn drop_reader(&self, id: u32) {
        let mut state = self.state();
        if let Some(stream) = state.streams.get_mut(&id) {
            stream.reader_gone = true;
            stream.inbox = BytesMut::new();
        }
        state.wake_receiver();
        state.forget_if_over(id);
    }

    /// Queues bytes of a stream and says how many; `mark` becomes the units that were queued up to then.
    pub(super) fn poll_write(
        &self,
        cx: &mut Context<'_>,
        id: u32,
        buf: &[u8],
        mark: &mut u64,
    ) -> Poll<io::Result<usize>> {
        let mut state = self.state();
        let done = state.streams.get(&id).is_none_or(|stream| stream.sent_all);
        if done || state.closing || state.ended.is_some() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if state.queued >= OUTBOX {
            state.wait_to_write(id, cx);
            return Poll::Pending;
        }
        let bytes = buf.get(..CHUNK).unwrap_or(buf);
        if !bytes.is_empty() {
            state.push(Kind::Data, self.framing.data(id, bytes));
            *mark = state.pushed;
        }
        Poll::Ready(Ok(bytes.len()))
    }

    /// Waits until all units up to `mark` are on their way.
    pub(super) fn poll_flushed(&self, cx: &mut Context<'_>, id: u32, mark: u64) -> Poll<io::Result<()>> {
        let mut state = self.state();
        if state.flushed >= mark {
            return Poll::Ready(Ok(()));
        }
        if state.ended.is_some() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        state.wait_to_write(id, cx);
        Poll::Pending
    }

    /// Queues the last bytes of a stream, however much waits, and that no more will come; the units queued up to then.
    pub(super) fn send_last(&self, id: u32, bytes: &[u8]) -> u64 {
        let mut state = self.state();
        if !bytes.is_empty() && state.streams.get(&id).is_some_and(|stream| !stream.sent_all) {
            state.push(Kind::Control, self.framing.data(id, bytes));
        }
        state.send_last(id, self.framing.finish(id));
        // After the end nothing is on its way any more.
        state.pushed + u64::from(state.ended.is_some())
    }

    /// Becomes true when the client breaks a stream off, and outlives the stream.
    pub(super) fn broken_off(&self, id: u32) -> Arc<AtomicBool> {
        self.state().streams.get(&id).map(|stream| stream.broken_off.clone()).unwrap_or_default()
    }

    /// Says that no more will be sent on a stream.
    pub(super) fn finish(&self, id: u32) {
        self.send_last(id, &[]);
    }

    /// Nobody writes to a stream any more.
    pub(super) fn drop_writer(&self, id: u32) {
        let mut state = self.state();
        state.send_last(id, self.framing.finish(id));
        if let Some(stream) = state.streams.get_mut(&id) {
            stream.writer_gone = true;
        }
        state.forget_if_over(id);
    }

    /// Sends nothing more on a stream, and need not say so: the client has told that it does not listen.
    pub(super) fn mute(&self, id: u32) {
        if let Some(stream) = self.state().streams.get_mut(&id) {
            stream.sent_all = true;
        }
    }

    /// Breaks a stream off in both directions. One that was finished is not reset any more.
    pub(super) fn reset(&self, id: u32) {
        let mut state = self.state();
        state.send_last(id, self.framing.reset(id));
        if let Some(stream) = state.streams.get_mut(&id) {
            stream.inbox = BytesMut::new();
            stream.finish_receiving(End::Reset);
        }
        state.forget_if_over(id);
    }

    /// Queues a message of a stream by itself; an empty one too, which no write sends.
    pub(super) fn push_data(&self, id: u32, bytes: &[u8]) {
        let unit = self.framing.data(id, bytes);
        self.push(Kind::Control, unit);
    }
}

impl Stream {
    fn finish_receiving(&mut self, end: End) {
        self.end.get_or_insert(end);
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}

impl State {
    fn push(&mut self, kind: Kind, bytes: Bytes) {
        if self.ended.is_some() {
            return;
        }
        self.queued += bytes.len();
        if kind != Kind::Data {
            self.control += bytes.len();
        }
        self.pushed += 1;
        self.units.push_back(Unit { kind, bytes });
        self.wake_sender();
    }

    fn send_last(&mut self, id: u32, unit: Option<Bytes>) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if std::mem::replace(&mut stream.sent_all, true) {
            return;
        }
        if let Some(writer) = stream.writer.take() {
            writer.wake();
        }
        if let Some(unit) = unit
            && !self.closing
        {
            self.push(Kind::Control, unit);
        }
    }

    /// A stream takes up a place until both its halves are dropped and the client has ended its side.
    fn forget_if_over(&mut self, id: u32) {
        if let Some(stream) = self.streams.get(&id)
            && stream.reader_gone
            && stream.writer_gone
            && (stream.end.is_some() || self.ended.is_some())
        {
            self.streams.remove(&id);
        }
    }

    fn wait_to_write(&mut self, id: u32, cx: &mut Context<'_>) {
        if let Some(stream) = self.streams.get_mut(&id)
            && stream.writer.replace(cx.waker().clone()).is_none()
        {
            self.waiting.push(id);
        }
    }

    fn wake_writers(&mut self) {
        for id in self.waiting.drain(..) {
            if let Some(writer) = self.streams.get_mut(&id).and_then(|stream| stream.writer.take()) {
                writer.wake();
            }
        }
    }

    fn wake_sender(&mut self) {
        if let Some(sender) = self.sender.take() {
            sender.wake();
        }
    }

    fn wake_receiver(&mut self) {
        if let Some(receiver) = self.receiver.take() {
            receiver.wake();
        }
    }
}
