//! What answers are made of: a text, or bytes that come by and by.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use hyper::body::{Body, Frame, SizeHint};
use tokio::sync::mpsc;

/// Pieces that wait for a client that is slow; whoever makes them waits then.
const PIECES: usize = 1;

/// The body of an answer.
#[derive(Debug)]
pub enum Answer {
    /// All of it.
    Whole(Option<Bytes>),
    /// Pieces, until the sender is dropped.
    Pieces(mpsc::Receiver<Bytes>),
}

impl Default for Answer {
    fn default() -> Self {
        Self::Whole(None)
    }
}

impl From<String> for Answer {
    fn from(text: String) -> Self {
        Self::Whole(Some(Bytes::from(text)))
    }
}

impl Answer {
    /// A body that is made while it is sent.
    #[must_use]
    pub fn pieces() -> (mpsc::Sender<Bytes>, Self) {
        let (sender, receiver) = mpsc::channel(PIECES);
        (sender, Self::Pieces(receiver))
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Pieces(receiver) => {
                receiver.poll_recv(context).map(|piece| piece.map(|b| Ok(Frame::data(b))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    // What is known is said as Content-Length: a client then sees an answer that was cut off.
    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Pieces(_) => SizeHint::default(),
        }
    }
}

/// A text for people, with a status.
#[must_use]
pub fn text(status: StatusCode, text: impl Into<String>) -> Response<Answer> {
    typed(status, "text/plain; charset=utf-8", text.into())
}

/// Something of a type.
#[must_use]
pub fn typed(status: StatusCode, kind: &'static str, text: String) -> Response<Answer> {
    let mut response = Response::new(Answer::from(text));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_of_a_whole_answer_is_known_and_that_of_pieces_is_not() {
        assert_eq!(text(StatusCode::OK, "ok").body().size_hint().exact(), Some(2));
        assert_eq!(Answer::default().size_hint().exact(), Some(0));
        assert!(Answer::default().is_end_stream());
        assert_eq!(Answer::pieces().1.size_hint().exact(), None);
    }
}
