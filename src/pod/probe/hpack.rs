//! As much of HPACK (RFC 7541) as one health check needs: a header block is written without any compression, and read
//! without a dynamic table, since our settings leave the server none.

/// Lengths in bits of the Huffman codes of the 256 bytes (RFC 7541, appendix B). The code is canonical: in the order of
/// lengths, then of bytes, each is the one before plus one. So the lengths are all of it.
const LENGTHS: [u8; 256] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28,
    28, 28, 28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6,
    6, 6, 7, 8, 15, 6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7,
    8, 13, 19, 13, 14, 6, 15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7,
    15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24,
    23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23,
    23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23, 26, 26, 20, 19, 22, 23, 22, 25, 26,
    26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20,
    21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27,
    27, 27, 26,
];

/// The longest code.
const LONGEST: u8 = 30;

/// Entries of the static table (appendix A); what is beyond is the dynamic table.
const STATIC_ENTRIES: usize = 61;

/// The values of the entries 8 to 14, all of the name `:status`.
const STATUSES: [&str; 7] = ["200", "204", "206", "304", "400", "404", "500"];

/// The block is not what a server may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("its headers cannot be read: {0}")]
pub(super) struct BadHeaders(&'static str);

/// A header. A name from the static table that no health check needs is left empty.
pub(super) type Header = (Vec<u8>, Vec<u8>);

/// Adds a header: a literal that is never indexed, with a name of its own.
pub(super) fn write(block: &mut Vec<u8>, name: &str, value: &str) {
    block.push(0x10);
    for text in [name, value] {
        write_length(block, text.len());
        block.extend_from_slice(text.as_bytes());
    }
}

/// An integer of a 7-bit prefix whose eighth bit is clear (section 5.1).
fn write_length(block: &mut Vec<u8>, length: usize) {
    let Some(mut rest) = length.checked_sub(127) else {
        block.push(length as u8);
        return;
    };
    block.push(127);
    while rest >= 128 {
        block.push((rest % 128) as u8 | 128);
        rest /= 128;
    }
    block.push(rest as u8);
}

/// Reads a header block.
pub(super) fn read(block: &[u8]) -> Result<Vec<Header>, BadHeaders> {
    let mut reader = Reader(block);
    let mut headers = Vec::new();
    while let Some(&first) = reader.0.first() {
        if first & 0x80 != 0 {
            let index = reader.integer(7)?;
            headers.push((name(index)?, status(index)));
        } else if first & 0xe0 == 0x20 {
            // The table's size: there is none.
            reader.integer(5)?;
        } else {
            let index = reader.integer(if first & 0x40 != 0 { 6 } else { 4 })?;
            let name = if index == 0 { reader.string()? } else { name(index)? };
            headers.push((name, reader.string()?));
        }
    }
    Ok(headers)
}

fn name(index: usize) -> Result<Vec<u8>, BadHeaders> {
    match index {
        0 => Err(BadHeaders("an index is 0")),
        8..=14 => Ok(b":status".to_vec()),
        1..=STATIC_ENTRIES => Ok(Vec::new()),
        _ => Err(BadHeaders("they use a table that was declined")),
    }
}

fn status(index: usize) -> Vec<u8> {
    let found = index.checked_sub(8).and_then(|at| STATUSES.get(at));
    found.map_or_else(Vec::new, |status| status.as_bytes().to_vec())
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn byte(&mut self) -> Result<u8, BadHeaders> {
        let (first, rest) = self.0.split_first().ok_or(BadHeaders("they break off"))?;
        self.0 = rest;
        Ok(*first)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], BadHeaders> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(BadHeaders("they break off"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn integer(&mut self, bits: u32) -> Result<usize, BadHeaders> {
        let most = (1usize << bits) - 1;
        let mut value = usize::from(self.byte()?) & most;
        if value < most {
            return Ok(value);
        }
        // Three more bytes reach 2 MiB, more than any block here.
        for shift in [0, 7, 14] {
            let byte = self.byte()?;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(BadHeaders("a number is too large"))
    }

    fn string(&mut self) -> Result<Vec<u8>, BadHeaders> {
        let huffman = self.0.first().is_some_and(|first| first & 0x80 != 0);
        let length = self.integer(7)?;
        let bytes = self.take(length)?;
        if huffman { unpack(bytes) } else { Ok(bytes.to_vec()) }
    }
}

/// A string from its Huffman codes (section 5.2). It looks each code up by counting: names and values are short.
fn unpack(bytes: &[u8]) -> Result<Vec<u8>, BadHeaders> {
    let mut text = Vec::new();
    // How many codes there are of each length.
    let mut counts = [0u32; LONGEST as usize + 1];
    LENGTHS.iter().for_each(|length| counts[usize::from(*length)] += 1);
    let (mut code, mut length) = (0u32, 0u8);
    // The first code of this length.
    let mut first = 0u32;
    for bit in bytes.iter().flat_map(|byte| (0..8).rev().map(move |at| u32::from(byte >> at & 1))) {
        (code, length) = (code << 1 | bit, length + 1);
        first <<= 1;
        if length > LONGEST {
            return Err(BadHeaders("a string has a code that is none"));
        }
        let count = counts[usize::from(length)];
        if code - first < count {
            let mut symbols = (0u8..=255).filter(|symbol| LENGTHS[usize::from(*symbol)] == length);
            text.extend(symbols.nth((code - first) as usize));
            (code, length, first) = (0, 0, 0);
        } else {
            first += count;
        }
    }
    // The rest of the last byte is ones.
    if length < 8 && code + 1 == 1 << length { Ok(text) } else { Err(BadHeaders("a string breaks off")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(|b| *b != b' ').collect();
        digits
            .chunks(2)
            .map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap())
            .collect()
    }

    #[test]
    fn strings_are_unpacked() {
        // RFC 7541, appendix C.4 and C.6.
        let table = [
            ("f1e3 c2e5 f23a 6ba0 ab90 f4ff", "www.example.com"),
            ("a8eb 1064 9cbf", "no-cache"),
            ("6402", "302"),
            ("d07a be94 1054 d444 a820 0595 040b 8166 e082 a62d 1bff", "Mon, 21 Oct 2013 20:13:21 GMT"),
        ];
        for (bytes, wanted) in table {
            assert_eq!(unpack(&hex(bytes)).as_deref(), Ok(wanted.as_bytes()), "{wanted}");
        }
        assert!(unpack(&hex("ffff ffff")).is_err());
        assert!(unpack(&hex("00")).is_err());
    }

    #[test]
    fn blocks_are_read() {
        let pair = |name: &str, value: &str| (name.as_bytes().to_vec(), value.as_bytes().to_vec());
        assert_eq!(read(&hex("20 88")).unwrap(), [pair(":status", "200")]);
        assert_eq!(read(&hex("48 82 6402")).unwrap(), [pair(":status", "302")]);
        let mut block = Vec::new();
        let long = "x".repeat(300);
        write(&mut block, "a", &long);
        write(&mut block, "b", "");
        assert_eq!(read(&block).unwrap(), [pair("a", &long), pair("b", "")]);
        for bad in ["80", "be", "ff ff ff ff ff", "00 05 61", "40"] {
            assert!(read(&hex(bad)).is_err(), "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_block_comes_to_an_end(block in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let _ = read(&block);
        }
    }
}
