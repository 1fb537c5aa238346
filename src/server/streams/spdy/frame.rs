//! Frames of SPDY/3.1: eight bytes of head, then up to 16 MiB (SPDY protocol draft 3.1, 2.2).
//!
//! [`Head::parse`] and [`Control::parse`] read, the functions at the end write what a server says.

use bytes::{BufMut, Bytes, BytesMut};

use super::headers::{Headers, Inflater};

/// The bytes of a head.
pub const HEAD: usize = 8;

const VERSION: u16 = 3;
const CONTROL: u32 = 1 << 31;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;

const FLAG_FIN: u8 = 1;
const FLAG_UNIDIRECTIONAL: u8 = 2;

/// Why a stream is reset (2.6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Reset {
    /// The stream is not wanted.
    Refused = 3,
    /// The stream is not wanted any more.
    Cancel = 5,
}

/// The first eight bytes of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// Bytes of a stream.
    Data {
        /// Its number.
        stream: u32,
        /// The last ones.
        fin: bool,
        /// How many.
        length: usize,
    },
    /// A control frame.
    Control {
        /// SYN_STREAM and so on.
        kind: u16,
        /// Its flags.
        flags: u8,
        /// The bytes that follow.
        length: usize,
    },
}

impl Head {
    /// Reads a head.
    pub fn parse(head: &[u8; HEAD]) -> Result<Self, &'static str> {
        let [a, b, c, d, flags, l2, l1, l0] = *head;
        let first = u32::from_be_bytes([a, b, c, d]);
        let length = u32::from_be_bytes([0, l2, l1, l0]) as usize;
        if first & CONTROL == 0 {
            return match first {
                0 => Err("data of stream 0"),
                stream => Ok(Self::Data { stream, fin: flags & FLAG_FIN != 0, length }),
            };
        }
        if u16::from_be_bytes([a & 0x7f, b]) != VERSION {
            return Err("a frame of another version than SPDY/3");
        }
        Ok(Self::Control { kind: u16::from_be_bytes([c, d]), flags, length })
    }
}

/// A control frame of the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// Opens a stream.
    Open {
        /// Its number.
        stream: u32,
        /// What it is for.
        headers: Headers,
        /// The client sends nothing on it.
        fin: bool,
        /// The client wants nothing on it.
        unidirectional: bool,
    },
    /// Breaks a stream off.
    Reset(u32),
    /// More headers of a stream, which mean nothing to us but may be the last of it.
    More {
        /// Its number.
        stream: u32,
        /// The client sends nothing more on it.
        fin: bool,
    },
    /// Wants the same back.
    Ping(u32),
    /// The client leaves.
    GoAway,
    /// SETTINGS, WINDOW_UPDATE, and what is not known.
    Nothing,
}

impl Control {
    /// Reads a control frame's payload.
    pub fn parse(
        kind: u16,
        flags: u8,
        payload: &[u8],
        inflater: &mut Inflater,
    ) -> Result<Self, &'static str> {
        let fin = flags & FLAG_FIN != 0;
        let mut rest = payload;
        Ok(match kind {
            SYN_STREAM => {
                let stream = word(&mut rest)?;
                // The stream it belongs to, priority and slot.
                let headers = inflater.headers(rest.get(6..).ok_or(SHORT)?)?;
                Self::Open { stream, headers, fin, unidirectional: flags & FLAG_UNIDIRECTIONAL != 0 }
            }
            SYN_REPLY | HEADERS => {
                let stream = word(&mut rest)?;
                inflater.headers(rest)?;
                Self::More { stream, fin }
            }
            RST_STREAM => Self::Reset(word(&mut rest)?),
            PING => Self::Ping(word(&mut rest)?),
            GOAWAY => Self::GoAway,
            _ => Self::Nothing,
        })
    }
}

const SHORT: &str = "a frame is too short";

fn word(payload: &mut &[u8]) -> Result<u32, &'static str> {
    let (word, rest) = payload.split_first_chunk().ok_or(SHORT)?;
    *payload = rest;
    Ok(u32::from_be_bytes(*word))
}

fn control(kind: u16, words: &[u32], rest: &[u8]) -> Bytes {
    let length = words.len() * 4 + rest.len();
    let mut frame = BytesMut::with_capacity(HEAD + length);
    frame.put_u32(CONTROL | u32::from(VERSION) << 16 | u32::from(kind));
    frame.put_u32(length as u32);
    for word in words {
        frame.put_u32(*word);
    }
    frame.put_slice(rest);
    frame.freeze()
}

/// Bytes of a stream; less than 16 MiB.
pub fn data(stream: u32, fin: bool, bytes: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(HEAD + bytes.len());
    frame.put_u32(stream);
    frame.put_u32(u32::from(if fin { FLAG_FIN } else { 0 }) << 24 | bytes.len() as u32);
    frame.put_slice(bytes);
    frame.freeze()
}

/// Accepts a stream.
pub fn reply(stream: u32, block: &[u8]) -> Bytes {
    control(SYN_REPLY, &[stream], block)
}

/// Breaks a stream off.
pub fn reset(stream: u32, why: Reset) -> Bytes {
    control(RST_STREAM, &[stream, why as u32], &[])
}

/// A question, or the answer to one.
pub fn ping(id: u32) -> Bytes {
    control(PING, &[id], &[])
}

/// Says goodbye. `protocol_error` blames the client.
pub fn go_away(last_stream: u32, protocol_error: bool) -> Bytes {
    control(GOAWAY, &[last_stream, u32::from(protocol_error)], &[])
}
