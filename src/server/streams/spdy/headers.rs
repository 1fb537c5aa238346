//! Header blocks of SPDY/3.1: compressed by one zlib stream a direction, which begins with a dictionary.
//!
//! [`Inflater`] reads those of the client. Ours are all empty, so [`EmptyBlocks`] writes them without a compressor.

use std::sync::LazyLock;

use flate2::{Decompress, FlushDecompress, Status};

/// Largest header block, compressed: kubectl's are below 200 bytes.
pub const COMPRESSED: usize = 16 * 1024;

/// Largest header block, decompressed. zlib can make a thousand bytes out of one.
pub const DECOMPRESSED: usize = 32 * 1024;

/// Most headers of one block: kubectl sends three.
pub const PAIRS: u32 = 64;

/// The strings that SPDY/3 prefills a compressor with, each after its length (SPDY protocol draft 3.1, 2.6.10.1).
const WORDS: &str = "options head post put delete trace accept accept-charset accept-encoding accept-language \
accept-ranges age allow authorization cache-control connection content-base content-encoding content-language \
content-length content-location content-md5 content-range content-type date etag expect expires from host if-match \
if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma \
proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade user-agent \
vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie keep-alive origin";

/// What follows them, without lengths.
const TAIL: &str = "1001012012022052063003023033043053063074024054064074084094104114124134144154164175025045052\
03 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not \
Found500 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov \
Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,application/xml,\
application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,\
utf-,*,enq=0.";

/// The checksum of the dictionary, by which a zlib stream names it.
pub const DICTIONARY_ID: u32 = 0xe3c6_a7c2;

/// The dictionary of SPDY/3.
pub static DICTIONARY: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut dictionary = Vec::with_capacity(1423);
    for word in WORDS.split(' ') {
        let word = word.replace('_', " ");
        dictionary.extend_from_slice(&(word.len() as u32).to_be_bytes());
        dictionary.extend_from_slice(word.as_bytes());
    }
    dictionary.extend_from_slice(TAIL.as_bytes());
    dictionary
});

/// The headers of a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers(pub Vec<(String, String)>);

impl Headers {
    /// The value of a header, whose name is given in small letters: the first one, where it has several.
    pub fn get(&self, name: &str) -> Option<&str> {
        let (_, value) = self.0.iter().find(|(have, _)| have == name)?;
        value.split('\0').next()
    }
}

/// Decompresses the client's header blocks. Each one must pass through here, whatever becomes of its frame.
pub struct Inflater {
    zlib: Decompress,
    output: Vec<u8>,
}

impl Default for Inflater {
    fn default() -> Self {
        Self { zlib: Decompress::new(true), output: Vec::new() }
    }
}

impl Inflater {
    /// The headers in a block, or what is wrong with it: then the connection is of no use any more.
    pub fn headers(&mut self, block: &[u8]) -> Result<Headers, &'static str> {
        self.inflate(block)?;
        let headers = parse(&self.output);
        self.output = Vec::new();
        headers
    }

    fn inflate(&mut self, mut input: &[u8]) -> Result<(), &'static str> {
        let mut buffer = [0; 4096];
        loop {
            let (read, written) = (self.zlib.total_in(), self.zlib.total_out());
            let status = match self.zlib.decompress(input, &mut buffer, FlushDecompress::Sync) {
                Ok(status) => status,
                Err(error) if error.needs_dictionary() == Some(DICTIONARY_ID) => {
                    self.zlib
                        .set_dictionary(&DICTIONARY)
                        .map_err(|_| "its header compression takes no dictionary")?;
                    Status::Ok
                }
                Err(_) => return Err("a header block is not compressed as SPDY/3 wants it"),
            };
            let read = (self.zlib.total_in() - read) as usize;
            let written = (self.zlib.total_out() - written) as usize;
            input = input.get(read..).unwrap_or_default();
            self.output.extend_from_slice(buffer.get(..written).unwrap_or_default());
            if self.output.len() > DECOMPRESSED {
                return Err("a header block is too large");
            }
            if status == Status::StreamEnd {
                return Err("a header block ends the header compression");
            }
            if read == 0 && written == 0 {
                return if input.is_empty() { Ok(()) } else { Err("a header block cannot be decompressed") };
            }
        }
    }
}

/// Reads `number, (length, name, length, value)…`.
fn parse(mut block: &[u8]) -> Result<Headers, &'static str> {
    let number = word(&mut block)?;
    if number > PAIRS {
        return Err("a header block has too many headers");
    }
    let mut headers = Vec::new();
    for _ in 0..number {
        let name = string(&mut block)?.to_ascii_lowercase();
        headers.push((name, string(&mut block)?));
    }
    if block.is_empty() { Ok(Headers(headers)) } else { Err("a header block is longer than its headers") }
}

const SHORT: &str = "a header block is shorter than its headers";

fn word(block: &mut &[u8]) -> Result<u32, &'static str> {
    let (word, rest) = block.split_first_chunk().ok_or(SHORT)?;
    *block = rest;
    Ok(u32::from_be_bytes(*word))
}

fn string(block: &mut &[u8]) -> Result<String, &'static str> {
    let length = word(block)? as usize;
    let (string, rest) = block.split_at_checked(length).ok_or(SHORT)?;
    *block = rest;
    String::from_utf8(string.to_vec()).map_err(|_| "a header is not UTF-8")
}

/// Writes header blocks without headers, as one zlib stream of stored blocks: each ends on a byte, so nothing is kept
/// between them but whether the stream has begun. A compressor would hold 256 KiB a connection.
#[derive(Debug, Default)]
pub struct EmptyBlocks {
    begun: bool,
}

impl EmptyBlocks {
    /// The next block.
    pub fn next(&mut self) -> Vec<u8> {
        let mut block = Vec::with_capacity(20);
        if !std::mem::replace(&mut self.begun, true) {
            // Deflate with a window of 32 KiB, a preset dictionary, and the check bits (RFC 1950, 2.2).
            block.extend_from_slice(&[0x78, 0xbb]);
            block.extend_from_slice(&DICTIONARY_ID.to_be_bytes());
        }
        // Four stored bytes: no headers. Then an empty stored block, by which Go's reader knows a flush.
        block.extend_from_slice(&[0, 4, 0, 0xfb, 0xff, 0, 0, 0, 0]);
        block.extend_from_slice(&[0, 0, 0, 0xff, 0xff]);
        block
    }
}

#[cfg(test)]
mod tests {
    use flate2::{Compress, Compression, FlushCompress};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_dictionary_is_that_of_spdy_3() {
        let (mut a, mut b) = (1u32, 0u32);
        for byte in DICTIONARY.iter() {
            a = (a + u32::from(*byte)) % 65521;
            b = (b + a) % 65521;
        }
        assert_eq!((DICTIONARY.len(), b << 16 | a), (1423, DICTIONARY_ID));
        let first = u32::from_be_bytes([0x78, 0xbb, 0, 0]) >> 16;
        assert_eq!(first % 31, 0, "zlib's check bits");
    }

    #[test]
    fn empty_blocks_are_read_by_zlib() {
        let (mut blocks, mut inflater) = (EmptyBlocks::default(), Inflater::default());
        for _ in 0..3 {
            assert_eq!(inflater.headers(&blocks.next()), Ok(Headers::default()));
        }
    }

    fn deflate(zlib: &mut Compress, block: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(block.len() + 1024);
        zlib.compress_vec(block, &mut out, FlushCompress::Sync).unwrap();
        out
    }

    fn compressor() -> Compress {
        let mut zlib = Compress::new(Compression::best(), true);
        zlib.set_dictionary(&DICTIONARY).unwrap();
        zlib
    }

    #[test]
    fn a_bomb_is_refused_before_it_is_unpacked() {
        let bomb = deflate(&mut compressor(), &vec![0; 8 << 20]);
        assert!(bomb.len() < COMPRESSED, "the bomb passes the limit of compressed bytes");
        let mut inflater = Inflater::default();
        assert_eq!(inflater.headers(&bomb), Err("a header block is too large"));
        assert!(inflater.output.capacity() <= 4 * DECOMPRESSED);
    }

    #[test]
    fn lying_lengths_are_refused() {
        for block in [
            &[0, 0, 0, 1][..],
            &[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, b'a'],
            &[0xff, 0xff, 0xff, 0xff],
            &[0, 0, 0, 0, 0],
            &[0, 0, 0, 1, 0, 0, 0, 1, 0xff, 0, 0, 0, 0],
        ] {
            let mut inflater = Inflater::default();
            assert!(inflater.headers(&deflate(&mut compressor(), block)).is_err(), "{block:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..600), 0..4)) {
            let mut inflater = Inflater::default();
            let mut zlib = compressor();
            for block in &blocks {
                let _ = Inflater::default().headers(block);
                let _ = inflater.headers(&deflate(&mut zlib, block));
            }
        }
    }
}
