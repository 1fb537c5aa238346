//! What a client of SPDY/3.1 sends, by hand, as it may also be sent by one that lies.

/// By which zlib knows the dictionary of SPDY/3 (its Adler-32).
const DICTIONARY_ID: u32 = 0xe3c6_a7c2;

/// Makes the frames of one connection.
#[derive(Default)]
pub struct Spdy {
    opened: u32,
}

impl Spdy {
    /// The frame that opens a stream, and its number.
    pub fn open(&mut self, headers: &[(&str, &str)]) -> (u32, Vec<u8>) {
        let mut block = u32::try_from(headers.len()).unwrap().to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            block.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
            block.extend(text.as_bytes());
        }
        let id = 2 * self.opened + 1;
        let mut payload = id.to_be_bytes().to_vec();
        payload.extend([0; 6]);
        if self.opened == 0 {
            // zlib, with a preset dictionary, of which stored blocks make no use.
            payload.extend([0x78, 0xbb]);
            payload.extend(DICTIONARY_ID.to_be_bytes());
        }
        let length = u16::try_from(block.len()).unwrap();
        payload.push(0);
        payload.extend(length.to_le_bytes());
        payload.extend((!length).to_le_bytes());
        payload.extend(block);
        self.opened += 1;
        (id, control(1, &payload))
    }
}

/// A control frame.
pub fn control(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x80, 3];
    frame.extend(kind.to_be_bytes());
    frame.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
    frame.extend(payload);
    frame
}

/// Bytes of a stream.
pub fn data(id: u32, bytes: &[u8]) -> Vec<u8> {
    let mut frame = id.to_be_bytes().to_vec();
    frame.extend(u32::try_from(bytes.len()).unwrap().to_be_bytes());
    frame.extend(bytes);
    frame
}
